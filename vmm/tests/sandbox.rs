//! What a thread gives up, seen from outside, and that a forbidden system call ends the process.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use port_support::{Echo, Lab, Vmm, eventually};
use vmm::sandbox::{self, Kind, Options};

/// Tells the test program to confine itself and make a system call: KIND:CALL.
const CHILD: &str = "OUTRIGGER_SANDBOX_CHILD";

/// A field of each thread's status, by the thread's name.
fn threads(pid: u32, field: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // A thread may just have ended.
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let value = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(&format!("{name}:")));
            line.map(|l| l.split_once(':').unwrap().1.trim().to_owned())
        };
        all.push((value("Name").unwrap(), value(field).unwrap()));
    }
    all
}

fn all_have(pid: u32, field: &str, expected: &str) {
    for (name, value) in threads(pid, field) {
        assert_eq!(value, expected, "{field} of thread {name}");
    }
}

fn confined(vmm: &Vmm, threads_expected: usize) {
    let pid = vmm.pid();
    eventually("all threads are confined", || threads(pid, "Seccomp").iter().all(|(_, s)| s == "2").then_some(()));
    assert!(threads(pid, "Seccomp").len() >= threads_expected);
    all_have(pid, "NoNewPrivs", "1");
    for set in ["CapInh", "CapAmb", "CapBnd"] {
        all_have(pid, set, NO_CAPABILITY);
    }
    let urgent = if limit_can_be_raised() { NO_CAPABILITY } else { ONLY_NICE };
    let faces_guest = |name: &str| name.starts_with("vcpu") || name.starts_with("io");
    let is_right = |(name, value): &(String, String)| value == NO_CAPABILITY || !faces_guest(name) && value == urgent;
    for set in ["CapEff", "CapPrm"] {
        // A thread has the filter of whoever started it from the beginning, and gives this up itself.
        eventually(&format!("{set} is given up"), || threads(pid, set).iter().all(is_right).then_some(()));
    }
}

const NO_CAPABILITY: &str = "0000000000000000";
/// CAP_SYS_NICE is 23.
const ONLY_NICE: &str = "0000000000800000";

#[test]
fn a_port_is_urgent_in_the_sandbox_too() {
    // SAFETY: the parameter is valid for the call; this thread alone is changed, and changed back.
    let set =
        |policy, sched_priority| unsafe { libc::sched_setscheduler(0, policy, &libc::sched_param { sched_priority }) };
    if set(libc::SCHED_FIFO, 1) != 0 {
        eprintln!(
            "skipped: this machine has no real-time priorities for its root: {}",
            std::io::Error::last_os_error()
        );
        return;
    }
    set(libc::SCHED_OTHER, 0);
    assert_eq!(run_child("control:urgent").0, 77);
}

/// Whether this machine lets its root raise limits (CAP_SYS_RESOURCE, 24); some containers and virtual machines do not.
fn limit_can_be_raised() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & (1 << 24) != 0
}

#[test]
fn all_threads_of_a_running_vm_are_confined() {
    let lab = Lab::new(1);
    let vmm = lab.boot("echo", &[]);
    eventually("it runs", || (vmm.state() == "running").then_some(()));
    confined(&vmm, 3);
}

#[test]
fn a_vm_that_was_ported_is_confined_too_but_for_the_thread_that_only_accepts() {
    let lab = Lab::new(2);
    let here = lab.boot("echo", &[]);
    let there = lab.receive(1, 4100, &[]);
    let id = here.port_to(4100);
    assert_eq!(here.wait_port(id)["state"], "completed");
    eventually("the waiting thread has ended", || {
        (!threads(there.pid(), "Seccomp").iter().any(|(name, _)| name == "receive")).then_some(())
    });
    confined(&there, 3);
}

#[test]
fn another_user_in_another_root() {
    let lab = Lab::new(1);
    let root = lab.dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let vmm = lab.boot("echo", &["--uid", "12345", "--gid", "23456", "--chroot", root.to_str().unwrap()]);
    eventually("it runs", || (vmm.state() == "running").then_some(()));
    confined(&vmm, 3);
    all_have(vmm.pid(), "Uid", "12345\t12345\t12345\t12345");
    all_have(vmm.pid(), "Gid", "23456\t23456\t23456\t23456");
    all_have(vmm.pid(), "Groups", "");
    let seen = std::fs::read_link(format!("/proc/{}/root", vmm.pid())).unwrap();
    assert_eq!(seen, root.canonicalize().unwrap());
    // neither /dev/kvm nor the image can be opened any more, and need not be
    Echo::new(&lab).turn();
    assert_eq!(vmm.api("PUT", "/v1/vm/reset", None)["resets"], 1);
    Echo::new(&lab).turn();
}

#[test]
fn without_a_sandbox_nothing_is_given_up() {
    let lab = Lab::new(1);
    let vmm = lab.boot("echo", &["--no-sandbox"]);
    eventually("it runs", || (vmm.state() == "running").then_some(()));
    all_have(vmm.pid(), "Seccomp", "0");
    assert!(threads(vmm.pid(), "CapEff").iter().all(|(_, caps)| caps != "0000000000000000"));
}

#[test]
fn a_root_that_is_none_is_said_before_anything_is_started() {
    let out = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["--image", "/proc/self/exe", "--chroot", "/proc/self/exe"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("--chroot: /proc/self/exe: not a directory"), "{text}");
}

#[test]
fn namespaces_of_its_own_or_by_name() {
    let lab = Lab::new(1);
    let namespace = |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let ours = format!("/proc/{}/ns/net", std::process::id());
    let vmm = lab.boot("echo", &["--unshare"]);
    for kind in ["mnt", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(&vmm.pid().to_string(), kind), namespace("self", kind), "{kind}");
    }
    Echo::new(&lab).turn();
    // The lab has a namespace of its own; this one comes back from there.
    let vmm = lab.spawn_bare("outside", &["--receive", "127.0.0.1:0", "--tls", "off", "--netns", &ours]);
    assert_eq!(namespace(&vmm.pid().to_string(), "net"), std::fs::read_link(&ours).unwrap());

    for (value, says) in
        [("nosuch", "--netns: /run/netns/nosuch: "), ("/proc/self/exe", "--netns: /proc/self/exe: Invalid")]
    {
        let out = Command::new(env!("CARGO_BIN_EXE_vmm"))
            .args(["--image", "/proc/self/exe", "--netns", value])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(2) && text.contains(says), "{text}");
    }
}

fn is_denied_elsewhere() -> bool {
    let denied = |e: std::io::Error| e.kind() == std::io::ErrorKind::PermissionDenied;
    let read = std::fs::File::open("/etc/passwd").map(drop);
    let write = std::fs::write("/tmp/outrigger-sandbox-elsewhere", "x");
    read.is_err_and(denied) && write.is_err_and(denied)
}

fn fail() -> ! {
    // SAFETY: the harness's own way out makes calls that are forbidden in a confined thread.
    unsafe { libc::_exit(1) }
}

/// What the child of [`forbidden`] does; in an ordinary run of the tests there is nothing to do.
#[test]
fn child() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let (kind, call) = what.split_once(':').unwrap();
    let kind = match kind {
        "vcpu" => Kind::Vcpu,
        "io" => Kind::Io,
        _ => Kind::Control,
    };
    sandbox::set_up(Options::default()).unwrap();
    sandbox::confine(kind).unwrap();
    match call {
        // SAFETY: the calls fail or end the process; their pointers are null or valid.
        "execve" => drop(Command::new("/bin/true").exec()),
        "open" => drop(std::fs::File::open("/proc/self/status")),
        "urgent" if vmm::schedule::Urgent::port().is_none() => fail(),
        // The kernel says no, and the process goes on.
        "elsewhere" if !is_denied_elsewhere() => fail(),
        "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        "ptrace" => {
            // SAFETY: no memory is involved.
            unsafe { libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0) };
        }
        "executable" => {
            let (rw, map) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping of which nothing is used.
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, rw, map, -1, 0) };
        }
        "kvm" => {
            // SAFETY: KVM_RUN on a descriptor that is none.
            unsafe { libc::ioctl(-1, 0xae80) };
        }
        _ => {}
    }
    // SAFETY: the harness's own way out makes calls that are forbidden here.
    unsafe { libc::_exit(77) };
}

fn run_child(what: &str) -> (i32, String) {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CHILD, what)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn a_forbidden_system_call_ends_the_process() {
    let cases = [
        ("vcpu", &["execve", "open", "socket", "ptrace", "executable"][..]),
        ("io", &["execve", "open", "socket", "ptrace", "executable", "kvm"]),
        ("control", &["execve", "ptrace", "executable"]),
    ];
    for (kind, calls) in cases {
        assert_eq!(run_child(&format!("{kind}:nothing")).0, 77, "{kind} can end");
        for call in calls {
            let (status, text) = run_child(&format!("{kind}:{call}"));
            assert_eq!(status, sandbox::STATUS, "{call} on {kind}: {text}");
            assert!(text.contains("vmm: the sandbox forbids system call"), "{text}");
        }
    }
    assert_eq!(run_child("vcpu:kvm").0, 77, "a vCPU's thread may use KVM");
    assert_eq!(run_child("control:open").0, 77, "the control interface reads what the kernel says of it");
    if landlock() {
        assert_eq!(run_child("control:elsewhere").0, 77, "but not what it was not given");
    }
}

/// Whether this kernel has landlock: landlock_create_ruleset(2) tells its version.
fn landlock() -> bool {
    const VERSION: libc::c_ulong = 1;
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, VERSION) > 0 }
}

#[test]
fn checkpoints_go_where_control_threads_are_allowed() {
    let lab = Lab::new(1);
    let [elsewhere, allowed, read_only] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let flags = [allowed.path().to_str().unwrap(), &format!("{},access=ro", read_only.path().display())]
        .map(|path| ["--allow-path".to_owned(), path.to_owned()])
        .concat();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let vmm = lab.boot("echo", &flags);
    eventually("it runs", || (vmm.state() == "running").then_some(()));
    let take = |dir: &std::path::Path| {
        let body = format!(r#"{{"path":"{}"}}"#, dir.join("saved").display());
        vmm.try_api("POST", "/v1/vm/checkpoint", Some(&body)).unwrap()
    };
    for dir in [lab.dir.path(), allowed.path()] {
        let (status, answer) = take(dir);
        assert_eq!(status, 200, "{answer}");
    }
    if landlock() {
        for dir in [elsewhere.path(), read_only.path()] {
            let (status, answer) = take(dir);
            let text = answer.to_string();
            assert!(status == 400 && text.contains("Permission denied") && text.contains("--allow-path"), "{text}");
            assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
        }
    }
    // It has done no harm.
    Echo::new(&lab).turn();
}

#[test]
fn a_path_that_cannot_be_allowed_is_said_before_anything_is_started() {
    for (value, says) in [("/nowhere/at/all", "--allow-path: /nowhere/at/all: "), ("/tmp,access=rx", "it is ro or rw")]
    {
        let arguments = ["--image", "/proc/self/exe", "--allow-path", value];
        let out = Command::new(env!("CARGO_BIN_EXE_vmm")).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(2) && text.contains(says), "{text}");
    }
}
