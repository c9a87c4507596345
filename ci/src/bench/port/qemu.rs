//! The same image, load and network with QEMU's microvm on the same KVM: its live migration between two processes.
//!
//! Twice: with what QEMU allows itself unless told otherwise (a downtime of up to 300 ms), and told to aim at 1 ms with as
//! much bandwidth as there is.
use super::record::{self, Record};
use super::seen::{Seen, Told};
use super::{Around, LOADED_PAUSE, check, start_load};
use crate::bench::{Better, Row};
use crate::lab::{Host, Lab};
use crate::modules::{self, Cluster, NFS, NMODULE_MAC, NMODULE_VM_ID};
use crate::probe;
use crate::process::Daemon;
use crate::qmp::Qmp;
use crate::report::{Progress, median, percentile};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Where the receiving QEMU listens.
const PORT: u16 = 7001;
const TAP: &str = "qemu";
const MEMORY_MIB: u32 = 64;
/// A QEMU that does not serve, or a migration that has not ended by then, has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// How often the state of a migration is asked for.
const POLL: Duration = Duration::from_millis(2);

/// How QEMU is told to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    /// As it comes.
    Default,
    /// `downtime-limit` 1 ms, `max-bandwidth` without bound.
    Tuned,
}

/// What both settings gave.
pub struct Both {
    default: Seen,
    tuned: Seen,
}

struct Guest {
    daemon: Daemon,
    qmp: Qmp,
}

/// `samples` migrations with each setting, in turn, under the same load as ours.
pub fn series(cluster: &Cluster, program: &Path, samples: usize, record: Option<&Record>) -> Result<Both> {
    let lab = &cluster.lab;
    for host in [&lab.node1, &lab.client1] {
        host.add_tap(TAP)?;
    }
    let mut guest = start(lab, cluster, &lab.node1, 0, None)?;
    probe::first_reply(&lab.client1, NFS, LIMIT, &AtomicBool::new(false))
        .with_context(|| format!("the N-module under QEMU does not serve{}", guest.daemon.quote_log()))?;
    let mut writer = start_load(cluster, program)?;
    let mut both = Both { default: Seen::default(), tuned: Seen::default() };
    let mut progress = Progress::start(&format!("port: {samples} migrations by QEMU with each of two settings"));
    for i in 0..2 * samples {
        // Each setting in both directions.
        let (to, setting) = (
            if i % 2 == 0 { &lab.client1 } else { &lab.node1 },
            if i / 2 % 2 == 0 { Setting::Default } else { Setting::Tuned },
        );
        let receiver = start(lab, cluster, to, i + 1, Some(to))?;
        let seen = if setting == Setting::Default { &mut both.default } else { &mut both.tuned };
        let threads = record::threads(guest.daemon.pid())?;
        seen.watch(&lab.client1, Around { pause: LOADED_PAUSE, record }, || {
            record.map_or(Ok(()), Record::clear)?;
            let told = migrate(&mut guest, to, setting)?;
            let recorded = record.map(|r| r.gap(&threads, &record::threads(receiver.daemon.pid())?));
            Ok(Told { recorded: recorded.transpose()?, ..told })
        })?;
        guest.daemon.kill()?;
        guest = receiver;
        check(&mut writer)?;
        progress.update(&format!("{} of {}", i + 1, 2 * samples));
    }
    writer.kill()?;
    guest.daemon.kill()?;
    let medians = (median(&both.default.silence), median(&both.tuned.silence));
    progress.done(&format!("median silence {:.1} ms, told to be quick {:.1} ms", medians.0, medians.1));
    Ok(both)
}

fn start(lab: &Lab, cluster: &Cluster, host: &Host, number: usize, incoming: Option<&Host>) -> Result<Guest> {
    let socket = lab.state_dir().join(format!("qemu{number}.qmp"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "microvm,x-option-roms=off,acpi=off", "-global", "virtio-mmio.force-legacy=off", "-accel", "kvm"]);
    qemu.args(["-cpu", "host,-arch-capabilities", "-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config"]);
    qemu.args(["-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(&cluster.artifacts.images.nmodule);
    qemu.args(["-append", &format!("{} vm_id={NMODULE_VM_ID}", modules::nmodule_cmdline())]);
    qemu.args(["-netdev", &format!("tap,id=net0,ifname={TAP},script=no,downscript=no")]);
    qemu.args(["-device", &format!("virtio-net-device,netdev=net0,mac={NMODULE_MAC}")]);
    qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    if let Some(host) = incoming {
        qemu.args(["-incoming", &format!("tcp:{}:{PORT}", host.ip)]);
    }
    let mut daemon = host.daemon("QEMU", &mut qemu, &lab.state_dir().join(format!("qemu{number}.log")))?;
    // The socket is there before anybody listens.
    let mut qmp = None;
    daemon.wait_until("answering on its monitor", LIMIT, || {
        qmp = Qmp::connect(&socket).ok();
        qmp.is_some()
    })?;
    let qmp = qmp.context("QEMU's monitor does not answer")?;
    Ok(Guest { daemon, qmp })
}

fn migrate(guest: &mut Guest, to: &Host, setting: Setting) -> Result<Told> {
    if setting == Setting::Tuned {
        let wanted = json!({ "downtime-limit": 1, "max-bandwidth": 100u64 << 30 });
        guest.qmp.execute("migrate-set-parameters", wanted)?;
    }
    let asked = Instant::now();
    guest.qmp.execute("migrate", json!({ "uri": format!("tcp:{}:{PORT}", to.ip) }))?;
    loop {
        let status = guest.qmp.execute("query-migrate", json!({}))?;
        match status["status"].as_str() {
            Some("completed") => {
                let blackout = Duration::from_millis(status["downtime"].as_u64().context("no downtime")?);
                return Ok(Told {
                    asked,
                    ended: Instant::now(),
                    blackout,
                    recorded: None,
                    sent: status["ram"]["transferred"].as_u64().context("no bytes transferred")?,
                    skipped: [0; 2],
                    steps: Vec::new(),
                    lull: None,
                    heir: None,
                    remark: format!("QEMU to {}", to.name),
                });
            }
            Some("failed" | "cancelled") => bail!("QEMU's migration failed: {status}{}", guest.daemon.quote_log()),
            _ if asked.elapsed() > LIMIT => bail!("QEMU's migration does not end: {status}"),
            _ => std::thread::sleep(POLL),
        }
    }
}

/// Ours beside both.
pub fn rows(ours: &Seen, qemu: &Both) -> Vec<Row> {
    let mut rows = Vec::new();
    for (how, peer) in [("QEMU", &qemu.default), ("QEMU told to aim at 1 ms", &qemu.tuned)] {
        let mut row = |name: &str, unit, ours: f64, theirs: f64| {
            let name = format!("beside {how}, under load: {name}");
            rows.push(Row { name, unit, ours, peer: Some(theirs), better: Better::Less, samples: peer.blackout.len() });
        };
        row(
            "blackout by its own account (QEMU's in whole ms), median",
            "ms",
            median(&ours.blackout),
            median(&peer.blackout),
        );
        row("blackout by its own account, p90", "ms", percentile(&ours.blackout, 90), percentile(&peer.blackout, 90));
        if !(ours.recorded.is_empty() || peer.recorded.is_empty()) {
            let mut recorded = |name: &str, percent| {
                let (ours, theirs) = (percentile(&ours.recorded, percent), percentile(&peer.recorded, percent));
                row(&format!("blackout by the kernel's record, {name}"), "ms", ours, theirs);
            };
            recorded("median", 50);
            recorded("p90", 90);
        }
        row("longest silence for a client, median", "ms", median(&ours.silence), median(&peer.silence));
        row("longest silence for a client, p90", "ms", percentile(&ours.silence, 90), percentile(&peer.silence, 90));
        row("request to end, median", "ms", median(&ours.whole), median(&peer.whole));
        row("sent a port, median", "MiB", median(&ours.sent), median(&peer.sent));
        let per_port = |seen: &Seen| seen.retransmits.iter().sum::<f64>() / seen.retransmits.len().max(1) as f64;
        row("client retransmits a port", "segments", per_port(ours), per_port(peer));
    }
    rows
}
