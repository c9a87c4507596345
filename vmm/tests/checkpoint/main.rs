//! Checkpoints between real `vmm` processes on /dev/kvm: taken of a guest that works, and gone on with in another process.
#![allow(clippy::unwrap_used)]

mod dead;
#[path = "../port_support/mod.rs"]
mod port_support;
mod refused;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use port_support::arbiter::Arbiter;
use port_support::{Echo, Lab, Vmm, eventually};
use serde_json::{Value, json};

const NET: &str = "id=lan,tap=tap1";

fn ask(vmm: &Vmm, body: &Value) -> (u16, Value) {
    vmm.try_api("POST", "/v1/vm/checkpoint", Some(&body.to_string())).expect("the control socket answers")
}

fn take(vmm: &Vmm, body: &Value) -> Value {
    let (status, report) = ask(vmm, body);
    assert_eq!(status, 200, "{report}");
    report
}

/// What `vmm --restore` ends with, and says, when it refuses.
fn refusal(dir: &Path, more: &[&str]) -> (i32, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .arg("--restore")
        .arg(dir)
        .args(["--net", "id=lan,tap=tap2", "--serial", "none"])
        .args(more)
        .output()
        .unwrap();
    (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn restore(lab: &Lab, name: &str, dir: &Path, more: &[&str]) -> Vmm {
    let mut args = vec!["--restore", dir.to_str().unwrap(), "--net", NET];
    args.extend(more);
    lab.spawn(name, &args)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in ["state", "memory"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|n| n.contains("one") || n.contains("partial"));
    names
}

/// Ends the VM with a checkpoint; where.
fn stop(lab: &Lab, vmm: &mut Vmm, name: &str, parent: Option<&Path>) -> PathBuf {
    let path = lab.dir.path().join(name);
    let report = take(vmm, &json!({ "path": path, "stop": true, "parent": parent }));
    assert_eq!((&report["stopped"], &report["pause_us"]), (&json!(true), &Value::Null), "{report}");
    assert!(vmm.wait().success(), "it ends with status 0");
    path
}

/// The same connection goes on in another process: the whole state, and every page, is there.
#[test]
fn a_vm_that_was_stopped_goes_on_in_both_ways() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    for (i, how) in ["map", "read", "map"].into_iter().enumerate() {
        echo.turns(50);
        let dir = stop(&lab, &mut vmm, &format!("saved{i}"), None);
        let memory = fs::metadata(dir.join("memory")).unwrap();
        assert_eq!(memory.len(), 64 << 20, "a page is where its address is");
        assert!(memory.blocks() * 512 < 48 << 20, "zero pages are holes: {} bytes", memory.blocks() * 512);
        assert_eq!(memory.mode() & 0o777, 0o600);
        vmm = restore(&lab, &format!("restored{i}"), &dir, &["--restore-memory", how]);
        assert_eq!(vmm.state(), "running");
        echo.turn();
    }
}

#[test]
fn the_guest_goes_on_while_checkpoints_are_taken_and_added_to() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let over = AtomicBool::new(false);
    let ends = Over(&over);
    let path = |i: usize| lab.dir.path().join(format!("one{i}"));
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !over.load(Ordering::Acquire) {
                longest = longest.max(echo.turn());
            }
            longest
        });
        let _ends = ends;
        let whole = take(&vmm, &json!({ "path": path(0) }));
        assert!(whole["pause_us"].as_u64().unwrap() > 0, "{whole}");
        assert!(whole["raw_pages"].as_u64().unwrap() > 100, "{whole}");
        for i in 1..4 {
            let added = take(&vmm, &json!({ "path": path(i), "parent": path(i - 1) }));
            assert!(added["parent"].is_string());
        }
        over.store(true, Ordering::Release);
        println!("longest turn meanwhile {:?}", client.join().unwrap());
    });
    let last = stop(&lab, &mut vmm, "one4", Some(&path(3)));
    let all: u64 = names(lab.dir.path()).len() as u64;
    assert_eq!(all, 5, "no leftovers");
    // Checkpoints side by side can be moved together.
    let moved = lab.dir.path().join("moved");
    fs::create_dir(&moved).unwrap();
    for i in 0..5 {
        fs::rename(path(i), moved.join(format!("one{i}"))).unwrap();
    }
    let dir = moved.join(last.file_name().unwrap());
    for (i, how) in ["map", "read"].into_iter().enumerate() {
        if i > 0 {
            vmm.signal(libc::SIGKILL);
            vmm.wait();
            // The connection's other end is further now: a fresh one.
            vmm = restore(&lab, "again", &dir, &["--restore-memory", how]);
            echo = Echo::new(&lab);
        } else {
            vmm = restore(&lab, "restored", &dir, &["--restore-memory", how]);
        }
        echo.turns(50);
    }
}

/// Ends the work beside a test, also one that fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Memory is the same, byte for byte, whichever way it came: the last whole checkpoint says what it was.
#[test]
fn a_chain_and_a_whole_checkpoint_say_the_same() {
    let lab = Lab::new(2);
    let vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let path = |name: &str| lab.dir.path().join(name);
    take(&vmm, &json!({ "path": path("one") }));
    echo.turns(200);
    vmm.api("PUT", "/v1/vm/pause", None);
    take(&vmm, &json!({ "path": path("added"), "parent": path("one") }));
    // Nothing runs: only what stopping the devices may have written is new.
    let none = take(&vmm, &json!({ "path": path("none"), "parent": path("added") }));
    assert!(none["pages"].as_u64().unwrap() < 8, "{none}");
    let whole = take(&vmm, &json!({ "path": path("whole") }));
    assert!(whole["pages"].as_u64().unwrap() > 100, "{whole}");
    assert_eq!(whole["pause_us"], Value::Null, "it was paused");
    assert_eq!(vmm.state(), "paused");
    // The memory of both, as a restored VM that is paused at once has it, is in a whole checkpoint of that.
    let mut sums = Vec::new();
    for (name, how) in [("none", "map"), ("none", "read"), ("whole", "map"), ("whole", "read")] {
        let copy = restore(&lab, &format!("{name}-{how}"), &path(name), &["--restore-memory", how]);
        copy.api("PUT", "/v1/vm/pause", None);
        let again = path(&format!("{name}-{how}-again"));
        let report = take(&copy, &json!({ "path": again }));
        sums.push((report["raw_pages"].as_u64().unwrap(), fs::read(again.join("memory")).unwrap()));
    }
    let differing = |a: &[u8], b: &[u8]| a.chunks(4096).zip(b.chunks(4096)).filter(|(a, b)| a != b).count();
    for (pages, memory) in &sums[1..] {
        // Each has run for a moment: some pages are its own.
        assert!(pages.abs_diff(sums[0].0) < 64, "{pages} and {} pages", sums[0].0);
        assert!(differing(memory, &sums[0].1) < 64, "{} pages differ", differing(memory, &sums[0].1));
    }
    vmm.api("PUT", "/v1/vm/resume", None);
    echo.turns(50);
}

/// A restored VM is a VM: its memory, untouched as it may be, is ported and saved as any other's.
#[test]
fn a_restored_vm_is_ported_and_saved_again() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    echo.turns(50);
    let dir = stop(&lab, &mut vmm, "one", None);
    let mut restored = restore(&lab, "restored", &dir, &[]);
    echo.turn();
    let there = lab.receive(0, 4300, &[]);
    assert_eq!(restored.wait_port(restored.port_to(4300))["state"], "completed");
    assert!(restored.wait().success());
    echo.turns(50);
    let mut vmm = there;
    let dir = stop(&lab, &mut vmm, "two", None);
    let _vmm = restore(&lab, "twice", &dir, &[]);
    echo.turns(50);
}

#[test]
fn two_vms_go_on_from_one_checkpoint() {
    let lab = Lab::new(3);
    let mut vmm = lab.boot("echo", &[]);
    Echo::new(&lab).turn();
    let dir = stop(&lab, &mut vmm, "one", None);
    let before = fs::read(dir.join("memory")).unwrap();
    let first = restore(&lab, "first", &dir, &[]);
    assert!(dir.join("restored").exists());
    Echo::new(&lab).turn();
    let second = lab.spawn("second", &["--restore", dir.to_str().unwrap(), "--net", "id=lan,tap=tap2"]);
    assert_eq!((first.state(), second.state()), ("running".into(), "running".into()));
    drop(first);
    (0..20).for_each(|_| Echo::new(&lab).turns(1));
    assert!(before == fs::read(dir.join("memory")).unwrap(), "what guests write is not the checkpoint's");
}

#[test]
fn over_the_control_interface() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    echo.turn();
    let sock = vmm.sock.clone();
    let ctl = |sock: &Path, args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_vmm"))
            .args(["ctl", "--sock", sock.to_str().unwrap()])
            .args(args)
            .current_dir(lab.dir.path())
            .output()
            .unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
    };
    let (status, text) = ctl(&sock, &["checkpoint", "one"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("pages") && text.contains("stood still"), "{text}");
    let metrics = vmm.api_text("/v1/metrics");
    assert!(metrics.contains("vmm_checkpoints_total{result=\"completed\"} 1"), "{metrics}");
    let (status, text) = ctl(&sock, &["checkpoint", "two", "--parent", "one", "--stop"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(vmm.wait().success());

    let empty = lab.empty("empty");
    let (status, text) = ctl(&empty.sock, &["restore", "nothing"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("path: ") && text.contains("No such file"), "{text}");
    let (status, text) = ctl(&empty.sock, &["restore", "two", "--net", "wan=tap1"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("nets[0].id: \"wan\": the checkpoint has lan"), "{text}");
    assert_eq!(empty.state(), "unconfigured");
    let (status, text) = ctl(&empty.sock, &["restore", "two", "--net", "lan=tap1"]);
    assert_eq!(status, Some(0), "{text}");
    assert_eq!(empty.state(), "running");
    echo.turn();
    let (status, problem) = empty.try_api("PUT", "/v1/vm/restore", Some("{\"path\":\"two\"}")).unwrap();
    assert_eq!(status, 409, "{problem}");
}

/// Wherever it is killed, there is a whole checkpoint with the name, or none.
#[test]
fn killed_in_the_middle() {
    let lab = Lab::new(3);
    let (mut whole, mut none) = (0, 0);
    for i in 0..8u64 {
        let mut vmm = lab.boot("echo", &[]);
        let mut echo = Echo::new(&lab);
        echo.turn();
        let path = lab.dir.path().join(format!("one{i}"));
        std::thread::scope(|scope| {
            scope.spawn(|| vmm.try_api("POST", "/v1/vm/checkpoint", Some(&json!({ "path": path }).to_string())));
            // Not a wait: the instant of the kill is what varies.
            std::thread::sleep(Duration::from_millis(i * 8));
            vmm.signal(libc::SIGKILL);
        });
        vmm.wait();
        drop(vmm);
        if path.exists() {
            whole += 1;
            let vmm = restore(&lab, &format!("restored{i}"), &path, &[]);
            Echo::new(&lab).turn();
            drop(vmm);
        } else {
            none += 1;
            assert_eq!(refusal(&path, &[]).0, 2);
            // What is left of it is no obstacle.
            let vmm = lab.boot("echo", &[]);
            Echo::new(&lab).turn();
            take(&vmm, &json!({ "path": path }));
            assert!(!names(lab.dir.path()).iter().any(|n| n.contains("partial")));
        }
    }
    println!("{whole} were whole, {none} were not there");
}

/// Who runs is decided by the record: once, by who comes first, and only for a VM that ended with its checkpoint.
#[test]
fn the_ownership_record_decides() {
    let lab = Lab::new(3);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut echo = Echo::new(&lab);
    echo.turn();
    let live = lab.dir.path().join("live");
    take(&vmm, &json!({ "path": live }));
    let (status, said) = refusal(&live, &[]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("went on after this checkpoint"), "{said}");
    for turn in 1..4u64 {
        let dir = stop(&lab, &mut vmm, &format!("saved{turn}"), None);
        vmm = restore(&lab, &format!("restored{turn}"), &dir, &[]);
        echo.turn();
        assert_eq!(arbiter.record(9).unwrap().epoch.0, turn);
        assert_eq!(vmm.api("GET", "/v1/vm", None)["epoch"], turn);
        let (status, said) = refusal(&dir, &[]);
        assert_eq!(status, 1, "{said}");
        assert!(said.contains("not as the checkpoint left it"), "{said}");
        assert_eq!(arbiter.record(9).unwrap().epoch.0, turn, "a refusal changes nothing");
    }
    let dir = stop(&lab, &mut vmm, "last", None);
    arbiter.usurp(9);
    assert!(refusal(&dir, &[]).1.contains("not as the checkpoint left it"));
}

/// A VM that has ended for good leaves no record; one that may go on from its checkpoint does.
#[test]
fn the_ownership_record_goes_with_the_vm() {
    let lab = Lab::new(2);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut dir = stop(&lab, &mut vmm, "never claimed", None);
    for epoch in 1..3u64 {
        vmm = restore(&lab, &format!("restored{epoch}"), &dir, &[]);
        assert_eq!(arbiter.record(9).unwrap().epoch.0, epoch);
        if epoch == 1 {
            dir = stop(&lab, &mut vmm, "goes on", None);
        }
    }
    vmm.api("PUT", "/v1/vm/shutdown", None);
    assert!(vmm.wait().success());
    assert_eq!(arbiter.record(9), None);
    assert!(refusal(&dir, &[]).1.contains("not as the checkpoint left it"));
}

#[test]
fn with_a_small_root_and_another_user() {
    let lab = Lab::new(2);
    let root = lab.dir.path().join("root");
    fs::create_dir(&root).unwrap();
    std::os::unix::fs::chown(&root, Some(12345), Some(23456)).unwrap();
    let mut vmm = lab.boot("echo", &["--uid", "12345", "--gid", "23456", "--chroot", root.to_str().unwrap()]);
    let mut echo = Echo::new(&lab);
    echo.turn();
    take(&vmm, &json!({ "path": "/one" }));
    take(&vmm, &json!({ "path": "two", "parent": "/one", "stop": true }));
    assert!(vmm.wait().success());
    let _vmm = restore(&lab, "restored", &root.join("two"), &["--uid", "12345", "--gid", "23456"]);
    echo.turn();
}
