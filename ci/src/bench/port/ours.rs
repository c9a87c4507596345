//! Ports by our VMMs.
use super::record::{self, Record};
use super::seen::{Lull, Seen, Told};
use crate::modules::{self, Cluster, Tls};
use crate::report::{Progress, median};
use anyhow::{Context, Result};
use std::time::Duration;

/// Of so many pairs of ports, one is made in each of the other ways as well, where that is asked for.
const OTHERS_EVERY: usize = 4;

/// How a port is made.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Whether it is encrypted.
    pub tls: Tls,
    /// Whether a digest of all memory is compared before the VM runs.
    pub verify: bool,
}

/// As always.
pub const USUAL: How = How { tls: Tls::On, verify: false };

/// What stays the same in a series of ports.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    /// Before and after each.
    pub pause: Duration,
    /// What the kernel has to say of each.
    pub record: Option<&'a Record>,
}

/// Ports in other ways than the usual one, for comparison.
#[derive(Default)]
pub struct Others {
    /// Without TLS.
    pub plain: Seen,
    /// With a digest of all memory.
    pub verified: Seen,
}

/// `samples` ports, there and back in turn; the N-module is on `node1` before and after. `others`: now and then a pair in each of the
/// other ways.
pub fn series(
    cluster: &mut Cluster,
    samples: usize,
    around: Around,
    how: &str,
    mut others: Option<&mut Others>,
    check: &mut impl FnMut() -> Result<()>,
) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut progress = Progress::start(&format!("port: {samples} ports {how}"));
    for i in 0..samples {
        one(cluster, i % 2 == 0, USUAL, around, &mut seen)?;
        if let Some(Others { plain, verified }) = others.as_deref_mut()
            && i % 2 == 1
            && (i / 2).is_multiple_of(OTHERS_EVERY)
        {
            let ways = [(How { tls: Tls::Off, ..USUAL }, plain), (How { verify: true, ..USUAL }, verified)];
            for (how, seen) in ways {
                one(cluster, true, how, around, seen)?;
                one(cluster, false, how, around, seen)?;
            }
        }
        check()?;
        progress.update(&format!("{} of {samples}, median blackout {:.2} ms", i + 1, median(&seen.blackout)));
    }
    if samples % 2 == 1 {
        one(cluster, false, USUAL, around, &mut Seen::default())?;
    }
    progress.done(&format!("median blackout {:.2} ms", median(&seen.blackout)));
    Ok(seen)
}

/// One port with its measurements.
pub fn one(cluster: &mut Cluster, from_node: bool, how: How, around: Around, seen: &mut Seen) -> Result<()> {
    let lab = &cluster.lab;
    let (from, to) = if from_node { (&lab.node1, &lab.client1) } else { (&lab.client1, &lab.node1) };
    let receiver = modules::receive(lab, &cluster.artifacts, to)?;
    modules::protect(lab, &cluster.artifacts, from, &cluster.nmodule, how.tls)?;
    modules::protect(lab, &cluster.artifacts, to, &receiver, how.tls)?;
    let nmodule = &mut cluster.nmodule;
    let threads = record::threads(nmodule.daemon.pid())?;
    seen.watch(&lab.client1, around, || {
        around.record.map_or(Ok(()), Record::clear)?;
        let ported = modules::port_as(nmodule, to, how.verify)?;
        let recorded = around.record.map(|r| r.gap(&threads, &record::threads(receiver.daemon.pid())?));
        let remark = format!("to {}: {}", to.name, ported.job);
        // All but the first, which is over when the blackout begins.
        let breakdown = ported.job["breakdown"].as_object().context("the job has no breakdown")?;
        let steps = breakdown
            .iter()
            .filter(|(name, _)| *name != "stop_us")
            .filter_map(|(name, us)| Some((name.trim_end_matches("_us").to_owned(), us.as_f64()? / 1e3)));
        let steps = steps.collect();
        let number = |name: &str| ported.job[name].as_u64().with_context(|| format!("the job has no {name}"));
        Ok(Told {
            asked: ported.asked,
            ended: ported.ended,
            blackout: ported.blackout()?,
            recorded: recorded.transpose()?,
            sent: number("bytes")?,
            skipped: [number("posted_pages")?, number("free_pages")?],
            steps,
            lull: Lull::of(&ported.job["lull"]),
            heir: ported.job["heir_us"].as_f64().map(|us| us / 1e3),
            remark,
        })
    })?;
    cluster.nmodule.daemon.wait(Duration::from_secs(10)).context("the source's vmm must end after a port")?;
    cluster.nmodule = receiver;
    Ok(())
}
