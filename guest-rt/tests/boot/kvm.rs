//! Under our own VMM.
use crate::harness::{Monitor, Vm};
use crate::qemu::assert_disk;

#[test]
fn boots_both_ways() {
    Vm::new(Monitor::Direct, 32, "test=hello log=debug").args(&["--vm-id", "42"]).run().is_well(&[
        "32 MiB, Direct",
        "vm_id 42, epoch 0",
        "all is well",
    ]);
    Vm::new(Monitor::Pvh, 32, "test=hello log=debug").run().is_well(&["32 MiB, Pvh", "all is well"]);
}

#[test]
fn the_date_is_the_host_s() {
    let seconds = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let before = seconds();
    let ended = Vm::new(Monitor::Direct, 32, "test=hello").run();
    let after = seconds();
    ended.is_well(&[]);
    let (_, rest) = ended.console.split_once("realtime ").unwrap();
    let said: u64 = rest.split_whitespace().next().unwrap().parse().unwrap();
    assert!((before..=after).contains(&said), "{before} {said} {after}");
}

#[test]
fn memory_functions_and_heap() {
    Vm::new(Monitor::Direct, 32, "test=memory").run().is_well(&["memory functions and heap are right"]);
}

#[test]
fn a_disk() {
    let disk = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    disk.as_file().set_len(16 << 20).unwrap();
    let ended = Vm::new(Monitor::Direct, 32, "test=block").disk(disk.path(), false).run();
    ended.is_well(&["serial \"test-disk\"", "transfers are right", "requests at once are right", "errors are right"]);
    assert_disk(disk.path());
    Vm::new(Monitor::Direct, 32, "test=block").disk(disk.path(), true).run().is_well(&["a write was refused"]);
}
