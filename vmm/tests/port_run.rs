//! Porting between real `vmm` processes on /dev/kvm: there and back, with a client that does not notice.

mod port_support;

use port_support::arbiter::Arbiter;
use port_support::{Echo, Lab};

/// Ports from one process to another and checks everything a user sees.
fn port(from: &mut port_support::Vmm, to_port: u16, echo: &mut Echo) -> serde_json::Value {
    let id = from.port_to(to_port);
    let mut longest = std::time::Duration::ZERO;
    loop {
        longest = longest.max(echo.turn());
        match from.try_api("GET", &format!("/v1/migrations/{id}"), None) {
            Some((200, status)) if status["state"] == "running" => {}
            Some((200, status)) => {
                assert_eq!(status["state"], "completed", "{status}");
                for _ in 0..50 {
                    longest = longest.max(echo.turn());
                }
                println!("blackout {} us, longest turn {longest:?}, {status}", status["blackout_us"]);
                assert!(from.wait().success(), "the source ends with status 0");
                return status;
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
    for turn in 0..6u16 {
        let mut there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        assert_eq!(there.state(), "receiving");
        let status = port(&mut here, 4000 + turn, &mut echo);
        assert!(status["blackout_us"].as_u64().unwrap() > 0);
        assert_eq!(there.state(), "running");
        assert!(there.is_alive());
        here = there;
    }
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
        port(&mut here, 4000 + turn, &mut echo);
        assert_eq!(arbiter.record(9).unwrap().epoch.0, u64::from(turn) + 1);
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
