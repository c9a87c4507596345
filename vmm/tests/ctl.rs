//! `vmm ctl` and the rest of the command line, as a user meets them: real processes, output, exit status.

#![allow(clippy::unwrap_used)]

mod control;
mod guest;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use control::{Process, park_for_ever, vmm};
use serde_json::Value;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn command(sock: &Path, args: &[&str]) -> Command {
    let mut command = vmm();
    command.arg("ctl").args(args).env("VMM_API_SOCK", sock).stdin(Stdio::null());
    command
}

fn ctl(sock: &Path, args: &[&str]) -> Output {
    command(sock, args).output().unwrap()
}

/// Standard output of a command that must succeed.
fn good(sock: &Path, args: &[&str]) -> String {
    let out = ctl(sock, args);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// Exit status and standard error of a command that must fail.
fn bad(sock: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = ctl(sock, args);
    assert!(!out.status.success(), "{args:?}: {}", text(&out.stdout));
    (out.status.code(), text(&out.stderr))
}

#[test]
fn a_vm_is_configured_booted_looked_at_and_ended() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, guest::image(park_for_ever())).unwrap();
    let mut p = Process::empty(dir.path());
    p.connect();
    let sock = p.socket.clone();
    let (status, error) = bad(&sock, &["boot"]);
    assert_eq!(status, Some(1));
    assert!(error.starts_with("vmm ctl: there is no configuration"), "{error}");
    let (status, error) = bad(&sock, &["set", "memory=3M", "image=/nonexistent", "colour=blue"]);
    assert_eq!(status, Some(1));
    assert!(error.contains("vmm ctl: colour: unknown field"), "{error}");
    let (_, error) = bad(&sock, &["set", "memory=3M", "image=/nonexistent"]);
    assert!(error.contains("vmm ctl: memory: ") && error.contains("vmm ctl: image: "), "{error}");
    let config = dir.path().join("vm.json");
    std::fs::write(&config, format!(r#"{{"image":{image:?},"memory":"8M","serial":"none"}}"#)).unwrap();
    good(&sock, &["config", config.to_str().unwrap()]);
    good(&sock, &["set", "name=by hand", "vm_id=7"]);
    assert_eq!(good(&sock, &["boot"]), "");
    p.serving();
    let info = good(&sock, &["info"]);
    for row in ["state        running\n", "name         by hand\n", "vm id        7\n", "memory       8 MiB, of which "]
    {
        assert!(info.contains(row), "{row:?} in {info}");
    }
    let raw: Value = serde_json::from_str(&good(&sock, &["--json", "info"])).unwrap();
    assert_eq!(raw["state"], "running");
    let mut watch = command(&sock, &["events"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines().map(|l| l.unwrap());
    assert!(lines.next().unwrap().ends_with("state=running"));
    good(&sock, &["pause"]);
    assert!(good(&sock, &["info"]).contains("paused"));
    let again: Value = serde_json::from_str(&good(&sock, &["resume", "--json"])).unwrap();
    assert_eq!(again["state"], "running");
    assert_eq!(good(&sock, &["reset"]), "");
    assert!(good(&sock, &["metrics"]).contains("# TYPE vmm_vcpu_exits_total counter\n"));
    assert_eq!(good(&sock, &["migrations"]).lines().count(), 1);
    assert_eq!(bad(&sock, &["cancel", "3"]), (Some(1), "vmm ctl: there is no migration 3\n".into()));
    let (status, error) = bad(&sock, &["--json", "cancel", "3"]);
    let problem: Value = serde_json::from_str(&error).unwrap();
    assert_eq!((status, problem["status"].as_u64()), (Some(1), Some(404)));
    good(&sock, &["shutdown"]);
    assert_eq!(p.wait(), Some(0));
    let rest: Vec<String> = lines.map(|l| l.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        rest,
        [
            "state state=paused",
            "state state=running",
            "reset cause=operator resets=1",
            "state reason=stopped state=ended"
        ]
    );
    assert_eq!(watch.wait().unwrap().code(), Some(0));
    let (status, error) = bad(&sock, &["info"]);
    assert_eq!(status, Some(3));
    assert!(error.contains("no such socket") && error.contains("--api-sock"), "{error}");
}

#[test]
fn mistakes_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let sock = dir.path().join("s");
    // a file that is left of a process that is gone
    drop(std::os::unix::net::UnixListener::bind(&sock).unwrap());
    let (status, error) = bad(&sock, &["info"]);
    assert_eq!(status, Some(3));
    assert!(error.contains("nobody listens"), "{error}");
    let out = vmm().args(["ctl", "info"]).env_remove("VMM_API_SOCK").output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("--sock PATH or set VMM_API_SOCK"));
    assert_eq!(vmm().args(["ctl", "inf"]).output().unwrap().status.code(), Some(2));
    // an order without the word before it
    let out = vmm().args(["pause"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("vmm ctl pause"), "{}", text(&out.stderr));
    assert!(!text(&vmm().args(["walk"]).output().unwrap().stderr).contains("vmm ctl"));
    // not a control socket: what answers is bounded and refused
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("other")).unwrap();
    let other = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        let _ = stream.write_all(b"220 smtp ready\r\n");
    });
    let (status, error) = bad(&dir.path().join("other"), &["info"]);
    other.join().unwrap();
    assert_eq!(status, Some(3));
    assert!(error.contains("not HTTP"), "{error}");
    // the reader went away: nothing is said
    let mut p = Process::start(dir.path(), park_for_ever(), &[]);
    p.serving();
    let shell = format!("{} ctl --sock {} metrics | head -c 1", env!("CARGO_BIN_EXE_vmm"), p.socket.display());
    let out = Command::new("sh").arg("-c").arg(shell).output().unwrap();
    assert_eq!((text(&out.stdout), text(&out.stderr)), ("#".into(), String::new()));
}

#[test]
fn a_port_is_followed_and_can_be_cancelled() {
    // SAFETY: no memory is involved; only this thread changes its namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    let (dir, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut p = Process::start(dir.path(), park_for_ever(), &[]);
    p.serving();
    let sock = p.socket.clone();
    let (status, error) = bad(&sock, &["migrate", "--to", "127.0.0.1:7001"]);
    assert!(status == Some(1) && error.contains("vmm keys"), "{error}");
    let keys = dir.path().join("keys");
    for args in [&["new"][..], &["host"]] {
        let mut command = vmm();
        command.arg("keys").args(args).arg(&keys);
        let out = if args == ["new"] { command.output() } else { command.args(["node", "127.0.0.1"]).output() };
        assert!(out.unwrap().status.success());
    }
    let again = vmm().args(["keys", "host"]).arg(&keys).arg("node").output().unwrap();
    assert!(again.status.code() == Some(1) && text(&again.stderr).contains("exists"), "{}", text(&again.stderr));
    let tls = format!("cert={0}/node.pem,key={0}/node.key,ca={0}/ca.pem", keys.display());
    assert_eq!(good(&sock, &["tls"]).trim(), "{\n  \"tls\": null\n}");
    good(&sock, &["tls", &tls]);
    assert!(good(&sock, &["tls"]).contains("node.key"));
    let (status, error) = bad(&sock, &["tls", "cert=a,key=b,ca=c"]);
    assert!(status == Some(1) && error.contains("tls.cert: a: "), "{error}");
    let (status, error) = bad(&sock, &["migrate", "--to", "nowhere"]);
    assert_eq!((status, error.as_str()), (Some(1), "vmm ctl: to: invalid socket address syntax\n"));
    let (status, error) = bad(&sock, &["migrate", "--to", "127.0.0.1:7001"]);
    assert_eq!(status, Some(1));
    assert!(error.contains("the port failed, the VM runs here: "), "{error}");
    // somebody who accepts and never says a word
    let silent = std::net::TcpListener::bind("127.0.0.1:7002").unwrap();
    let mut child = command(&sock, &["migrate", "--to", "127.0.0.1:7002"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(|l| l.unwrap());
    assert!(lines.next().unwrap().contains("sent"));
    let _kept = silent.accept().unwrap();
    // SAFETY: no memory is involved; the process is our child and has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|l| l.contains("the VM runs here")), "{rest:?}");
    assert!(good(&sock, &["info"]).contains("state        running"));

    let receiver = there.path().join("api.sock");
    let child = vmm()
        .args(["--receive", "127.0.0.1:7003", "--tls", &tls, "--serial", "none", "--api-sock"])
        .arg(&receiver)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut other = Process { child, socket: receiver.clone() };
    other.connect();
    assert!(good(&receiver, &["info"]).contains("state        receiving"));
    let said = good(&sock, &["migrate", "--to", "127.0.0.1:7003"]);
    assert!(said.starts_with("the VM runs at 127.0.0.1:7003: ") && said.contains("it stood still for "), "{said}");
    assert_eq!(p.wait(), Some(0));
    assert!(good(&receiver, &["info"]).contains("state        running"));
    good(&receiver, &["kill"]);
    assert_eq!(other.wait(), Some(137));
}

#[test]
fn completions_and_help_are_whole() {
    for shell in ["bash", "zsh", "fish"] {
        let out = vmm().args(["completions", shell]).output().unwrap();
        let script = text(&out.stdout);
        assert!(out.status.success() && script.contains("migrate") && script.contains("api-sock"), "{shell}");
    }
    let script = vmm().args(["completions", "bash"]).output().unwrap().stdout;
    let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut bash.stdin.take().unwrap(), &script).unwrap();
    assert!(bash.wait().unwrap().success());
    let help = text(&vmm().arg("--help").output().unwrap().stdout);
    for word in ["--config", "--receive", "ctl", "completions", "Exit status"] {
        assert!(help.contains(word), "{word} in {help}");
    }
}
