//! Porting between real `vmm` processes on /dev/kvm: there and back, with clients that do not notice.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use port_support::arbiter::Arbiter;
use port_support::{Echo, Lab, PATIENCE, Vmm, eventually};
use serde_json::Value;

/// Follows a port with a client that asks on; gives the last status, the longest turn and when that was.
fn follow(from: &mut Vmm, id: u64, echo: &mut Echo) -> (Value, Duration, Duration) {
    let start = Instant::now();
    let mut longest = (Duration::ZERO, Duration::ZERO);
    let mut turn = |echo: &mut Echo| longest = longest.max((echo.turn(), start.elapsed()));
    loop {
        turn(echo);
        match from.try_api("GET", &format!("/v1/migrations/{id}"), None) {
            Some((200, status)) if status["state"] == "running" => {}
            Some((200, status)) => {
                assert_eq!(status["state"], "completed", "{status}");
                for _ in 0..50 {
                    turn(echo);
                }
                assert!(from.wait().success(), "the source ends with status 0");
                return (status, longest.0, longest.1);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn to_and_fro_with_a_client() {
    let lab = Lab::new(2);
    let mut here = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let mut lulls = 0;
    for turn in 0..6u16 {
        let mut there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        assert_eq!(there.state(), "receiving");
        let id = here.port_to(4000 + turn);
        let (status, ..) = follow(&mut here, id, &mut echo);
        assert!(status["blackout_us"].as_u64().unwrap() > 0);
        assert!(status["breakdown"]["load_us"].as_u64().unwrap() > 0);
        // Each is asked; in time it answers only if it gets a processor.
        lulls += u32::from(status["lull"]["answered"].as_bool().unwrap());
        assert_eq!(there.state(), "running");
        assert!(there.is_alive());
        here = there;
    }
    assert!(lulls > 0, "the guest comes to lulls, also after it was ported");
    assert_eq!(echo.retransmits(), 0, "no segment was lost");
}

#[test]
fn the_arbiter_is_asked() {
    let lab = Lab::new(2);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let extra = ["--arbiter", &address, "--vm-id", "9"];
    let mut here = lab.boot("echo", &extra);
    let mut echo = Echo::new(&lab);
    for turn in 0..4u16 {
        let there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        let id = here.port_to(4000 + turn);
        follow(&mut here, id, &mut echo);
        // Taken by the first source with 1.
        assert_eq!(arbiter.record(9).unwrap().epoch.0, u64::from(turn) + 2);
        assert_eq!(there.api("GET", "/v1/vm", None)["epoch"], u64::from(turn) + 2);
        here = there;
    }
    assert_eq!(echo.retransmits(), 0, "no segment was lost");
    // Somebody else owns it: refused before the pause, and the guest does not notice.
    arbiter.usurp(9);
    let _there = lab.receive(1, 5000, &[]);
    let status = here.wait_port(here.port_to(5000));
    assert_eq!(status["state"], "failed", "{status}");
    assert!(status["error"].as_str().unwrap().contains("epoch"), "{status}");
    echo.turn();
}

/// Bulk data in both directions while the guest moves: every byte arrives, in order, on the same connections.
#[test]
fn streams_go_on() {
    const PORTS: u16 = 4;
    let lab = Lab::new(2);
    let mut here = lab.boot("echo", &[]);
    let (mut source, mut sink) = (lab.connect(19), lab.connect(9));
    let over = Arc::new(AtomicBool::new(false));
    let done = over.clone();
    let reader = std::thread::spawn(move || {
        source.set_read_timeout(Some(PATIENCE)).unwrap();
        source.write_all(&u64::MAX.to_le_bytes()).unwrap();
        let (mut offset, mut buffer) = (0u64, vec![0; 1 << 16]);
        while !done.load(Ordering::Acquire) {
            let n = source.read(&mut buffer).unwrap();
            assert_ne!(n, 0, "the guest does not end the stream");
            for byte in &buffer[..n] {
                assert_eq!(*byte, (offset ^ offset >> 8 ^ offset >> 16) as u8, "at {offset}");
                offset += 1;
            }
        }
        offset
    });
    let done = over.clone();
    let writer = std::thread::spawn(move || {
        sink.set_write_timeout(Some(PATIENCE)).unwrap();
        sink.set_read_timeout(Some(PATIENCE)).unwrap();
        let (block, mut sent) = (vec![7; 1 << 16], 0u64);
        while !done.load(Ordering::Acquire) {
            sent += sink.write(&block).unwrap() as u64;
        }
        sink.shutdown(std::net::Shutdown::Write).unwrap();
        let mut count = [0; 8];
        sink.read_exact(&mut count).unwrap();
        (sent, u64::from_le_bytes(count))
    });
    for port in 0..PORTS {
        let there = lab.receive(usize::from((port + 1) % 2), 4000 + port, &[]);
        let status = here.wait_port(here.port_to(4000 + port));
        assert_eq!(status["state"], "completed", "{status}");
        assert!(here.wait().success());
        here = there;
    }
    over.store(true, Ordering::Release);
    let (sent, counted) = writer.join().unwrap();
    assert_eq!(sent, counted, "bytes to the guest");
    println!("{sent} bytes to the guest, {} from it", reader.join().unwrap());
}

/// Not a test: prints figures. `[PORTS=N] [VERIFY=1] cargo test -p vmm --test port_run -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure() {
    let lab = Lab::new(2);
    let arbiter = Arbiter::start();
    let address = arbiter.address.to_string();
    let mut here = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut echo = Echo::new(&lab);
    let mut blackouts = Vec::new();
    let ports: u16 = std::env::var("PORTS").map_or(30, |n| n.parse().unwrap());
    let verify = std::env::var_os("VERIFY").is_some();
    for turn in 0..ports {
        let there = lab.receive_as_shipped(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        let quiet = (0..50).map(|_| echo.turn()).max().unwrap();
        let id = if verify { here.port_to(4000 + turn) } else { here.port_unverified(4000 + turn) };
        let (status, longest, at) = follow(&mut here, id, &mut echo);
        println!(
            "blackout {} us, port {} us, longest turn {longest:?} at {at:?} ({quiet:?} before), {} KiB besides, {}",
            status["blackout_us"],
            status["total_us"],
            there.api("GET", "/v1/vm", None)["memory"]["overhead_bytes"].as_u64().unwrap() >> 10,
            status["breakdown"]
        );
        blackouts.push(status["blackout_us"].as_u64().unwrap());
        here = there;
    }
    blackouts.sort_unstable();
    let at = |percent: usize| blackouts[(blackouts.len() - 1) * percent / 100];
    println!("blackout us: least {}, median {}, p90 {}, p99 {}, most {}", at(0), at(50), at(90), at(99), at(100));
    println!("retransmits {}", echo.retransmits());
}

/// A guest that writes memory much faster than the network takes it (a page in no less than `pace_us`), with a client that asks on.
fn writer(mbit: u32, pace_us: u32, extra: &[&str]) -> (Lab, Vmm, Echo) {
    let lab = Lab::new(2);
    let here = lab.boot(&format!("writer pace_us={pace_us}"), extra);
    let echo = Echo::new(&lab);
    let limited = format!("qdisc add dev lo root tbf rate {mbit}mbit burst 256kb latency 100ms");
    let output = std::process::Command::new("tc").args(limited.split(' ')).output().unwrap();
    assert!(output.status.success(), "tc {limited}: {}", String::from_utf8_lossy(&output.stderr));
    (lab, here, echo)
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down() {
    let (lab, mut here, mut echo) = writer(400, 0, &[]);
    let there = lab.receive(1, 4001, &[]);
    let id = here.order(r#"{"to":"127.0.0.1:4001","blackout_ms":20,"limit_ms":20,"throttle_max":98}"#);
    let (status, ..) = follow(&mut here, id, &mut echo);
    assert!(status["throttle_percent"].as_u64().unwrap() >= 30, "{status}");
    assert_eq!(there.state(), "running");
    // It goes on, at full speed, and finds in its memory what it has written.
    for _ in 0..200 {
        echo.turn();
    }
    assert_eq!(there.state(), "running", "{}", lab.console("receive4001"));
}

#[test]
fn a_guest_that_may_not_be_slowed_down_stays() {
    let (lab, here, mut echo) = writer(400, 0, &[]);
    let mut there = lab.receive(1, 4001, &[]);
    let id = here.order(r#"{"to":"127.0.0.1:4001","blackout_ms":5,"limit_ms":5,"throttle_max":0}"#);
    let status = here.wait_port(id);
    assert_eq!(status["state"], "failed", "{status}");
    assert_eq!(status["throttle_percent"], 0);
    let error = status["error"].as_str().unwrap();
    assert!(error.contains("it may not be slowed down") && error.contains("the limit is 5 ms"), "{error}");
    assert_eq!(here.state(), "running");
    echo.turn();
    assert!(there.is_alive(), "it waits for another");
}

/// All announcements of the first 100 ms are lost, as on a link that was down: the bridge has the guest at another place again, and
/// neither side has anything to say.
#[test]
fn a_switch_that_heard_nothing_hears_it_later() {
    let lab = Lab::new(2);
    let here = lab.boot("echo", &[]);
    Echo::new(&lab).turn();
    let there = lab.receive(1, 4001, &[]);
    let bridge = |args: String| {
        let output = std::process::Command::new("bridge").args(args.split(' ')).output().unwrap();
        assert!(output.status.success(), "bridge {args}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(here.wait_port(here.port_to(4001))["state"], "completed");
    let learned = |tap: &str| {
        bridge(format!("fdb show dev {tap}")).lines().any(|l| l.starts_with(port_support::MAC) && l.contains("master"))
    };
    let threads = || std::fs::read_dir(format!("/proc/{}/task", there.pid())).unwrap().flatten();
    let name = |t: std::fs::DirEntry| std::fs::read_to_string(t.path().join("comm")).unwrap_or_default();
    eventually("the first ones are through", || (!threads().any(|t| name(t) == "arrival\n")).then_some(()));
    assert!(learned("tap1"));
    // (The source's tap is no such place any more: nobody has it open.)
    port_support::ip("link add place type veth peer name other");
    port_support::ip("link set other up");
    port_support::ip("link set place master br0 up");
    bridge(format!("fdb replace {} dev place master dynamic", port_support::MAC));
    assert!(learned("place"));
    eventually("a later announcement", || learned("tap1").then_some(()));
    assert_eq!(there.state(), "running");
}

/// A round takes as long as its bytes do: only the answer behind it has a limit, here a fifth of what it usually is.
#[test]
fn a_slow_connection_takes_its_time() {
    let limit = Duration::from_millis(20_000 / 5);
    let (lab, mut here, mut echo) = writer(100, 100, &["--port-hurry", "5"]);
    // Poisoning all that was skipped would take half of the time there is for the hand-over.
    let there = lab.receive_as_shipped(1, 4001, &[]);
    let id = here.order(r#"{"to":"127.0.0.1:4001","blackout_ms":120,"limit_ms":120,"throttle_max":98}"#);
    let (status, ..) = follow(&mut here, id, &mut echo);
    let sending: u64 = status["rounds"].as_array().unwrap().iter().map(|r| r["elapsed_us"].as_u64().unwrap()).sum();
    assert!(Duration::from_micros(sending) > limit, "this tests nothing: {status}");
    assert_eq!(there.state(), "running");
}

#[test]
fn orders_that_contradict_themselves_are_refused() {
    let lab = Lab::new(2);
    let here = lab.boot("echo", &[]);
    let refused = |body: &str, field: &str| {
        let (status, problem) = here.try_api("POST", "/v1/migrations", Some(body)).unwrap();
        assert_eq!((status, problem["field"].as_str()), (400, Some(field)), "{problem}");
    };
    refused(r#"{"to":"127.0.0.1:4001","blackout_ms":20,"limit_ms":10}"#, "limit_ms");
    refused(r#"{"to":"127.0.0.1:4001","throttle_max":99}"#, "throttle_max");
}
