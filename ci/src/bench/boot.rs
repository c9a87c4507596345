//! From the start of a `vmm` process to the first answer of its module.
use super::{Better, Row};
use crate::modules::{self, Cluster, Disk};
use crate::report::{Progress, median, percentile};
use anyhow::Result;
use std::time::Duration;

/// Starts each module `samples` times.
pub fn run(cluster: &mut Cluster, dmodule_memory: &str, samples: usize) -> Result<Vec<Row>> {
    let mut nmodule = Vec::new();
    let mut progress = Progress::start("boot: N-module to its first NFS reply");
    for i in 0..samples {
        cluster.nmodule.daemon.kill()?;
        let (module, took) = modules::start_nmodule(&cluster.lab, &cluster.artifacts, &cluster.lab.node1)?;
        cluster.nmodule = module;
        nmodule.push(ms(took));
        progress.update(&format!("{} of {samples}", i + 1));
    }
    progress.done(&format!("median {:.1} ms", median(&nmodule)));
    let mut dmodule = Vec::new();
    let mut progress = Progress::start("boot: D-module on an existing file system to its first answer");
    for i in 0..samples {
        cluster.dmodule.daemon.kill()?;
        let (module, took) =
            modules::start_dmodule(&cluster.lab, &cluster.artifacts, &cluster.disk, Disk::Existing, dmodule_memory)?;
        cluster.dmodule = module;
        dmodule.push(ms(took));
        progress.update(&format!("{} of {samples}", i + 1));
    }
    progress.done(&format!("median {:.1} ms", median(&dmodule)));
    let row = |name: &str, value| Row::alone(name, "ms", Better::Less, value, samples);
    Ok(vec![
        row("N-module: vmm start to first NFS NULL reply, median", median(&nmodule)),
        row("N-module: the same, worst", percentile(&nmodule, 100)),
        row("D-module: vmm start to first answer on an existing 1 GiB file system, median", median(&dmodule)),
        row("D-module: the same, worst", percentile(&dmodule, 100)),
    ])
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
