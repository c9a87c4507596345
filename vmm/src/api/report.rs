//! What `GET /v1/vm` and `GET /v1/metrics` say.

use std::fs;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use schemars::JsonSchema;
use serde::Serialize;

use crate::config::{Config, MacAddress};
use crate::control::Control;
use crate::metrics::Exposition;
use crate::port::destination::Shown;
use crate::stats::Stats;
use crate::virtio::Device;
use crate::vm::{Phase, Vm};

/// Memory of this process in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Resident {
    /// All of it.
    total: u64,
    /// Of guest memory.
    guest: u64,
}

/// Where guest memory is in this process.
fn guest_ranges(vm: Option<&Vm>) -> Vec<Range<u64>> {
    let regions = vm.into_iter().flat_map(|vm| vm.memory().regions());
    regions.map(|r| r.host as u64..r.host as u64 + r.len as u64).collect()
}

/// Reads the kernel's account of this process's mappings.
fn resident(guest: &[Range<u64>]) -> Resident {
    fs::read_to_string("/proc/self/smaps").map_or_else(|_| Resident::default(), |text| sum(&text, guest))
}

fn sum(smaps: &str, guest: &[Range<u64>]) -> Resident {
    let mut out = Resident::default();
    let mut in_guest = false;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            out.total += kib << 10;
            if in_guest {
                out.guest += kib << 10;
            }
        } else if let Some((range, _)) = line.split_once(' ')
            && let Some((start, end)) = range.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            in_guest = guest.iter().any(|g| g.start < end && start < g.end);
        }
    }
    out
}

fn ms(us: &AtomicU64) -> Option<f64> {
    match us.load(Ordering::Relaxed) {
        0 => None,
        us => Some(us as f64 / 1000.0),
    }
}

/// State of this process and its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Waits for a configuration.
    Unconfigured,
    /// Has a configuration and waits to be booted.
    Configured,
    /// Waits for a VM that is ported here.
    Receiving,
    /// The VM is built.
    Created,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped and can be continued.
    Paused,
    /// Over.
    Ended,
}

impl State {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            State::Unconfigured => "unconfigured",
            State::Configured => "configured",
            State::Receiving => "receiving",
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Ended => "ended",
        }
    }
}

/// State of the process.
pub fn state(control: &Control) -> State {
    match (control.vm().map(|vm| vm.phase()), control.awaits_boot()) {
        (Some(Phase::Created), _) => State::Created,
        (Some(Phase::Running), _) => State::Running,
        (Some(Phase::Paused), _) => State::Paused,
        (Some(Phase::Ended), _) => State::Ended,
        (None, Some(true)) => State::Configured,
        (None, Some(false)) => State::Unconfigured,
        (None, None) => State::Receiving,
    }
}

/// Milliseconds from the start of the process.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct BootReport {
    /// Of an instance of a template: it was asked for.
    asked: Option<f64>,
    /// All resources are there.
    built: Option<f64>,
    /// A vCPU goes to the guest.
    run: Option<f64>,
    /// The guest's first mark.
    first_instruction: Option<f64>,
    /// The guest says that it serves.
    serving: Option<f64>,
    /// The guest says that it is a template, and prepared.
    prepared: Option<f64>,
}

/// Memory.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct MemoryReport {
    /// What the guest was given.
    guest_bytes: Option<u64>,
    /// Of this process.
    resident_bytes: u64,
    /// Of it, guest memory.
    guest_resident_bytes: u64,
    /// Of it, all else.
    overhead_bytes: u64,
}

/// A network device.
#[derive(Debug, Serialize, JsonSchema)]
pub struct NetReport {
    id: String,
    mac: MacAddress,
}

/// `GET /v1/vm`. What only a VM has is missing as long as there is none.
#[derive(Debug, Serialize, JsonSchema)]
pub struct VmReport {
    /// State.
    state: State,
    /// This process.
    pid: u32,
    /// Version of the monitor.
    version: String,
    /// Memory.
    memory: MemoryReport,
    /// While a VM is awaited, and afterwards: how that stands.
    arrival: Option<Shown>,
    /// Name.
    name: Option<String>,
    /// Key of the ownership record; 0: none.
    vm_id: Option<u64>,
    /// Random id of this process.
    owner: Option<String>,
    /// Epoch of the ownership record.
    epoch: Option<u64>,
    /// Whether the image was started directly in ring 3.
    direct_start: Option<bool>,
    /// Configuration, or what there is of it.
    config: Option<Config>,
    /// Network devices.
    nets: Option<Vec<NetReport>>,
    /// How often the VM has begun again in this process.
    resets: Option<u64>,
    /// Boot times.
    boot_ms: Option<BootReport>,
    /// How long no vCPU ran at the last pause, from last exit to first entry, in microseconds.
    stood_still_us: Option<u64>,
    /// How it ended.
    end: Option<String>,
}

fn boot(stats: &Stats) -> BootReport {
    let b = &stats.boot;
    BootReport {
        asked: ms(&b.asked),
        built: ms(&b.built),
        run: ms(&b.run),
        first_instruction: ms(&b.marks[0]),
        serving: ms(&b.marks[1]),
        prepared: ms(&b.marks[2]),
    }
}

fn memory(vm: Option<&Vm>) -> MemoryReport {
    let memory = vm.map(Vm::memory);
    let resident = resident(&guest_ranges(vm));
    MemoryReport {
        guest_bytes: memory.map(|m| m.size() as u64),
        resident_bytes: resident.total,
        guest_resident_bytes: resident.guest,
        overhead_bytes: resident.total - resident.guest,
    }
}

/// `GET /v1/vm`.
pub fn vm(control: &Control) -> VmReport {
    let vm = control.vm();
    let config = control.config().ok();
    let of_vm = vm.as_deref();
    VmReport {
        state: state(control),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        memory: memory(of_vm),
        arrival: control.porting().ok().and_then(|p| p.arrival()),
        name: config.as_ref().map(|c| c.name.clone()),
        vm_id: config.as_ref().map(|c| c.vm_id),
        config,
        owner: of_vm.map(|vm| format!("{:016x}{:016x}", vm.owner().0[0], vm.owner().0[1])),
        epoch: of_vm.and_then(|vm| Some(vm.info()?.identity(vm.memory()).ok()?.epoch)),
        direct_start: of_vm.map(|vm| vm.info().is_some()),
        nets: of_vm.map(|vm| {
            let mut devices = vm.devices();
            devices.nets().map(|n| NetReport { id: Device::id(n).to_owned(), mac: n.mac() }).collect()
        }),
        stood_still_us: of_vm.and_then(|vm| vm.stood_still_ns().map(|ns| ns / 1000)),
        resets: of_vm.map(|vm| vm.stats().resets()),
        boot_ms: of_vm.map(|vm| boot(vm.stats())),
        end: of_vm.and_then(Vm::end).map(|e| e.to_string()),
    }
}

/// `GET /v1/metrics`, in Prometheus' text form.
pub fn metrics(control: &Control) -> String {
    let mut out = Exposition::default();
    let stats = control.stats();
    let vm = control.vm();
    let vcpus = vm.as_ref().map_or(1, |vm| vm.vcpus().len());
    for (index, exits) in stats.exits.iter().take(vcpus).enumerate() {
        exits.metrics(index, &mut out);
    }
    stats.vcpu.metrics(&mut out);
    stats.boot.metrics(&mut out);
    stats.reset_metrics(&mut out);
    stats.checkpoints.metrics(&mut out);
    let resident = resident(&guest_ranges(vm.as_deref()));
    for (name, help, bytes) in [
        ("vmm_resident_bytes", "Memory of this process.", resident.total),
        ("vmm_guest_resident_bytes", "Guest memory that is backed by pages.", resident.guest),
        ("vmm_overhead_bytes", "Memory of this process besides guest memory.", resident.total - resident.guest),
    ] {
        out.gauge(name, help, &[], bytes as f64);
    }
    if let Some(vm) = vm {
        out.gauge("vmm_guest_memory_bytes", "Memory the guest was given.", &[], vm.memory().size() as f64);
        vm.devices().metrics(&mut out);
    }
    if let Ok(porting) = control.porting() {
        porting.metrics(&mut out);
    }
    out.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_apart() {
        let smaps = "55d0-55e0 r-xp 00000000 00:00 0 /bin/vmm\nSize: 4 kB\nRss:  100 kB\n\
                     7f0000000000-7f0002000000 rw-p 00000000 00:00 0 \nRss:  2048 kB\nPss: 2048 kB\n\
                     7f0003000000-7f0003001000 rw-p 00000000 00:00 0 \nRss:  4 kB\n";
        let r = sum(smaps, std::slice::from_ref(&(0x7f00_0000_0000..0x7f00_0000_1000)));
        assert_eq!((r.total >> 10, r.guest >> 10), (2152, 2048));
    }
}
