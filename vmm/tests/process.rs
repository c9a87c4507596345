//! The `vmm` process from outside: control interface, exit status, signals, mistakes on the command line.

#![allow(clippy::unwrap_used)]

mod control;
mod guest;

use std::process::{Output, Stdio};

use control::{Process, park_for_ever, vmm};

guest_code!(
    exit_42,
    "exit_start",
    "exit_end",
    "
    mov r15, [rdi + 24]
    mov dword ptr [r15 + 0x14], 2
    mov dword ptr [r15 + 0x10], 42
2:  jmp 2b
"
);

guest_code!(triple_fault, "fault_start", "fault_end", "ud2");

fn run(args: &[&str]) -> Output {
    vmm().args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn the_guests_status_is_the_process_status() {
    let dir = tempfile::tempdir().unwrap();
    let mut p = Process::start(dir.path(), exit_42(), &[]);
    assert_eq!(p.wait(), Some(42));
    assert!(!p.socket.exists());
}

#[test]
fn control_interface() {
    let dir = tempfile::tempdir().unwrap();
    let mut p = Process::start(dir.path(), park_for_ever(), &[]);
    p.serving();
    let (status, vm) = p.json("GET", "/v1/vm", "");
    assert_eq!(status, 200);
    assert_eq!(
        (vm["state"].as_str(), vm["vm_id"].as_u64(), vm["name"].as_str()),
        (Some("running"), Some(9), Some("test"))
    );
    assert_eq!(vm["pid"].as_u64(), Some(p.child.id().into()));
    assert_eq!(vm["memory"]["guest_bytes"].as_u64(), Some(8 << 20));
    assert_eq!(vm["config"]["memory"].as_u64(), Some(8 << 20));
    assert!(vm["boot_ms"]["run"].as_f64() > vm["boot_ms"]["built"].as_f64());
    for (path, state) in [("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("resume", "running")] {
        let (status, vm) = p.json("PUT", &format!("/v1/vm/{path}"), "");
        assert_eq!((status, vm["state"].as_str()), (200, Some(state)), "{path}");
    }
    let (status, metrics) = p.ask("GET", "/v1/metrics", "");
    assert_eq!(status, 200);
    assert!(metrics.lines().any(|l| l.starts_with("vmm_vcpu_parks_total{vcpu=\"0\"} ")), "{metrics}");
    for line in metrics.lines().filter(|l| !l.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap();
        value.parse::<f64>().unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    // what goes wrong is said in one form
    for (method, path, body, status, field) in [
        ("GET", "/v1/nothing", "", 404, None),
        ("POST", "/v1/vm", "", 405, None),
        ("GET", "/v1/migrations/1", "", 404, None),
        ("GET", "/v1/migrations/x", "", 404, None),
        ("DELETE", "/v1/migrations/18446744073709551616", "", 404, None),
        ("POST", "/v1/migrations", "{}", 400, None),
        ("POST", "/v1/migrations", "nonsense", 400, None),
        ("POST", "/v1/migrations", r#"{"to":"somewhere"}"#, 400, Some("to")),
        ("POST", "/v1/migrations", r#"{"to":"127.0.0.1:1","colour":1}"#, 400, Some("colour")),
    ] {
        let (got, error) = p.json(method, path, body);
        assert_eq!(got, status, "{method} {path} {body}: {error}");
        assert!(error["title"].is_string() && error["detail"].is_string(), "{error}");
        assert_eq!(
            (error["status"].as_u64(), error["instance"].as_str()),
            (Some(status.into()), Some(path)),
            "{error}"
        );
        assert!(error["type"].is_string(), "{error}");
        assert_eq!(error["field"].as_str(), field, "{error}");
    }
    let (status, _) = p.json("PUT", "/v1/vm/shutdown", "");
    assert_eq!(status, 202);
    assert_eq!(p.wait(), Some(0));
    assert!(!p.socket.exists());
}

#[test]
fn a_signal_ends_it_in_order() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let dir = tempfile::tempdir().unwrap();
        let mut p = Process::start(dir.path(), park_for_ever(), &[]);
        p.serving();
        // SAFETY: no memory is involved; the process is our child and has not been waited for.
        unsafe { libc::kill(p.child.id() as i32, signal) };
        assert_eq!(p.wait(), Some(0));
        assert!(!p.socket.exists());
    }
}

#[test]
fn a_socket_in_use_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Process::start(dir.path(), park_for_ever(), &[]);
    first.serving();
    let out =
        run(&["--image", dir.path().join("image").to_str().unwrap(), "--api-sock", first.socket.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("another process"), "{out:?}");
    first.serving();
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(first.socket.exists());
    let mut second = Process::start(dir.path(), park_for_ever(), &[]);
    second.serving();
}

#[test]
fn mistakes_are_all_named_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("vm.json");
    std::fs::write(&json, r#"{"image":"/nonexistent","memory":"3M","disks":[{"path":"/nonexistent"}]}"#).unwrap();
    let socket = dir.path().join("s");
    let out = run(&["--config", json.to_str().unwrap(), "--api-sock", socket.to_str().unwrap(), "--net", "mac=x"]);
    assert_eq!(out.status.code(), Some(2));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    for field in ["image:", "memory:", "disks[0].path:", "--net[0].mac:"] {
        assert!(text.contains(field), "{field} in {text}");
    }
    assert!(!socket.exists());
    std::fs::write(&json, r#"{"image":"x","nets":[{"mac":7}]}"#).unwrap();
    let out = run(&["--config", json.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("nets[0].mac"), "{out:?}");
    let out = run(&["--config", "/nonexistent/vm.json"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("config: /nonexistent/vm.json: No such file"), "{out:?}");
}

#[test]
fn a_disk_in_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    let flag = format!("path={}", disk.display());
    let mut first = Process::start(dir.path(), park_for_ever(), &["--disk", &flag]);
    first.serving();
    let out = run(&["--image", dir.path().join("image").to_str().unwrap(), "--disk", &flag]);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("disk.img") && text.contains("in use"), "{text}");
}

/// What a `vmm` says on a host that was prepared by a line of shell, in a mount namespace of its own.
fn run_where(preparation: &str, args: &[&str]) -> Output {
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("set -e; {preparation} \"$@\""), "sh"]);
    command.arg(vmm().get_program()).args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn what_the_host_lacks_is_said_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    // For its image.
    let mut p = Process::start(dir.path(), exit_42(), &[]);
    assert_eq!(p.wait(), Some(42));
    let image = dir.path().join("image");
    let image = image.to_str().unwrap();
    let tap = "tap=absent-tap";
    // Somebody else's, and root without the right to pass over that.
    let no_right = format!(
        "cp -a /dev/kvm {0}/kvm; chown 65534 {0}/kvm; chmod 600 {0}/kvm; mount --bind {0}/kvm /dev/kvm; \
         setpriv --bounding-set=-dac_override,-dac_read_search",
        dir.path().display()
    );
    let cases: [(&str, &str, &[&str]); 6] = [
        ("mount -t tmpfs none /dev;", "/dev/kvm (the VMM needs KVM and the right to use it): No such file", &[]),
        ("mount --bind /dev/null /dev/kvm;", "this is not KVM's device", &[]),
        ("NO_RIGHT", "/dev/kvm (the VMM needs KVM and the right to use it): Permission denied", &[]),
        ("setpriv --bounding-set=-net_admin", "tap absent-tap (needs CAP_NET_ADMIN)", &["--net", tap]),
        ("mount -t tmpfs none /dev/net;", "tap absent-tap: /dev/net/tun: No such file", &["--net", tap]),
        ("mount --bind /dev/zero /dev/net/tun;", "/dev/net/tun is not the device for taps", &["--net", tap]),
    ];
    for (preparation, said, more) in cases {
        let preparation = preparation.replace("NO_RIGHT", &no_right);
        let out = run_where(&preparation, &[&["--image", image], more].concat());
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{preparation}: {text}");
        assert!(text.contains(said), "{preparation}: {text}");
        assert_eq!(text.lines().count(), 1, "{preparation}: {text}");
    }
}

/// Standard error may be a log on a full disk: what became of the guest is still told by the status, and nobody panics.
#[test]
fn a_full_log_changes_no_exit_status() {
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    for args in [["--image", "/nonexistent"], ["--memory", "nonsense"], ["--no-such-flag", ""]] {
        let wrong = vmm().args(args).stdin(Stdio::null()).stderr(full()).status().unwrap();
        assert_eq!(wrong.code(), run(&args).status.code(), "{args:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, guest::image(triple_fault())).unwrap();
    let mut command = vmm();
    command.args(["--memory", "8M", "--serial", "none", "--image"]).arg(&image).stdin(Stdio::null());
    let said = command.output().unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("fault"), "{said:?}");
    assert_eq!(command.stdout(full()).stderr(full()).status().unwrap().code(), said.status.code());
}
