//! From the start of a `vmm` process to the first NFS reply of an N-module: from a checkpoint, beside a cold start; and what
//! checkpoints of an N-module under load cost it.
use super::port::{MEMORY, check, start_load};
use super::{Better, Row};
use crate::modules::{self, Cluster};
use crate::report::{Progress, median, percentile};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// An ended VM's process is waited for.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Between checkpoints under load, so that each meets a steady load.
const LOADED_PAUSE: Duration = Duration::from_millis(400);
const MIB: f64 = 1_048_576.0;

/// Starts the N-module cold, then from a checkpoint of what it had become, mapped and read, in turn, `samples` times. A checkpoint of a VM with
/// an ownership record can be restored once, so each restore has its own.
pub fn run(cluster: &mut Cluster, program: &Path, samples: usize) -> Result<Vec<Row>> {
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
    rows.extend(under_load(cluster, program, samples)?);
    Ok(rows)
}

/// Checkpoints of an N-module whose clients write: whole ones, and one behind each that has what has changed since.
fn under_load(cluster: &mut Cluster, program: &Path, samples: usize) -> Result<Vec<Row>> {
    cluster.nmodule.daemon.kill()?;
    let (module, _) = modules::start_nmodule_with(&cluster.lab, &cluster.artifacts, &cluster.lab.node1, MEMORY)?;
    cluster.nmodule = module;
    let mut writer = start_load(cluster, program)?;
    let mut progress = Progress::start("restore: checkpoints under load");
    let mut kinds = [("whole checkpoint", Taken::default()), ("incremental checkpoint", Taken::default())];
    let (base, next) = (cluster.lab.data_dir().join("loaded"), cluster.lab.data_dir().join("loaded-next"));
    for i in 0..samples {
        let requests =
            [json!({ "path": base, "track": true }), json!({ "path": next, "parent": base, "track": false })];
        for ((_, taken), request) in kinds.iter_mut().zip(requests) {
            std::thread::sleep(LOADED_PAUSE);
            taken.add(&cluster.nmodule.api.post("/v1/vm/checkpoint", &request)?)?;
        }
        check(&mut writer)?;
        std::fs::remove_dir_all(&base)?;
        std::fs::remove_dir_all(&next)?;
        progress.update(&format!("{} of {samples}", i + 1));
    }
    writer.kill()?;
    progress.done(&format!("median pause {:.2} ms", median(&kinds[0].1.pause)));
    Ok(kinds.iter().flat_map(|(kind, taken)| taken.rows(kind)).collect())
}

/// Checkpoints of one kind.
#[derive(Default)]
struct Taken {
    /// How long the guest stood still, in milliseconds.
    pause: Vec<f64>,
    /// From the order to the end, in milliseconds.
    whole: Vec<f64>,
    /// Written, in MiB.
    size: Vec<f64>,
}

impl Taken {
    fn add(&mut self, report: &Value) -> Result<()> {
        let number =
            |name: &str| report[name].as_f64().with_context(|| format!("a checkpoint without {name}: {report}"));
        self.pause.push(number("pause_us")? / 1e3);
        self.whole.push(number("elapsed_us")? / 1e3);
        self.size.push(number("bytes")? / MIB);
        Ok(())
    }

    fn rows(&self, kind: &str) -> Vec<Row> {
        let row = |what: &str, unit, value| {
            let name = format!("N-module of 64 MiB under load, {kind}: {what}");
            Row::alone(name, unit, Better::Less, value, self.pause.len())
        };
        vec![
            row("pause, median", "ms", median(&self.pause)),
            row("pause, worst", "ms", percentile(&self.pause, 100)),
            row("request to end, median", "ms", median(&self.whole)),
            row("written, median", "MiB", median(&self.size)),
        ]
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
