//! Porting the N-module back and forth under load: blackout, as the VMMs measure it and as a client sees it, and what TCP had to send again.
use super::{Better, Row};
use crate::load::{Load, Mode};
use crate::modules::{self, Cluster, NFS, Tls};
use crate::probe::Prober;
use crate::process::Daemon;
use crate::report::{Progress, median, percentile};
use crate::{copy, tcp};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two ports, so that each meets a steady load.
const PAUSE: Duration = Duration::from_millis(400);

#[derive(Default)]
struct Seen {
    vmm: Vec<f64>,
    silence: Vec<f64>,
    quiet: Vec<f64>,
    whole: Vec<f64>,
    retransmits: Vec<f64>,
    retransmits_before: Vec<f64>,
    probes: Vec<f64>,
}

/// Ports `samples` times with TLS and as often without, to and fro in turn, while a client writes.
pub fn run(cluster: &mut Cluster, program: &Path, samples: usize) -> Result<Vec<Row>> {
    let (mut seen, mut plain) = (Seen::default(), Seen::default());
    let client = &cluster.lab.client1;
    let log = cluster.lab.state_dir().join("port-load.log");
    // Long enough for all ports; ended by us.
    let load = Load { mode: Mode::Write, request_bytes: 64 << 10, depth: 4, seconds: 3600.0, file_bytes: 64 << 20 };
    let mut writer = client.daemon("the load", &mut load.command(program, &copy::url("port-load")), &log)?;
    std::thread::sleep(PAUSE);
    let mut progress = Progress::start(&format!("port: twice {samples} ports under load"));
    let mut on_node = true;
    for i in 0..2 * samples {
        // There and back with TLS, there and back without.
        match i % 4 < 2 {
            true => one(cluster, on_node, Tls::On, &mut seen)?,
            false => one(cluster, on_node, Tls::Off, &mut plain)?,
        }
        on_node = !on_node;
        check(&mut writer)?;
        progress.update(&format!("{} of {}, median blackout {:.2} ms", i + 1, 2 * samples, median(&seen.vmm)));
    }
    if !on_node {
        one(cluster, false, Tls::On, &mut Seen::default())?;
    }
    progress.done(&format!("median blackout {:.2} ms", median(&seen.vmm)));
    let row = |name: &str, unit, value| Row::alone(name, unit, Better::Less, value, samples);
    Ok(vec![
        row("blackout measured by the VMMs, median", "ms", median(&seen.vmm)),
        row("blackout measured by the VMMs, p90", "ms", percentile(&seen.vmm, 90)),
        row("blackout measured by the VMMs, worst", "ms", percentile(&seen.vmm, 100)),
        row("longest silence for a client during a port, median", "ms", median(&seen.silence)),
        row("longest silence for a client during a port, worst", "ms", percentile(&seen.silence, 100)),
        row("longest silence for a client in the same time before it, median", "ms", median(&seen.quiet)),
        row("client retransmits, all ports together", "segments", seen.retransmits.iter().sum()),
        row("client retransmits in the 0.4 s before each port", "segments", seen.retransmits_before.iter().sum()),
        row(
            "tail loss probes sent (after a short silence, whether or not anything was lost)",
            "segments",
            seen.probes.iter().sum(),
        ),
        row("request to end of the port, median", "ms", median(&seen.whole)),
        row("without TLS: blackout measured by the VMMs, median", "ms", median(&plain.vmm)),
        row("without TLS: blackout measured by the VMMs, p90", "ms", percentile(&plain.vmm, 90)),
        row("without TLS: request to end of the port, median", "ms", median(&plain.whole)),
    ])
}

fn check(writer: &mut Daemon) -> Result<()> {
    if let Some(status) = writer.ended()? {
        bail!("the load ended with {status}{}", writer.quote_log());
    }
    Ok(())
}

/// One port with its measurements.
fn one(cluster: &mut Cluster, from_node: bool, tls: Tls, seen: &mut Seen) -> Result<()> {
    let lab = &cluster.lab;
    let (from, to) = if from_node { (&lab.node1, &lab.client1) } else { (&lab.client1, &lab.node1) };
    let receiver = modules::receive(lab, &cluster.artifacts, to)?;
    modules::protect(lab, &cluster.artifacts, from, &cluster.nmodule, tls)?;
    modules::protect(lab, &cluster.artifacts, to, &receiver, tls)?;
    let prober = Prober::start(&lab.client1, NFS.into())?;
    let client = &lab.client1;
    let (retransmits, causes) = (tcp::retransmits_to(client, *NFS.ip())?, tcp::causes(client)?);
    let began = Instant::now();
    std::thread::sleep(PAUSE);
    let so_far = tcp::retransmits_to(client, *NFS.ip())?;
    let ported = modules::port(&mut cluster.nmodule, to)?;
    std::thread::sleep(PAUSE);
    cluster.nmodule.daemon.wait(Duration::from_secs(10)).context("the source's vmm must end after a port")?;
    cluster.nmodule = receiver;
    let resent = tcp::retransmits_to(&lab.client1, *NFS.ip())?.saturating_sub(so_far);
    let now = tcp::causes(&lab.client1)?;
    let probes = now.loss_probes - causes.loss_probes;
    let log = prober.finish()?;
    let silence = log.longest_silence(ported.asked, ported.ended).context("the prober got no replies")?;
    let whole = ported.ended - ported.asked;
    if resent > 0 {
        let (fast, timeouts) = (now.fast - causes.fast, now.timeouts - causes.timeouts);
        let forwarded = &ported.job["forwarded_frames"];
        eprintln!(
            "\na port to {}: {resent} segments sent again, {probes} loss probes, {fast} fast retransmits, {timeouts} timeouts; \
             blackout {:.2} ms, silence {:.2} ms, {forwarded} frames forwarded",
            to.name,
            ms(ported.blackout()?),
            ms(silence),
        );
    }
    // As long before the port as the port took, as far as the prober goes back.
    let quiet_from = ported.asked.checked_sub(whole).unwrap_or(began).max(began);
    seen.quiet.push(log.longest_silence(quiet_from, ported.asked).map_or(0.0, ms));
    seen.vmm.push(ms(ported.blackout()?));
    seen.silence.push(ms(silence));
    seen.whole.push(ms(whole));
    seen.retransmits.push(resent as f64);
    seen.retransmits_before.push(so_far.saturating_sub(retransmits) as f64);
    seen.probes.push(probes as f64);
    Ok(())
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
