//! Ports that do not take place: whatever goes wrong before the hand-over, the guest goes on at the source.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;

use migration::message::{Hello, Message, Ownership, Reason, ReasonCode};
use migration::ownership::{Epoch, OwnerId, Verdict};
use port_support::arbiter::Arbiter;
use port_support::puppet::{BEFORE_COMMIT, Puppet, Stopped, Until};
use port_support::{Echo, Lab, eventually, ip};

/// The guest is well, and a port still works.
fn carries_on(lab: &Lab, vmm: &mut port_support::Vmm, echo: &mut Echo) {
    for _ in 0..20 {
        echo.turn();
    }
    assert_eq!(vmm.state(), "running");
    let there = lab.receive(1, 4999, &[]);
    let status = vmm.wait_port(vmm.port_to(4999));
    assert_eq!(status["state"], "completed", "{status}");
    assert!(vmm.wait().success());
    echo.turn();
    drop(there);
}

#[test]
fn cancelled_in_each_phase() {
    let lab = Lab::plain(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    for until in BEFORE_COMMIT {
        let puppet = Puppet::new();
        let id = vmm.port_to(puppet.port());
        let stopped = puppet.follow(until, 0);
        let (status, _) = vmm.try_api("POST", "/v1/migrations", Some("{\"to\":\"127.0.0.1:1\"}")).unwrap();
        assert_eq!(status, 409, "one port at a time");
        vmm.api("DELETE", &format!("/v1/migrations/{id}"), None);
        let status = vmm.wait_port(id);
        // The guest stands still for at most a second without LOADED: that may have been quicker than the cancel.
        let expected = if until == Until::Handing { ["cancelled", "failed"] } else { ["cancelled"; 2] };
        assert!(expected.contains(&status["state"].as_str().unwrap()), "{until:?}: {status}");
        assert!(stopped.cancelled().is_some(), "{until:?}: the destination is told");
        for _ in 0..20 {
            echo.turn();
        }
    }
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn destination_vanishes_in_each_phase() {
    let lab = Lab::plain(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    for until in BEFORE_COMMIT {
        let puppet = Puppet::new();
        let id = vmm.port_to(puppet.port());
        drop(puppet.follow(until, 0));
        let status = vmm.wait_port(id);
        assert_eq!(status["state"], "failed", "{until:?}: {status}");
        for _ in 0..20 {
            echo.turn();
        }
    }
    let nobody = vmm.wait_port(vmm.port_to(1));
    assert_eq!(nobody["state"], "failed", "{nobody}");
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn link_goes_down_during_pre_copy() {
    let lab = Lab::plain(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let puppet = Puppet::new();
    let id = vmm.port_to(puppet.port());
    let _stopped = puppet.follow(Until::PreCopy, 0);
    ip("link set lo down");
    while vmm.port(id)["state"] == "running" {
        echo.turn();
    }
    assert_eq!(vmm.port(id)["state"], "failed", "{}", vmm.port(id));
    ip("link set lo up");
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn destination_is_killed_or_stopped() {
    let lab = Lab::plain(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    // Stopped before it can answer, then killed.
    let there = lab.receive(1, 4000, &[]);
    there.signal(libc::SIGSTOP);
    let id = vmm.port_to(4000);
    eventually("HELLO is out", || (vmm.port(id)["phase"] == "hello").then_some(()));
    for _ in 0..20 {
        echo.turn();
    }
    there.signal(libc::SIGKILL);
    let status = vmm.wait_port(id);
    assert_eq!(status["state"], "failed", "{status}");
    drop(there);
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn source_is_killed_and_the_destination_waits_for_another() {
    let lab = Lab::new(3);
    let first = lab.boot("echo", &[]);
    let there = lab.receive(1, 4000, &[]);
    // Half a HELLO, and gone.
    drop(std::net::TcpStream::connect("127.0.0.1:4000").unwrap());
    drop(first);
    let mut second = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let status = second.wait_port(second.port_to(4000));
    assert_eq!(status["state"], "completed", "{status}");
    assert!(second.wait().success());
    echo.turn();
    assert_eq!(there.state(), "running");
}

#[test]
fn destination_refuses_and_says_why() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let cases: [(&[&str], &str); 3] = [
        (&["--receive", "127.0.0.1:4001"], "lan"),
        (&["--receive", "127.0.0.1:4001", "--net", "tap=tap1,id=wan"], "lan"),
        (&["--receive", "127.0.0.1:4001", "--net", "tap=tap0,id=lan"], "tap0"),
    ];
    for (args, why) in cases {
        let there = lab.spawn("refusing", args);
        let status = vmm.wait_port(vmm.port_to(4001));
        assert_eq!(status["state"], "failed", "{args:?}: {status}");
        assert!(status["error"].as_str().unwrap().contains(why), "{args:?}: {status}");
        assert_eq!(there.state(), "receiving", "and waits for the next");
        echo.turn();
    }
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn destination_refuses_a_guest_that_is_too_large() {
    let lab = Lab::new(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let there = lab.receive(1, 4001, &["--memory", "32M"]);
    let status = vmm.wait_port(vmm.port_to(4001));
    assert_eq!(status["state"], "failed", "{status}");
    assert!(status["error"].as_str().unwrap().contains("64 MiB"), "{status}");
    drop(there);
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn destination_refuses_what_it_does_not_speak() {
    let lab = Lab::plain(2);
    let there = lab.receive(1, 4001, &[]);
    let hello = |min_version, max_version, required| {
        Message::Hello(Hello {
            min_version,
            max_version,
            required,
            offered: 0,
            port: [1, 2],
            vm_id: 0,
            owner: OwnerId([1, 2]),
            ownership: Ownership::Stream,
            epoch: Epoch(0),
            memory_size: 2 << 20,
            ticket: Vec::new(),
        })
    };
    for (message, code) in [(hello(2, 9, 0), ReasonCode::Version), (hello(1, 1, 1 << 63), ReasonCode::Feature)] {
        let mut source = Stopped::connect(4001);
        source.say(&message);
        let (frame_type, payload) = source.next().unwrap();
        match Message::parse(frame_type, &payload) {
            Ok(Message::Refuse(reason)) => assert_eq!(reason.code, code),
            other => panic!("{other:?}"),
        }
        assert!(source.next().is_none(), "and closes");
    }
    // Not a porting stream at all.
    let mut stranger = std::net::TcpStream::connect("127.0.0.1:4001").unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    assert_eq!(there.state(), "receiving");
    let arrival = eventually("it waits for the next", || {
        let arrival = there.api("GET", "/v1/vm", None)["arrival"].clone();
        (arrival["failed"] == 3).then_some(arrival)
    });
    assert!(arrival["last_error"].is_string(), "{arrival}");
}

#[test]
fn without_an_arbiter_a_lost_connection_behind_commit_leaves_it_in_doubt() {
    let lab = Lab::plain(2);
    let mut vmm = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let puppet = Puppet::new();
    let id = vmm.port_to(puppet.port());
    drop(puppet.follow(Until::Commit, 0));
    let status = vmm.wait_port(id);
    assert_eq!((&status["state"], &status["phase"]), (&"unknown".into(), &"unknown".into()), "{status}");
    assert_eq!(vmm.state(), "paused");
    let (code, _) = vmm.try_api("PUT", "/v1/vm/resume", None).unwrap();
    assert_eq!(code, 409, "only the operator's word on the port itself lets it go on");
    vmm.api("PUT", &format!("/v1/migrations/{id}/resolve"), Some("{\"here\":true}"));
    eventually("it runs here", || (vmm.port(id)["state"] == "failed").then_some(()));
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn with_an_arbiter_the_source_takes_the_vm_back() {
    let lab = Lab::plain(2);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut echo = Echo::new(&lab);
    let puppet = Puppet::new();
    let id = vmm.port_to(puppet.port());
    let stopped = puppet.follow(Until::Commit, 1);
    arbiter.set_silent(true);
    drop(stopped);
    // The arbiter does not answer: it stays paused, however long that takes.
    eventually("it competes", || (vmm.port(id)["phase"] == "competing").then_some(()));
    eventually("the operator is told why", || {
        vmm.port(id)["error"].as_str().filter(|e| e.contains(&format!("arbiter {address}"))).map(|_| ())
    });
    assert_eq!((vmm.state().as_str(), &vmm.port(id)["phase"]), ("paused", &"competing".into()));
    arbiter.set_silent(false);
    let status = vmm.wait_port(id);
    assert_eq!(status["state"], "failed", "{status}");
    assert_eq!(arbiter.record(9).unwrap().epoch.0, 2, "it runs with the epoch it has won");
    carries_on(&lab, &mut vmm, &mut echo);
}

#[test]
fn what_a_port_took_is_released_at_the_end() {
    let lab = Lab::plain(1);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    for _ in 0..2 {
        // Nobody listens there. The guest holds no epoch, before and after.
        let status = vmm.wait_port(vmm.port_to(1));
        assert_eq!(status["state"], "failed", "{status}");
        assert_eq!(arbiter.record(9).unwrap().epoch.0, 1, "taken once");
        assert_eq!(vmm.api("GET", "/v1/vm", None)["epoch"], 0);
    }
    vmm.api("PUT", "/v1/vm/shutdown", None);
    assert!(vmm.wait().success());
    assert!(arbiter.record(9).is_none());
}

#[test]
fn with_an_arbiter_the_loser_destroys_its_copy() {
    for released in [false, true] {
        let lab = Lab::plain(1);
        let arbiter = Arbiter::start();
        let address = arbiter.address.to_string();
        let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
        let _echo = Echo::new(&lab);
        let puppet = Puppet::new();
        let id = vmm.port_to(puppet.port());
        let stopped = puppet.follow(Until::Commit, 1);
        // The destination wins, then the connection breaks before it can say so.
        arbiter.usurp(9);
        drop(stopped);
        eventually("it may still be given back", || (vmm.port(id)["phase"] == "watching").then_some(()));
        assert_eq!(vmm.state(), "paused");
        if released {
            // The VM has even ended there: there is no record, and that is no invitation to an old copy.
            arbiter.release(9);
        } else {
            arbiter.usurp(9);
        }
        assert!(vmm.wait().success(), "the VM is somebody else's now");
        assert_eq!(arbiter.record(9).is_none(), released);
    }
}

/// The destination has won, cannot run the VM, and reaches the arbiter alone.
#[test]
fn a_source_that_has_lost_goes_on_when_the_vm_is_given_back() {
    let lab = Lab::plain(2);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut echo = Echo::new(&lab);
    let puppet = Puppet::new();
    let id = vmm.port_to(puppet.port());
    let stopped = puppet.follow(Until::Commit, 1);
    let source = OwnerId(arbiter.record(9).unwrap().owner.0);
    compete(&arbiter, 1, OwnerId([5, 5]));
    drop(stopped);
    eventually("it has lost", || (vmm.port(id)["phase"] == "watching").then_some(()));
    compete(&arbiter, 2, source);
    let status = vmm.wait_port(id);
    assert_eq!(status["state"], "failed", "{status}");
    assert_eq!(arbiter.record(9).unwrap().epoch.0, 3, "what was given back, and no other epoch");
    carries_on(&lab, &mut vmm, &mut echo);
}

/// Wins at the arbiter in this owner's name.
fn compete(arbiter: &Arbiter, epoch: u64, owner: OwnerId) {
    let mut client = vmm::port::arbiter::Arbiter::new(arbiter.address, 9, owner);
    client.compete(Epoch(epoch));
    let (_, verdict) = eventually("the arbiter answers", || client.poll());
    assert_eq!(verdict, Verdict::Won(Epoch(epoch + 1)));
}

#[test]
fn without_an_heir_a_port_is_given_up_unless_the_arbiter_knows_none() {
    let lab = Lab::plain(2);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut vmm = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut echo = Echo::new(&lab);
    let puppet = Puppet::new();
    let id = vmm.port_to(puppet.port());
    // It has its record; the arbiter does not answer any more when it is to hear of the heir.
    let mut stopped = puppet.follow(Until::Describe, 1);
    arbiter.set_silent(true);
    stopped.say(&Message::Ready { owner: OwnerId([5, 5]), epoch: Epoch(1) });
    let status = vmm.wait_port(id);
    assert_eq!((&status["state"], &status["paused_us"]), (&"failed".into(), &serde_json::Value::Null), "{status}");
    assert!(status["error"].as_str().unwrap().contains(&format!("arbiter {address}")), "{status}");
    drop(stopped);
    arbiter.set_silent(false);
    arbiter.make_old();
    carries_on(&lab, &mut vmm, &mut echo);
}

/// The destination had won, and gives the VM back while the source is about to forward a frame: that fails before ABORTED is read.
#[test]
fn what_the_destination_said_is_heard_although_a_frame_could_not_be_sent() {
    let lab = Lab::plain(2);
    let arbiter = Arbiter::start();
    let (address, points) = (arbiter.address.to_string(), lab.dir.path().join("points"));
    let listener = UnixListener::bind(&points).unwrap();
    let (held, at_frames) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(listener.accept().unwrap().0);
        let mut point = String::new();
        let mut first = true;
        while reader.read_line(&mut point).is_ok_and(|n| n > 0) {
            if point.trim() == "source send FRAMES" && std::mem::take(&mut first) {
                held.send(()).unwrap();
                may_go_on.recv().unwrap();
            }
            point.clear();
            if reader.get_mut().write_all(&[vmm::port::faults::GO_ON]).is_err() {
                return;
            }
        }
    });
    let arguments = ["--arbiter", &address, "--vm-id", "9", "--port-faults", points.to_str().unwrap()];
    let mut vmm = lab.boot("echo", &arguments);
    let mut echo = Echo::new(&lab);
    let puppet = Puppet::new();
    let id = vmm.port_to(puppet.port());
    let mut stopped = puppet.follow(Until::Commit, 1);
    let asking = std::thread::spawn(move || {
        echo.turn();
        echo
    });
    at_frames.recv_timeout(port_support::PATIENCE).expect("a frame for the guest");
    arbiter.usurp(9);
    let epoch = Epoch(arbiter.record(9).unwrap().epoch.0);
    stopped.say(&Message::Aborted { reason: Reason::new(ReasonCode::State, "cannot load it"), epoch });
    stopped.reset();
    go_on.send(()).unwrap();
    let status = vmm.wait_port(id);
    assert_eq!((&status["state"], &status["error"]), (&"failed".into(), &"cannot load it".into()), "{status}");
    assert_eq!(arbiter.record(9).unwrap().epoch.0, epoch.0 + 1, "the source has taken it back");
    let mut echo = asking.join().unwrap();
    carries_on(&lab, &mut vmm, &mut echo);
}
