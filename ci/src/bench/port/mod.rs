//! Porting the N-module back and forth: blackout, as the VMMs measure it and as a client sees it, and what TCP had to send again;
//! beside it QEMU with the same image, load and network, and a pause and resume on one host.
//!
//! Always true: all of it happens in one run on one lab; each port of either side ends in a process that was started for it, and
//! alternates the direction.
mod control;
mod ours;
mod qemu;
mod record;
mod seen;

use super::{Better, Row};
use crate::load::{Load, Mode};
use crate::modules::{self, Cluster};
use crate::process::Daemon;
use crate::report::percentile;
use crate::{copy, steal};
use anyhow::{Result, bail};
use ours::Others;
pub(super) use ours::{Around, USUAL, one};
use record::Record;
pub(super) use seen::Seen;
use std::path::Path;
use std::time::Duration;

/// Memory of the N-module that is ported.
pub(super) const MEMORY: &str = "64M";
/// Before and after a port under load, so that each meets a steady load.
const LOADED_PAUSE: Duration = Duration::from_millis(400);
/// The same of an idle N-module.
const IDLE_PAUSE: Duration = Duration::from_millis(50);

/// How often each thing is measured.
#[derive(Clone, Copy, Debug)]
pub struct Samples {
    /// Ports of ours, under load and idle; pauses.
    pub ours: usize,
    /// Migrations by QEMU, with each of two settings.
    pub qemu: usize,
}

/// Measures all of it.
pub fn run(cluster: &mut Cluster, program: &Path, samples: Samples) -> Result<Vec<Row>> {
    cluster.nmodule.daemon.kill()?;
    let (module, _) = modules::start_nmodule_with(&cluster.lab, &cluster.artifacts, &cluster.lab.node1, MEMORY)?;
    cluster.nmodule = module;
    let before = steal::now()?;

    let record = Record::start().inspect_err(|e| eprintln!("no figures by the kernel's record: {e:#}")).ok();
    let around = |pause| Around { pause, record: record.as_ref() };

    let mut writer = start_load(cluster, program)?;
    let mut others = Others::default();
    let loaded =
        ours::series(cluster, samples.ours, around(LOADED_PAUSE), "under load", Some(&mut others), &mut || {
            check(&mut writer)
        })?;
    let pauses = control::series(cluster, samples.ours)?;
    let length = Duration::from_secs_f64(percentile(&loaded.whole, 50) / 1e3);
    let busy = control::busy(cluster, samples.ours, around(LOADED_PAUSE), length)?;
    check(&mut writer)?;
    writer.kill()?;
    let idle = ours::series(cluster, samples.ours, around(IDLE_PAUSE), "idle", None, &mut || Ok(()))?;
    let stolen = before.share_until(&steal::now()?);

    cluster.nmodule.daemon.kill()?;
    let qemu = qemu::series(cluster, program, samples.qemu, record.as_ref())?;

    let mut rows = series_rows("N-module of 64 MiB under load", &loaded);
    rows.extend(series_rows("N-module of 64 MiB idle", &idle));
    for (way, seen) in [("without TLS", &others.plain), ("with a digest of all memory", &others.verified)] {
        let row = |name: &str, value| {
            let name = format!("N-module of 64 MiB under load, {way}: {name}");
            Row::alone(name, "ms", Better::Less, value, seen.blackout.len())
        };
        rows.extend([
            row("blackout, median", percentile(&seen.blackout, 50)),
            row("blackout, p90", percentile(&seen.blackout, 90)),
            row("request to end of the port, median", percentile(&seen.whole, 50)),
        ]);
    }
    rows.extend(spread("pause and resume of it on one host under load, through the API", &pauses));
    rows.extend(busy_rows(&busy));
    let alone = |name: &str, unit, value, n| Row::alone(name, unit, Better::Less, value, n);
    rows.extend([
        alone("requests that failed or were not answered, all ports together", "requests", loaded.failed, samples.ours),
        alone("processor time stolen from this machine meanwhile", "%", stolen * 100.0, 1),
    ]);
    rows.extend(qemu::rows(&loaded, &qemu));
    Ok(rows)
}

/// A client that writes for as long as it lives.
pub(super) fn start_load(cluster: &Cluster, program: &Path) -> Result<Daemon> {
    let log = cluster.lab.state_dir().join("port-load.log");
    let load = Load { mode: Mode::Write, request_bytes: 64 << 10, depth: 4, seconds: 36000.0, file_bytes: 64 << 20 };
    let daemon = cluster.lab.client1.daemon("the load", &mut load.command(program, &copy::url("port-load")), &log)?;
    std::thread::sleep(LOADED_PAUSE);
    Ok(daemon)
}

/// That it still writes.
pub(super) fn check(writer: &mut Daemon) -> Result<()> {
    if let Some(status) = writer.ended()? {
        bail!("the load ended with {status}{}", writer.quote_log());
    }
    Ok(())
}

/// Minimum, median and the upper end of a blackout.
fn spread(what: &str, values: &[f64]) -> Vec<Row> {
    [("minimum", 1), ("median", 50), ("p90", 90), ("p99", 99), ("worst", 100)]
        .map(|(name, percent)| {
            // The nearest rank of one percent is not the first of more than a hundred.
            let value = if percent == 1 {
                values.iter().copied().fold(f64::MAX, f64::min)
            } else {
                percentile(values, percent)
            };
            Row::alone(format!("{what}, {name}"), "ms", Better::Less, value, values.len())
        })
        .into()
}

fn series_rows(what: &str, seen: &Seen) -> Vec<Row> {
    let n = seen.blackout.len();
    let mut rows = spread(&format!("{what}: blackout"), &seen.blackout);
    let row = |name: &str, unit, value| Row::alone(format!("{what}: {name}"), unit, Better::Less, value, n);
    for (i, (step, _)) in seen.steps.first().into_iter().flatten().enumerate() {
        let values: Vec<f64> = seen.steps.iter().filter_map(|port| Some(port.get(i)?.1)).collect();
        rows.push(row(&format!("of the blackout, step `{step}`, median"), "ms", percentile(&values, 50)));
    }
    if !seen.lulls.is_empty() {
        let waited: Vec<f64> = seen.lulls.iter().map(|lull| lull.waited).collect();
        let answered = seen.lulls.iter().filter(|lull| lull.answered).count();
        rows.push(row("waited for a lull before the pause, median", "ms", percentile(&waited, 50)));
        let name = format!("{what}: ports whose guest had come to one by then");
        rows.push(Row::alone(name, "ports", Better::More, answered as f64, n));
    }
    for (place, mib) in ["in receive buffers", "in free pages"].into_iter().zip(&seen.skipped) {
        let name = format!("{what}: without content and not sent, {place}, median");
        rows.push(Row::alone(name, "MiB", Better::More, percentile(mib, 50), n));
    }
    rows.extend([
        row("longest silence for a client during a port, median", "ms", percentile(&seen.silence, 50)),
        row("longest silence for a client during a port, worst", "ms", percentile(&seen.silence, 100)),
        row("longest silence in the same time before it, median", "ms", percentile(&seen.quiet, 50)),
        row(
            "client retransmits until 20 ms after a port's end, all ports together",
            "segments",
            seen.retransmits_at_once.iter().sum(),
        ),
        row(
            "client retransmits until as long after it as before it, all ports together",
            "segments",
            seen.retransmits.iter().sum(),
        ),
        row(
            "client retransmits from the lull before the pause until 20 ms behind it, all ports together",
            "segments",
            seen.retransmits_of_pause.iter().sum(),
        ),
        row("client retransmits before each port, together", "segments", seen.retransmits_before.iter().sum()),
        row("tail loss probes (whether or not anything was lost), together", "segments", seen.probes.iter().sum()),
        row("sent a port, median", "MiB", percentile(&seen.sent, 50)),
        row("sent a port, most", "MiB", percentile(&seen.sent, 100)),
        row("request to end of the port, median", "ms", percentile(&seen.whole, 50)),
        row("request to end of the port, p99", "ms", percentile(&seen.whole, 99)),
        row("request to end of the port, worst", "ms", percentile(&seen.whole, 100)),
    ]);
    if !seen.heir.is_empty() {
        rows.extend([
            row("of that, the arbiter's disk before the rounds, median", "ms", percentile(&seen.heir, 50)),
            row("of that, the arbiter's disk before the rounds, worst", "ms", percentile(&seen.heir, 100)),
        ]);
    }
    rows
}

/// What belongs beside the same rows of ports under load.
fn busy_rows(seen: &Seen) -> [Row; 5] {
    let n = seen.silence.len();
    let row = |name: &str, unit, value| {
        let name = format!("no port, but two threads that compute for as long, under load: {name}");
        Row::alone(name, unit, Better::Less, value, n)
    };
    [
        row("longest silence for a client meanwhile, median", "ms", percentile(&seen.silence, 50)),
        row("longest silence for a client meanwhile, worst", "ms", percentile(&seen.silence, 100)),
        row("client retransmits until 20 ms after it, together", "segments", seen.retransmits_at_once.iter().sum()),
        row(
            "client retransmits until as long after it as before it, together",
            "segments",
            seen.retransmits.iter().sum(),
        ),
        row("tail loss probes, together", "segments", seen.probes.iter().sum()),
    ]
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
