//! Under QEMU's microvm: the image is not bound to our VMM.
use crate::harness::{Monitor, Vm};

#[test]
fn boots_keeps_time_and_ends() {
    for monitor in [Monitor::Tcg, Monitor::QemuKvm] {
        let ended = Vm::new(monitor, 32, "test=hello vm_id=77").run();
        ended.is_well(&["testguest: 32 MiB, test hello", "vm_id 77, epoch 0", "all is well"]);
    }
}

#[test]
fn the_date_comes_from_the_rtc() {
    let ended = Vm::new(Monitor::Tcg, 32, "test=hello").args(&["-rtc", "base=2031-02-03T04:05:06"]).run();
    ended.is_well(&["realtime "]);
    let (_, rest) = ended.console.split_once("realtime ").unwrap();
    let said: u64 = rest.split_whitespace().next().unwrap().parse().unwrap();
    // `date -ud 2031-02-03T04:05:06 +%s`, and some time for the boot.
    assert!((1_927_857_906..1_927_857_906 + 600).contains(&said), "{said}");
}

#[test]
fn calibrates_by_the_pit_where_there_is_one() {
    let ended = Vm::new(Monitor::Tcg, 32, "test=hello log=debug").args(&["-M", "pit=on"]).run();
    ended.is_well(&["by the PIT"]);
    let ended = Vm::new(Monitor::Tcg, 32, "test=hello log=debug").args(&["-M", "pit=off"]).run();
    ended.is_well(&["by the LAPIC timer"]);
}

#[test]
fn memory_functions_and_heap() {
    Vm::new(Monitor::Tcg, 32, "test=memory").run().is_well(&["memory functions and heap are right"]);
}

#[test]
fn without_a_device_for_it_the_end_is_a_reset() {
    let ended = Vm::new(Monitor::Tcg, 32, "test=hello debug_exit=0").run();
    assert_eq!(ended.status, None, "{ended}");
    ended.says(&["all is well"]);
}

#[test]
fn too_little_memory_is_said() {
    let ended = Vm::new(Monitor::Tcg, 12, "test=hello").run();
    ended.says(&["cannot start: 12 MiB of memory at address 0, at least 16 are needed"]);
}

#[test]
fn legacy_devices_are_refused() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let ended = Vm::new(Monitor::Tcg, 32, "test=block")
        .args(&["-global", "virtio-mmio.force-legacy=on"])
        .disk(disk.path(), false)
        .run();
    ended.says(&["failed: virtio-mmio version 1, need 2"]);
}

#[test]
fn a_disk() {
    for monitor in [Monitor::Tcg, Monitor::QemuKvm] {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(16 << 20).unwrap();
        let ended = Vm::new(monitor, 32, "test=block").disk(disk.path(), false).run();
        let all = [
            "disk of 16777216 bytes, serial \"test-disk\"",
            "transfers are right",
            "requests at once are right",
            "errors are right",
        ];
        ended.is_well(&all);
        assert_disk(disk.path());
        Vm::new(monitor, 32, "test=block").disk(disk.path(), true).run().is_well(&["a write was refused"]);
    }
}

/// What the image wrote is in the file, where it belongs.
pub fn assert_disk(path: &std::path::Path) {
    let bytes = std::fs::read(path).unwrap();
    for offset in [0u64, 512, 4608, 1 << 20, 4 << 20, (4 << 20) + 599 * 8192 + 8184] {
        let at = offset as usize;
        let expected = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        assert_eq!(bytes[at..at + 8], expected, "offset {offset}");
    }
}
