//! Resets and power off on /dev/kvm: by the guest, from outside, in the middle of a port.

#![allow(clippy::unwrap_used)]

mod control;
mod guest;
mod net_support;
mod port_support;
#[path = "guest/storage_daemon.rs"]
mod storage_daemon;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::Process;
use port_support::disks::{MIB, rounds, run as run_program, sparse};
use port_support::puppet::{Puppet, Until};
use port_support::{Echo, Lab, eventually, image};
use storage_daemon::StorageDaemon;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{Config, MemorySize, OnReset, SerialOutput, TlsConfig};
use vmm::control::{Control, MigrationRequest};
use vmm::port::Engine;
use vmm::port::job::JobState;
use vmm::stats::Stats;
use vmm::vcpu::End;
use vmm::vm::Phase;

/// Counted by the guest of [`counts_until_told`] without end; not 0: it resets itself.
const COUNT: u64 = 0x30_0004;
const ORDER: u64 = 0x30_0008;

guest_code!(
    letter_and_reset,
    "reset_start",
    "reset_end",
    "
    .code32
    mov ebx, 0x300000
    inc dword ptr [ebx]              // memory is zero after each start
    mov al, 0x40
    add al, [ebx]
    mov dx, 0x3f8
    out dx, al
    mov al, 1
    mov dx, 0x602
    out dx, al
2:  jmp 2b
    .code64
"
);

guest_code!(
    letter_and_fault,
    "fault_start",
    "fault_end",
    "
    .code32
    mov al, 0x42
    mov dx, 0x3f8
    out dx, al
    ud2
    .code64
"
);

guest_code!(
    power_off,
    "off_start",
    "off_end",
    "
    .code32
    mov al, 0x34
    mov dx, 0x600
    out dx, al
2:  jmp 2b
    .code64
"
);

guest_code!(
    counts_until_told,
    "counts_start",
    "counts_end",
    "
    .code32
    mov ebx, 0x300000
2:  inc dword ptr [ebx + 4]
    mov al, [ebx + 8]
    test al, al
    jz 2b
    out 0x64, al
    jmp 2b
    .code64
"
);

fn config(dir: &Path, code: &[u8], on_reset: OnReset) -> Config {
    let image = dir.join("image");
    std::fs::write(&image, guest::pvh_image(code)).unwrap();
    let mut config = Config::for_image(image);
    config.memory = MemorySize::from_bytes(8 << 20);
    config.serial = SerialOutput::File(dir.join("console"));
    config.on_reset = on_reset;
    config
}

/// Runs it to its end; what it printed, and how it ended.
fn run(code: &[u8], on_reset: OnReset) -> (String, End) {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::new(Arc::new(Stats::default()));
    control.start(config(dir.path(), code, on_reset)).unwrap();
    let ended = control.ended();
    let mut patience = 6000;
    let end = loop {
        if let Some(end) = ended.borrow().clone() {
            break end;
        }
        patience -= 1;
        assert!(patience > 0, "no end");
        std::thread::sleep(Duration::from_millis(10));
    };
    (std::fs::read_to_string(dir.path().join("console")).unwrap(), end)
}

#[test]
fn a_reset_ends_the_vm_where_that_is_wanted() {
    assert_eq!(run(letter_and_reset(), OnReset::Exit), ("A".into(), End::Reset));
    let (text, end) = run(letter_and_fault(), OnReset::Exit);
    assert_eq!(text, "B");
    assert_eq!(end, End::TripleFault);
}

#[test]
fn a_guest_that_resets_itself_without_end_begins_again_at_a_bounded_rate() {
    // So many at once, the others one a second.
    const AT_ONCE: usize = 20;
    for (code, letter) in [(letter_and_reset(), "A"), (letter_and_fault(), "B")] {
        let dir = tempfile::tempdir().unwrap();
        let control = Control::new(Arc::new(Stats::default()));
        control.start(config(dir.path(), code, OnReset::Auto)).unwrap();
        let printed = |n: usize| {
            eventually("it begins again", || {
                let text = std::fs::read_to_string(dir.path().join("console")).unwrap();
                (text.len() >= n).then_some(text)
            })
        };
        printed(AT_ONCE + 1);
        let start = Instant::now();
        let text = printed(AT_ONCE + 4);
        assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
        assert_eq!(text, letter.repeat(text.len()), "memory is zero at each start");
        // The operator need not wait for that, nor the end.
        let vm = control.vm().unwrap();
        vm.reset().unwrap();
        vm.pause().unwrap();
        assert_eq!(vm.phase(), Phase::Paused);
        vm.stop();
        assert_eq!(vm.end(), Some(End::Stopped));
    }
}

#[test]
fn a_reset_by_the_guest_ends_a_port_and_then_takes_place() {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::new(Arc::new(Stats::default()));
    control.set_porting(Engine::new());
    let mut config = config(dir.path(), counts_until_told(), OnReset::Reboot);
    config.tls = Some(TlsConfig::Off);
    control.start(config).unwrap();
    let vm = control.vm().unwrap();
    let count = || vm.memory().ram().read_obj::<u32>(GuestAddress(COUNT)).unwrap();
    let goes_on = || {
        let before = count();
        eventually("the guest counts on", || (count() > before).then_some(()));
    };
    for (n, until) in (1..).zip([Until::Hello, Until::Describe, Until::PreCopy]) {
        goes_on();
        let puppet = Puppet::new();
        let request: MigrationRequest = serde_json::from_value(serde_json::json!({ "to": puppet.address })).unwrap();
        let id = control.porting().unwrap().start(&vm, &request).unwrap();
        let stopped = puppet.follow(until, 0);
        assert!(vm.reset().is_err() && control.reset().is_err(), "the operator cancels the port first");
        vm.memory().ram().write_obj(0xfeu8, GuestAddress(ORDER)).unwrap();
        let status = eventually("the port is over", || {
            control.porting().unwrap().status(id).filter(|s| s.state != JobState::Running)
        });
        assert_eq!(
            (status.state, status.error.as_deref()),
            (JobState::Cancelled, Some("the guest was reset")),
            "{until:?}"
        );
        assert_eq!(stopped.cancelled().map(|r| r.text), Some("the guest was reset".into()));
        eventually("the guest begins again", || (vm.stats().resets() == n).then_some(()));
        goes_on();
        assert_eq!(vm.phase(), Phase::Running);
    }
    // And one that comes while the VM is paused for the hand-over does not exist: no vCPU is in the guest.
    control.reset().unwrap();
    goes_on();
}

/// What must not grow: descriptors, threads, memory besides the guest's in bytes.
fn possessions(vmm: &mut Process) -> (usize, usize, u64) {
    let pid = vmm.child.id();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let overhead = vmm.json("GET", "/v1/vm", "").1["memory"]["overhead_bytes"].as_u64().unwrap();
    (count("fd"), count("task"), overhead)
}

#[test]
fn nothing_grows_with_resets() {
    const TIMES: u64 = 300;
    const GROWTH_MAX: u64 = 512 << 10;
    let dir = tempfile::tempdir().unwrap();
    let mut vmm = Process::pvh(dir.path(), counts_until_told(), &["--rng", "--balloon"]);
    eventually("it runs", || (vmm.json("GET", "/v1/vm", "").1["state"] == "running").then_some(()));
    let (status, vm) = vmm.json("PUT", "/v1/vm/reset", "");
    assert_eq!((status, &vm["state"], &vm["resets"]), (200, &"running".into(), &1.into()));
    for _ in 0..20 {
        vmm.ask("PUT", "/v1/vm/reset", "");
    }
    let before = possessions(&mut vmm);
    for _ in 0..TIMES {
        assert_eq!(vmm.ask("PUT", "/v1/vm/reset", "").0, 200);
    }
    // The connection of the last answer may still be there.
    let after = eventually("descriptors and threads are as before", || {
        let now = possessions(&mut vmm);
        (now.0 <= before.0 && now.1 <= before.1).then_some(now)
    });
    assert!(after.2 <= before.2 + GROWTH_MAX, "memory: {} -> {}", before.2, after.2);
    let (_, metrics) = vmm.ask("GET", "/v1/metrics", "");
    assert!(metrics.contains(&format!("vmm_resets_total{{cause=\"operator\"}} {}", TIMES + 21)), "{metrics}");
}

#[test]
fn a_guest_on_the_network_begins_again_here_and_where_it_was_ported_to() {
    let lab = Lab::new(2);
    let mut here = lab.boot("echo", &["--rng"]);
    let mut echo = Echo::new(&lab);
    for _ in 0..10 {
        for _ in 0..20 {
            echo.turn();
        }
        assert_eq!(here.api("PUT", "/v1/vm/reset", None)["state"], "running");
        // its connections are gone with it
        echo = Echo::new(&lab);
    }
    let there = lab.receive(1, 4300, &["--image", image().to_str().unwrap()]);
    let status = here.wait_port(here.port_to(4300));
    assert_eq!(status["state"], "completed", "{status}");
    assert!(here.wait().success());
    echo.turn();
    assert_eq!(there.api("PUT", "/v1/vm/reset", None)["resets"], 1);
    echo = Echo::new(&lab);
    echo.turn();
    // a process without the image says so, and the guest lives
    let last = lab.receive(0, 4301, &[]);
    assert_eq!(there.wait_port(there.port_to(4301))["state"], "completed");
    echo.turn();
    let (status, problem) = last.try_api("PUT", "/v1/vm/reset", None).unwrap();
    assert_eq!(status, 409);
    assert!(problem["detail"].as_str().unwrap().contains("--image"), "{problem}");
    echo.turn();
}

/// The guest that verifies its disk is reset while 32 requests are under way, over and over: one that wrote to memory of the
/// guest that came after it would be found out.
#[test]
fn a_guest_at_work_on_its_disk_begins_again() {
    let lab = Lab::new(1);
    let path = |name: &str| lab.dir.path().join(name);
    let raw = sparse(path("raw"), 16 * MIB);
    let qcow2 = path("qcow2").to_str().unwrap().to_owned();
    run_program("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2, "16M"]);
    let daemon = StorageDaemon::start(&path("daemon.sock"), &sparse(path("far"), 16 * MIB), 1);
    for disk in [
        format!("path={raw}"),
        format!("path={raw},bytes=8M:64K"),
        format!("path={qcow2},format=qcow2"),
        format!("vhost_user={}", daemon.socket.display()),
    ] {
        let mut vmm = lab.boot("disk", &["--disk", &disk]);
        for _ in 0..12 {
            let before = rounds(&vmm);
            eventually("the disk job goes on", || {
                assert!(vmm.is_alive(), "{disk}: {}", lab.console("boot"));
                (rounds(&vmm) > before).then_some(())
            });
            assert_eq!(vmm.api("PUT", "/v1/vm/reset", None)["state"], "running", "{disk}");
        }
        Echo::new(&lab).turns(10);
        assert_eq!(vmm.api("GET", "/v1/vm", None)["resets"], 12);
        if disk.starts_with("vhost_user") {
            assert!(vmm.api_text("/v1/metrics").contains("vmm_vhost_user_lost_total{device=\"disk0\"} 0"));
        }
    }
}

#[test]
fn a_guest_whose_network_another_process_serves_begins_again() {
    let lab = Lab::new(1);
    let (mut vmm, _connection) = net_support::boot(&lab);
    for n in 1..=10 {
        Echo::new(&lab).turns(20);
        assert_eq!(vmm.api("PUT", "/v1/vm/reset", None)["resets"], n);
    }
    Echo::new(&lab).turns(20);
    let metrics = vmm.api_text("/v1/metrics");
    assert!(metrics.contains("vmm_vhost_user_lost_total{device=\"lan\"} 0"), "over one connection: {metrics}");
    assert!(vmm.is_alive());
}

#[test]
fn a_guest_can_switch_itself_off() {
    assert_eq!(run(power_off(), OnReset::Exit), (String::new(), End::PowerOff));
}
