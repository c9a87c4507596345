//! Very many ports to and fro under a load that is verified: nothing may be lost, and nothing may grow.
use super::port::{Around, MEMORY, USUAL, one};
use super::{Better, Row};
use crate::load::SyncFill;
use crate::modules::{self, Cluster, Module};
use crate::report::{Progress, median, percentile};
use crate::{bench::port::Seen, copy};
use anyhow::{Context, Result};
use std::path::Path;
use std::time::Duration;

/// Written, acknowledged piece by piece and read back again and again.
const FILE_BYTES: u64 = 256 << 20;
/// Before and after a port.
const AROUND: Around = Around { pause: Duration::from_millis(10), record: None };
/// After so many ports everything that is only made once has been made: growth is counted from there.
const WARM_UP: usize = 20;

/// What a `vmm` process holds.
#[derive(Clone, Copy, Debug)]
struct Holds {
    /// Resident memory beyond that of the guest, in KiB.
    overhead_kib: f64,
    descriptors: f64,
    threads: f64,
}

impl Holds {
    fn of(module: &Module) -> Result<Holds> {
        let pid = module.daemon.pid();
        let entries = |what: &str| -> Result<f64> {
            let dir = format!("/proc/{pid}/{what}");
            Ok(std::fs::read_dir(&dir).with_context(|| format!("cannot read {dir}"))?.count() as f64)
        };
        let overhead = module.api.get("/v1/vm")?["memory"]["overhead_bytes"].as_f64().context("no overhead_bytes")?;
        Ok(Holds { overhead_kib: overhead / 1024.0, descriptors: entries("fd")?, threads: entries("task")? })
    }
}

/// Ports `ports` times.
pub fn run(cluster: &mut Cluster, program: &Path, ports: usize) -> Result<Vec<Row>> {
    cluster.nmodule.daemon.kill()?;
    let (module, _) = modules::start_nmodule_with(&cluster.lab, &cluster.artifacts, &cluster.lab.node1, MEMORY)?;
    cluster.nmodule = module;
    let mut seen = Seen::default();
    let mut load = start(cluster, program, 1)?;
    let (mut verified, mut warm) = (0, None);
    let mut progress = Progress::start(&format!("soak: {ports} ports under verified load"));
    for i in 0..ports {
        one(cluster, i % 2 == 0, USUAL, AROUND, &mut seen)?;
        if i + 1 == WARM_UP.min(ports) {
            warm = Some([Holds::of(&cluster.dmodule)?, Holds::of(&cluster.nmodule)?]);
        }
        if load.is_over()? {
            let next = load.pass() + 1;
            verified += verify(load, program, cluster)?;
            load = start(cluster, program, next)?;
        }
        let so_far = median(&seen.blackout);
        progress.update(&format!("{} of {ports}, {verified} pieces read back, median blackout {so_far:.2} ms", i + 1));
    }
    let cold = [Holds::of(&cluster.dmodule)?, Holds::of(&cluster.nmodule)?];
    verified += verify(load, program, cluster)?;
    progress.done(&format!("{verified} pieces read back, none lost"));
    let warm = warm.context("no port was measured")?;
    let row = |name: String, unit, value| Row::alone(name, unit, Better::Less, value, ports);
    let mut rows = vec![
        Row::alone(
            "pieces of 64 KiB acknowledged as stable, read back and right",
            "pieces",
            Better::More,
            verified as f64,
            ports,
        ),
        row("requests of a prober that were not answered".into(), "requests", seen.failed),
        row("client retransmits, all ports together".into(), "segments", seen.retransmits.iter().sum()),
        row("blackout, median".into(), "ms", median(&seen.blackout)),
        row("blackout, p99".into(), "ms", percentile(&seen.blackout, 99)),
        row("blackout, worst".into(), "ms", percentile(&seen.blackout, 100)),
    ];
    for (who, (before, after)) in ["D-module", "N-module"].iter().zip(warm.iter().zip(&cold)) {
        let of = |what| format!("{who}'s vmm, from the {WARM_UP}th port to the last: {what}");
        rows.extend([
            row(of("growth of memory beyond the guest's"), "KiB", after.overhead_kib - before.overhead_kib),
            row(of("growth of open descriptors"), "", after.descriptors - before.descriptors),
            row(of("growth of threads"), "", after.threads - before.threads),
        ]);
    }
    Ok(rows)
}

/// Writes the file once more, with other bytes.
fn start(cluster: &Cluster, program: &Path, pass: u64) -> Result<SyncFill> {
    let lab = &cluster.lab;
    SyncFill::start(program, &lab.client1, &copy::url("soak"), FILE_BYTES, pass, lab.state_dir())
}

/// Waits for the end of a load and reads back what was acknowledged; fails if a piece is not what was written. How many pieces.
fn verify(load: SyncFill, program: &Path, cluster: &Cluster) -> Result<usize> {
    let lab = &cluster.lab;
    let (url, pass) = (load.url().to_owned(), load.pass());
    let acknowledged = load.finish()?;
    SyncFill::verify(program, &lab.client1, &url, pass, &acknowledged, lab.state_dir())?;
    Ok(acknowledged.len())
}
