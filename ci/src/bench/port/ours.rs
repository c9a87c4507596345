//! Ports by our VMMs.
use super::seen::{Seen, Told};
use crate::modules::{self, Cluster, Tls};
use crate::report::{Progress, median};
use anyhow::{Context, Result};
use std::time::Duration;

/// Of so many pairs of ports, one is made without TLS as well, where that is asked for.
const PLAIN_EVERY: usize = 4;

/// `samples` ports, there and back in turn; the N-module is on `node1` before and after. `plain`: now and then a pair without TLS,
/// for comparison.
pub fn series(
    cluster: &mut Cluster,
    samples: usize,
    pause: Duration,
    how: &str,
    mut plain: Option<&mut Seen>,
    check: &mut impl FnMut() -> Result<()>,
) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut progress = Progress::start(&format!("port: {samples} ports {how}"));
    for i in 0..samples {
        one(cluster, i % 2 == 0, Tls::On, pause, &mut seen)?;
        if let Some(plain) = &mut plain
            && i % 2 == 1
            && (i / 2).is_multiple_of(PLAIN_EVERY)
        {
            one(cluster, true, Tls::Off, pause, plain)?;
            one(cluster, false, Tls::Off, pause, plain)?;
        }
        check()?;
        progress.update(&format!("{} of {samples}, median blackout {:.2} ms", i + 1, median(&seen.blackout)));
    }
    if samples % 2 == 1 {
        one(cluster, false, Tls::On, pause, &mut Seen::default())?;
    }
    progress.done(&format!("median blackout {:.2} ms", median(&seen.blackout)));
    Ok(seen)
}

/// One port with its measurements.
pub fn one(cluster: &mut Cluster, from_node: bool, tls: Tls, pause: Duration, seen: &mut Seen) -> Result<()> {
    let lab = &cluster.lab;
    let (from, to) = if from_node { (&lab.node1, &lab.client1) } else { (&lab.client1, &lab.node1) };
    let receiver = modules::receive(lab, &cluster.artifacts, to)?;
    modules::protect(lab, &cluster.artifacts, from, &cluster.nmodule, tls)?;
    modules::protect(lab, &cluster.artifacts, to, &receiver, tls)?;
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
