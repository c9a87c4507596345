//! Every way to die is reported, with a backtrace that leads to the place, and ends the VM with its own status.
use crate::harness::{Ended, Monitor, Vm, image};
use std::process::Command;

const FAULT: u32 = guest_abi::exit_status::FAULT;
const PANIC: u32 = guest_abi::exit_status::PANIC;

/// Test, status, what the first line of the report says, a function of the backtrace.
const KINDS: [(&str, u32, &str, &str); 13] = [
    ("panic", PANIC, "asked to panic", "faults.rs"),
    ("bounds", PANIC, "index out of bounds: the len is 3", "faults.rs"),
    ("oom", PANIC, "memory allocation of 1048576 bytes failed", "faults.rs"),
    ("stack", FAULT, "(stack overflow)", "deep"),
    ("null", FAULT, "(null pointer)", "faults.rs"),
    ("ring0", FAULT, "page fault (vector 14, error 0x7) at 0x4", "faults.rs"),
    ("low", FAULT, "address 0x8000", "faults.rs"),
    ("text", FAULT, "address 0x400000", "faults.rs"),
    ("rodata", FAULT, "address 0x600000", "faults.rs"),
    ("heap-exec", FAULT, "page fault (vector 14, error 0x15)", "faults.rs"),
    ("undefined", FAULT, "undefined instruction (vector 6", "faults.rs"),
    ("privileged", FAULT, "general protection (vector 13", "faults.rs"),
    ("divide", FAULT, "divide error (vector 0", "faults.rs"),
];

/// Runs the command the report ends with.
fn symbolised(ended: &Ended) -> String {
    let line = ended.console.lines().find_map(|l| l.split_once("addr2line -Cfipe IMAGE "));
    let (_, addresses) = line.unwrap_or_else(|| panic!("no addresses in\n{ended}"));
    let out = Command::new("addr2line").arg("-Cfipe").arg(image()).args(addresses.split_whitespace()).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn all_kinds(monitor: Monitor) {
    for (kind, status, text, function) in KINDS {
        let ended = Vm::new(monitor, 32, &format!("test={kind}")).run();
        // isa-debug-exit has seven bits for the status.
        let expected = if monitor.is_qemu() { status & 0x7f } else { status };
        assert_eq!(ended.status, Some(expected), "{kind}: {ended}");
        ended.says(&[text, "backtrace, innermost first"]);
        if status == FAULT {
            ended.says(&["rax ", "rsp ", "r15 ", "rflags "]);
        }
        let trace = symbolised(&ended);
        assert!(trace.contains(function), "{kind}:\n{ended}\n{trace}");
    }
}

#[test]
fn under_qemu() {
    all_kinds(Monitor::Tcg);
}

#[test]
fn under_our_vmm() {
    all_kinds(Monitor::Direct);
}

#[test]
fn an_error_of_main_is_printed() {
    let ended = Vm::new(Monitor::Direct, 32, "test=fail").run();
    assert_eq!(ended.status, Some(guest_abi::exit_status::FAILED));
    ended.says(&["failed: asked to fail"]);
}
