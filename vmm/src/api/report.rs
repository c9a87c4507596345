//! What `GET /v1/vm` and `GET /v1/metrics` say.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::control::Control;
use crate::metrics::Exposition;
use crate::stats::Stats;
use crate::vm::Vm;

/// Memory of this process in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Resident {
    /// All of it.
    total: u64,
    /// Of guest memory.
    guest: u64,
}

/// Reads the kernel's account of this process's mappings. `guest` is where guest memory begins.
fn resident(guest: u64) -> Resident {
    fs::read_to_string("/proc/self/smaps").map_or_else(|_| Resident::default(), |text| sum(&text, guest))
}

fn sum(smaps: &str, guest: u64) -> Resident {
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
            in_guest = (start..end).contains(&guest);
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

fn boot(stats: &Stats) -> Value {
    let b = &stats.boot;
    json!({
        "built": ms(&b.built),
        "run": ms(&b.run),
        "first_instruction": ms(&b.marks[0]),
        "serving": ms(&b.marks[1]),
    })
}

fn memory(vm: Option<&Vm>) -> Value {
    let memory = vm.map(Vm::memory);
    let resident = resident(memory.map_or(0, |m| m.host_base() as u64));
    json!({
        "guest_bytes": memory.map(|m| m.size()),
        "resident_bytes": resident.total,
        "guest_resident_bytes": resident.guest,
        "overhead_bytes": resident.total - resident.guest,
    })
}

/// `GET /v1/vm`.
pub fn vm(control: &Control) -> Value {
    let vm = control.vm();
    let arrival = control.porting().ok().and_then(|p| p.arrival());
    let Some(vm) = vm else {
        return json!({
            "state": "receiving",
            "pid": std::process::id(),
            "arrival": arrival,
            "memory": memory(None),
        });
    };
    let identity = vm.info().and_then(|i| i.identity(vm.memory()).ok());
    let macs: Vec<Value> = vm
        .devices()
        .nets()
        .map(|n| json!({ "id": crate::virtio::Device::id(n), "mac": n.mac().to_string() }))
        .collect();
    json!({
        "state": vm.phase(),
        "name": vm.config().name,
        "vm_id": vm.config().vm_id,
        "pid": std::process::id(),
        "owner": format!("{:016x}{:016x}", vm.owner().0[0], vm.owner().0[1]),
        "epoch": identity.map(|i| i.epoch),
        "direct_start": vm.info().is_some(),
        "config": vm.config(),
        "nets": macs,
        "boot_ms": boot(vm.stats()),
        "memory": memory(Some(&vm)),
        "arrival": arrival,
        "end": vm.end().map(|e| format!("{e:?}")),
    })
}

/// `GET /v1/metrics`, in Prometheus' text form.
pub fn metrics(control: &Control) -> String {
    let mut out = Exposition::default();
    let stats = control.stats();
    stats.vcpu.metrics(0, &mut out);
    stats.boot.metrics(&mut out);
    let vm = control.vm();
    let guest = vm.as_ref().map_or(0, |vm| vm.memory().host_base() as u64);
    let resident = resident(guest);
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
        let r = sum(smaps, 0x7f00_0000_0000);
        assert_eq!((r.total >> 10, r.guest >> 10), (2152, 2048));
    }
}
