//! `vmm` beside QEMU's microvm with the same guest, and beside the host without a VM.
//!
//! Always true: all sides do the same jobs on the same file in one run, taking turns, and each turn begins with another side;
//! a guest's clock is held against the host's.
mod block;
mod guest;
mod memory;
mod network;

use super::{Better, Row};
use crate::modules::{Cluster, Module};
use crate::report::{Progress, median};
use crate::setup;
use anyhow::{Context, Result};
use guest::{Guest, Machine, Monitor};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// The file the block rows are measured on: more than any cache of a disk's own, written once so that it has its blocks.
const DISK_BYTES: u64 = 512 * MIB;
const TAP: &str = "bench0";
/// After it a VMM has given back what it needed to start.
const SETTLED: Duration = Duration::from_secs(3);

/// How much is measured.
struct Effort {
    starts: usize,
    rounds: usize,
    /// Of each job of a round.
    time: Duration,
}

/// Many short rounds: where the host puts the threads and the interrupts of its disk decides on a round, and a median of few is a lottery.
const FULL: Effort = Effort { starts: 31, rounds: 15, time: Duration::from_millis(300) };
const QUICK: Effort = Effort { starts: 9, rounds: 3, time: Duration::from_millis(200) };

/// The whole benchmark; `modules` is what each module's guest has, in MiB (N-module, D-module).
pub fn run(mut cluster: Cluster, modules: [u64; 2], quick: bool) -> Result<Vec<Row>> {
    let effort = if quick { QUICK } else { FULL };
    let mut rows = of_modules(&cluster, modules)?;
    for module in [&mut cluster.nmodule, &mut cluster.dmodule] {
        module.daemon.kill()?;
    }
    let artifacts = &cluster.artifacts;
    let image = images::build_bench(&artifacts.root, images::PROFILE).context("cannot build the benchmark's image")?;
    let program = setup::block_load(&artifacts.root, cluster.lab.data_dir())?;
    let disk = cluster.lab.data_dir().join("bench.img");
    fill(&disk)?;
    let host = &cluster.lab.node1;
    network::prepare(host, TAP)?;
    let machine = Machine { vmm: &artifacts.vmm, image: &image, host, state: cluster.lab.state_dir() };

    rows.extend(starts(&machine, &disk, effort.starts)?);
    rows.extend(memory_rows(&machine, &disk, effort.time)?);
    rows.extend(block::run(&machine, &disk, &program, effort.rounds, effort.time)?);
    rows.extend(network::run(&machine, TAP, effort.rounds, effort.time)?);
    Ok(rows)
}

/// Memory of the processes that run the modules.
fn of_modules(cluster: &Cluster, memory: [u64; 2]) -> Result<Vec<Row>> {
    std::thread::sleep(SETTLED);
    let row = |name: &str, value| Row::alone(name, "MiB", Better::Less, value, 1);
    let of = |module: &Module, memory: u64| memory::beyond_guest(module.daemon.pid(), memory * MIB);
    Ok(vec![
        row(
            "memory of the N-module's vmm beyond its guest's, at rest",
            of(&cluster.nmodule, memory[0])? as f64 / MIB as f64,
        ),
        row(
            "memory of the D-module's vmm beyond its guest's, at rest",
            of(&cluster.dmodule, memory[1])? as f64 / MIB as f64,
        ),
        row("memory of the N-module", memory[0] as f64),
    ])
}

/// Gives the file content that is no zeroes, on the disk.
fn fill(path: &Path) -> Result<()> {
    let mut piece = vec![0; MIB as usize];
    File::open("/dev/urandom")?.read_exact(&mut piece)?;
    let mut file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    for _ in 0..DISK_BYTES / MIB {
        file.write_all(&piece)?;
    }
    file.sync_all().with_context(|| format!("cannot write {}", path.display()))
}

/// Both monitors, the other one first every other time.
fn in_turn(round: usize) -> [Monitor; 2] {
    let mut order = [Monitor::Ours, Monitor::Qemu];
    order.rotate_left(round % 2);
    order
}

/// From the start of the process to the guest's first instruction in ring 3.
fn starts(machine: &Machine, disk: &Path, samples: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut progress = Progress::start("vmm: start to the first ring-3 instruction");
    for (name, devices) in [("no devices", false), ("a disk and a network card", true)] {
        let mut took = [Vec::new(), Vec::new()];
        for round in 0..samples {
            for monitor in in_turn(round) {
                let (disk, tap) = if devices { (Some(disk), Some(TAP)) } else { (None, None) };
                let mut guest = Guest::start(machine, monitor, disk, tap, "")?;
                took[monitor as usize].push(guest.ring_3_after()?.as_secs_f64() * 1e3);
                guest.end()?;
            }
            progress.update(&format!("{name}: {} of {samples}", round + 1));
        }
        rows.push(Row {
            name: format!("process start to first ring-3 instruction, {name}"),
            unit: "ms",
            ours: median(&took[0]),
            peer: Some(median(&took[1])),
            better: Better::Less,
            samples,
        });
    }
    progress.done("");
    Ok(rows)
}

/// Memory of both processes as soon as their guests serve, while they wait, and when they have served.
fn memory_rows(machine: &Machine, disk: &Path, time: Duration) -> Result<Vec<Row>> {
    let mut used = [[0.0; 2]; 3];
    for monitor in in_turn(0) {
        let mut guest = Guest::start(machine, monitor, Some(disk), Some(TAP), &network::serve())?;
        guest.line("serving")?;
        let pid = guest.pid();
        let beyond = || memory::beyond_guest(pid, guest::MEMORY_MIB * MIB).map(|bytes| bytes as f64 / MIB as f64);
        used[0][monitor as usize] = beyond()?;
        std::thread::sleep(SETTLED);
        used[1][monitor as usize] = beyond()?;
        network::measure(machine, monitor, time)?;
        used[2][monitor as usize] = beyond()?;
        network::quit(machine.host)?;
        guest.end()?;
    }
    let when = ["just started", "at rest after 3 s", "after serving TCP"];
    let row = |(when, [ours, peer]): (&str, [f64; 2])| Row {
        name: format!("memory beyond the guest's, with a disk and a network card, {when}"),
        unit: "MiB",
        ours,
        peer: Some(peer),
        better: Better::Less,
        samples: 1,
    };
    Ok(when.into_iter().zip(used).map(row).collect())
}
