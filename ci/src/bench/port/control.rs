//! What stands beside a port: how long the same VM stands still when it is only paused and resumed, in one process; and what becomes of a
//! client when nothing is ported and the processors are busy: more so than by a port, whose threads also wait for each other.
use super::ms;
use super::ours::Around;
use super::seen::{Seen, Told};
use crate::modules::Cluster;
use crate::report::{Progress, median};
use anyhow::{Context, Result};
use serde_json::json;
use std::time::{Duration, Instant};

/// Between two pauses.
const BETWEEN: Duration = Duration::from_millis(20);

/// `samples` pauses, each ended by a resume as soon as it is answered; from last exit to first entry, in milliseconds.
pub fn series(cluster: &Cluster, samples: usize) -> Result<Vec<f64>> {
    let api = &cluster.nmodule.api;
    let progress = Progress::start("port: pauses on one host");
    let mut values = Vec::new();
    for _ in 0..samples {
        api.put("/v1/vm/pause", &json!({}))?;
        api.put("/v1/vm/resume", &json!({}))?;
        std::thread::sleep(BETWEEN);
        let us =
            api.get("/v1/vm")?["stood_still_us"].as_u64().context("the vmm does not say how long it stood still")?;
        values.push(ms(Duration::from_micros(us)));
    }
    progress.done(&format!("median {:.2} ms", median(&values)));
    Ok(values)
}

/// Threads of a port that compute while the guest runs: the source's and the destination's.
const THREADS: usize = 2;

/// `samples` times, in the place of a port, as many threads as it has compute for `length` without a pause.
pub fn busy(cluster: &Cluster, samples: usize, around: Around, length: Duration) -> Result<Seen> {
    let mut seen = Seen::default();
    let progress = Progress::start("port: no ports, but threads that compute");
    for _ in 0..samples {
        seen.watch(&cluster.lab.client1, Around { record: None, ..around }, || {
            let asked = Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| while asked.elapsed() < length {});
                }
            });
            Ok(Told { remark: "no port".into(), ..Told::nothing(asked) })
        })?;
    }
    progress.done(&format!("median silence {:.2} ms", median(&seen.silence)));
    Ok(seen)
}
