//! Ports by our VMMs.
use super::seen::{Seen, Told};
use crate::modules::{self, Cluster};
use crate::report::{Progress, median};
use anyhow::{Context, Result};
use std::time::Duration;

/// `samples` ports, there and back in turn; the N-module is on `node1` before and after.
pub fn series(
    cluster: &mut Cluster,
    samples: usize,
    pause: Duration,
    how: &str,
    check: &mut impl FnMut() -> Result<()>,
) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut progress = Progress::start(&format!("port: {samples} ports {how}"));
    for i in 0..samples {
        one(cluster, i % 2 == 0, pause, &mut seen)?;
        check()?;
        progress.update(&format!("{} of {samples}, median blackout {:.2} ms", i + 1, median(&seen.blackout)));
    }
    if samples % 2 == 1 {
        one(cluster, false, pause, &mut Seen::default())?;
    }
    progress.done(&format!("median blackout {:.2} ms", median(&seen.blackout)));
    Ok(seen)
}

/// One port with its measurements.
pub fn one(cluster: &mut Cluster, from_node: bool, pause: Duration, seen: &mut Seen) -> Result<()> {
    let lab = &cluster.lab;
    let to = if from_node { &lab.client1 } else { &lab.node1 };
    let receiver = modules::receive(lab, &cluster.artifacts, to)?;
    let nmodule = &mut cluster.nmodule;
    seen.watch(&lab.client1, pause, || {
        let ported = modules::port(nmodule, to)?;
        let remark = format!("to {}, {} frames forwarded", to.name, ported.job["forwarded_frames"]);
        // All but the first, which is over when the blackout begins.
        let breakdown = ported.job["breakdown"].as_object().context("the job has no breakdown")?;
        let steps = breakdown
            .iter()
            .filter(|(name, _)| *name != "stop_us")
            .filter_map(|(name, us)| Some((name.trim_end_matches("_us").to_owned(), us.as_f64()? / 1e3)));
        let steps = steps.collect();
        Ok(Told { asked: ported.asked, ended: ported.ended, blackout: ported.blackout()?, steps, remark })
    })?;
    cluster.nmodule.daemon.wait(Duration::from_secs(10)).context("the source's vmm must end after a port")?;
    cluster.nmodule = receiver;
    Ok(())
}
