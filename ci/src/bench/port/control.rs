//! What stands beside a blackout: how long the same VM stands still when it is only paused and resumed, in one process.
use super::ms;
use crate::modules::Cluster;
use crate::report::{Progress, median};
use anyhow::{Context, Result};
use serde_json::json;
use std::time::Duration;

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
