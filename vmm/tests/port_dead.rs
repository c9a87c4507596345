//! Pages without content: they do not come, nobody misses them, and who does not know of that gets all.
#![allow(clippy::unwrap_used)]

mod port_support;

use migration::message::feature;
use port_support::puppet::{Puppet, Until};
use port_support::{Echo, Lab, eventually};

/// Whole pages in the receive buffers of a guest of 64 MiB: 64 buffers, each of 17 pages and wherever the heap puts it.
const POSTED: u64 = 64 * 16;

/// With frames coming all the time, so that buffers are written, used, and posted again from round to round.
#[test]
fn receive_buffers_are_not_sent() {
    let lab = Lab::new(2);
    let mut here = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let mut crowd: Vec<Echo> = (0..4).map(|_| Echo::new(&lab)).collect();
    for turn in 0..4u16 {
        let there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        // Frames have been in every buffer.
        crowd.iter_mut().for_each(|echo| echo.turns(50));
        let id = here.port_to(4000 + turn);
        let status = eventually("the port is over", || {
            crowd.iter_mut().for_each(|echo| echo.turns(1));
            match here.try_api("GET", &format!("/v1/migrations/{id}"), None) {
                Some((200, status)) => (status["state"] != "running").then_some(status),
                _ => panic!("the source was not seen to the end"),
            }
        });
        assert_eq!(status["state"], "completed", "{status}");
        let first = &status["rounds"][0];
        assert!((POSTED - 64..=POSTED + 64).contains(&first["posted_pages"].as_u64().unwrap()), "{status}");
        assert!(status["posted_pages"].as_u64() >= first["posted_pages"].as_u64(), "{status}");
        let log = std::fs::read_to_string(lab.dir.path().join(format!("receive{}.log", 4000 + turn))).unwrap();
        assert!(log.contains("pages that were skipped are poisoned"), "{log}");
        here = there;
        echo.turns(10);
        crowd.iter_mut().for_each(|echo| echo.turns(50));
    }
    assert_eq!(echo.retransmits(), 0);
}

/// A guest whose heap changes all the time, ported again and again: it compares what it has, and free pages are poisoned.
#[test]
fn free_pages_are_not_sent() {
    let lab = Lab::new(2);
    let mut here = lab.boot("heap", &[]);
    let mut echo = Echo::new(&lab);
    let (mut skipped_late, mut met) = (0, 0);
    for turn in 0..12u16 {
        let there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        echo.turns(50);
        let id = here.port_to(4000 + turn);
        let status = eventually("the port is over", || {
            echo.turn();
            match here.try_api("GET", &format!("/v1/migrations/{id}"), None) {
                Some((200, status)) => (status["state"] != "running").then_some(status),
                _ => panic!("the source was not seen to the end"),
            }
        });
        assert_eq!(status["state"], "completed", "{status}");
        let rounds = status["rounds"].as_array().unwrap();
        // More than half of the guest's memory is never in use at once; a round that met an allocation each time it looked is possible.
        let first = rounds[0]["free_pages"].as_u64().unwrap();
        assert!(first > 4000 || first == 0, "{status}");
        met += u32::from(first == 0);
        skipped_late += rounds[1..].iter().map(|r| r["free_pages"].as_u64().unwrap()).sum::<u64>();
        skipped_late += status["residue_free_pages"].as_u64().unwrap();
        here = there;
        echo.turns(200);
        assert_eq!(here.state(), "running", "{}", lab.console(&format!("receive{}", 4000 + turn)));
    }
    assert!(met <= 3, "{met} of 12 first rounds found no map that holds");
    assert!(skipped_late > 0, "pages freed after they were written in later rounds, too");
}

#[test]
fn a_peer_that_does_not_know_of_it_gets_every_page() {
    let lab = Lab::plain(1);
    let here = lab.boot("echo", &[]);
    Echo::new(&lab).turn();
    let mut came = [[0; 3]; 2];
    for (features, came) in [0, feature::SKIP].into_iter().zip(&mut came) {
        let mut puppet = Puppet::new();
        puppet.features = features;
        let id = here.port_to(puppet.port());
        let stopped = puppet.follow(Until::PreCopy, 0);
        *came = stopped.pages;
        drop(stopped);
        assert_eq!(here.wait_port(id)["state"], "failed");
    }
    let [without, with] = came;
    assert_eq!(without[2], 0);
    assert!(with[2] >= POSTED - 64, "{with:?}");
    assert!(with[0] < without[0], "{with:?} {without:?}");
}
