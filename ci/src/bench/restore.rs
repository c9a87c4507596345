//! From the start of a `vmm` process to the first NFS reply of an N-module: from a checkpoint, beside a cold start.
use super::{Better, Row};
use crate::modules::{self, Cluster};
use crate::report::{Progress, median, percentile};
use anyhow::{Context, Result};
use serde_json::json;
use std::time::Duration;

/// An ended VM's process is waited for.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Starts the N-module cold, then from a checkpoint of what it had become, mapped and read, in turn, `samples` times. A checkpoint of a VM with
/// an ownership record can be restored once, so each restore has its own.
pub fn run(cluster: &mut Cluster, samples: usize) -> Result<Vec<Row>> {
    let (mut cold, mut pauses) = (Vec::new(), Vec::new());
    let mut restored = [("mapped", "map", Vec::new()), ("read", "read", Vec::new())];
    let mut progress = Progress::start("restore: N-module to its first NFS reply");
    for i in 0..samples {
        cluster.nmodule.daemon.kill()?;
        let (module, took) = modules::start_nmodule(&cluster.lab, &cluster.artifacts, &cluster.lab.node1)?;
        cluster.nmodule = module;
        cold.push(ms(took));
        let alive = cluster.lab.data_dir().join("running");
        let report = cluster.nmodule.api.post("/v1/vm/checkpoint", &json!({ "path": alive, "track": false }))?;
        pauses.push(
            report["pause_us"].as_f64().with_context(|| format!("a checkpoint without a pause: {report}"))? / 1e3,
        );
        std::fs::remove_dir_all(&alive)?;
        for (_, how, took) in &mut restored {
            let saved = cluster.lab.data_dir().join("saved");
            cluster.nmodule.api.post("/v1/vm/checkpoint", &json!({ "path": saved, "stop": true }))?;
            cluster.nmodule.daemon.wait(END_LIMIT)?;
            let (module, ready) =
                modules::restore_nmodule(&cluster.lab, &cluster.artifacts, &cluster.lab.node1, &saved, how)?;
            cluster.nmodule = module;
            took.push(ms(ready));
            // A mapped file lives on without its name.
            std::fs::remove_dir_all(&saved)?;
        }
        progress.update(&format!("{} of {samples}", i + 1));
    }
    progress.done(&format!("cold {:.1} ms, mapped {:.1} ms", median(&cold), median(&restored[0].2)));
    let row = |name: String, value| Row::alone(name, "ms", Better::Less, value, samples);
    let mut rows = vec![
        row("N-module: cold start to first NFS NULL reply, median".into(), median(&cold)),
        row("N-module: the same, worst".into(), percentile(&cold, 100)),
    ];
    for (name, _, took) in &restored {
        rows.push(row(format!("N-module: restore, memory {name}, to first NFS NULL reply, median"), median(took)));
        rows.push(row("N-module: the same, worst".into(), percentile(took, 100)));
    }
    rows.push(row("N-module: pause of a checkpoint, median".into(), median(&pauses)));
    rows.push(row("N-module: the same, worst".into(), percentile(&pauses, 100)));
    Ok(rows)
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
