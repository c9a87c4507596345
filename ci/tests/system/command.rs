//! The commands as a user runs them: the demo's result, and what an interrupt or a kill leaves behind.
use crate::one_at_a_time;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use xtask::lab;

fn xtask(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts the demo and waits until its VMs run and a copy is under way.
fn demo_under_way() -> Child {
    let mut demo = xtask(&["demo", "--size", "512M"]).spawn().unwrap();
    let mut lines = BufReader::new(demo.stderr.take().unwrap()).lines();
    let mut said = String::new();
    while let Some(line) = lines.next() {
        let line = line.unwrap();
        said = said + &line + "\n";
        if line.starts_with("copying it in") {
            // What it says from now on is of no interest, but somebody must take it.
            std::thread::spawn(move || lines.count());
            return demo;
        }
    }
    let status = demo.wait().unwrap();
    panic!("the demo ended early with {status}: {said}");
}

fn namespaces_of(pid: u32) -> Vec<String> {
    let mut names = lab::namespace_names().unwrap();
    names.retain(|n| n.starts_with(&format!("or{pid}n")));
    names
}

#[test]
fn the_demo_reports_what_it_promises() {
    let _one = one_at_a_time();
    let dir = lab::Lab::create(&xtask::artifacts::data_dir().unwrap()).unwrap();
    let json = dir.state_dir().join("demo.json");
    let out = xtask(&["demo", "--size", "64M", "--json", json.to_str().unwrap()]).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{stderr}");
    assert!(stderr.contains("curl --unix-socket") && stdout.contains("same TCP connection"), "{stdout}{stderr}");
    let result: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(result["bytes_verified"].as_u64().unwrap() >= 128 << 20);
    assert_eq!((&result["sha256_ok"], &result["same_connection"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_eq!(result["ported_to"], "client1");
    assert_eq!(result["port_back"]["ported_to"], "node1");
    assert!(result["client_retransmits"].is_u64());
    let saved = &result["saved"];
    assert_eq!((&saved["sha256_ok"], &saved["same_connection"]), (&Value::Bool(true), &Value::Bool(true)));
    assert!(saved["checkpoint_mib"].as_u64().unwrap() > 0);
    for (object, key) in [
        ("blackout_ms", "vmm"),
        ("blackout_ms", "client"),
        ("throughput_mb_s", "before"),
        ("throughput_mb_s", "after"),
        ("boot_ms", "dmodule"),
        ("boot_ms", "nmodule"),
    ] {
        assert!(result[object][key].as_f64().is_some_and(|x| x > 0.0), "{object}.{key}: {result}");
    }
}

#[test]
fn an_interrupt_leaves_nothing() {
    let _one = one_at_a_time();
    let mut demo = demo_under_way();
    let pid = demo.id();
    assert_eq!(namespaces_of(pid).len(), 3);
    kill(Pid::from_raw(pid as i32), Signal::SIGINT).unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130));
    assert_eq!(namespaces_of(pid), Vec::<String>::new());
    let left: Vec<_> = left_files(pid);
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_reader_that_goes_away_leaves_nothing() {
    let _one = one_at_a_time();
    let mut demo = xtask(&["demo", "--size", "16M"]).spawn().unwrap();
    let pid = demo.id();
    // Nobody reads what it says: writing to a closed pipe fails.
    drop((demo.stdout.take(), demo.stderr.take()));
    assert!(!demo.wait().unwrap().success());
    assert_eq!(namespaces_of(pid), Vec::<String>::new());
    assert!(left_files(pid).is_empty());
}

#[test]
fn clean_removes_what_a_killed_run_left() {
    let _one = one_at_a_time();
    let mut demo = demo_under_way();
    let pid = demo.id();
    demo.kill().unwrap();
    demo.wait().unwrap();
    assert_eq!(namespaces_of(pid).len(), 3);
    let out = xtask(&["clean"]).output().unwrap();
    assert!(out.status.success());
    assert!(String::from_utf8_lossy(&out.stdout).contains(&format!("or{pid}n0-node1")));
    assert_eq!(namespaces_of(pid), Vec::<String>::new());
    assert!(left_files(pid).is_empty());
}

fn left_files(pid: u32) -> Vec<std::path::PathBuf> {
    let roots = [std::env::temp_dir().join("outrigger-lab"), xtask::artifacts::data_dir().unwrap()];
    let entries = roots.iter().filter_map(|r| std::fs::read_dir(r).ok()).flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.to_string_lossy().contains(&format!("/or{pid}n"))).collect()
}
