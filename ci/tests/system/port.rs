//! Porting the N-module under load: there and back, cancelled, refused, with the cable pulled.
use crate::{cluster, one_at_a_time, verify, writer};
use serde_json::json;
use std::time::Duration;
use xtask::lab::{Host, NMODULE_IP};
use xtask::modules::{self, Cluster, MIGRATIONS};
use xtask::tcp;

/// Written with FILE_SYNC, it takes far longer than a port.
const FILE: u64 = 384 << 20;

/// Makes a port last some seconds.
fn slow_down(host: &Host) {
    let mut tc = std::process::Command::new("tc");
    tc.args(["qdisc", "add", "dev", "cable", "root", "tbf", "rate", "60mbit", "burst", "128kb", "latency", "100ms"]);
    host.output(&mut tc).unwrap();
}

fn full_speed(host: &Host) {
    host.output(std::process::Command::new("tc").args(["qdisc", "del", "dev", "cable", "root"])).unwrap();
}

fn state(cluster: &Cluster) -> String {
    cluster.nmodule.api.get("/v1/vm").unwrap()["state"].as_str().unwrap().to_owned()
}

#[test]
fn there_and_back_under_load_on_one_connection() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    writer.wait_for(50).unwrap();
    let connection = tcp::connections(&cluster.lab.client1, writer.pid(), NMODULE_IP).unwrap();
    for to_client in [true, false] {
        let to = if to_client { &cluster.lab.client1 } else { &cluster.lab.node1 };
        let receiver = modules::receive_poisoned(&cluster.lab, &cluster.artifacts, to).unwrap();
        let ported = modules::port(&mut cluster.nmodule, to).unwrap();
        assert!(ported.blackout().unwrap() > Duration::ZERO);
        let status = cluster.nmodule.daemon.wait(Duration::from_secs(10)).unwrap();
        assert!(status.success(), "the source's vmm ended with {status}");
        cluster.nmodule = receiver;
        assert_eq!(state(&cluster), "running");
        let again = tcp::connections(&cluster.lab.client1, writer.pid(), NMODULE_IP).unwrap();
        assert_eq!(again.len(), 1, "the writer has ended: {again:?}");
        assert!(again[0].is_same(&connection[0]), "{connection:?} {again:?}");
        let pieces = writer.acknowledged().len();
        writer.wait_for(pieces + 50).unwrap();
    }
    let acknowledged = writer.finish().unwrap();
    verify(&cluster.lab, "file", &acknowledged);
}

#[test]
fn a_cancelled_port_leaves_the_source_running() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    let _receiver = modules::receive_poisoned(&cluster.lab, &cluster.artifacts, &cluster.lab.client1).unwrap();
    slow_down(&cluster.lab.node1);
    let api = &cluster.nmodule.api;
    let job = api.post(MIGRATIONS, &modules::port_request(&cluster.lab.client1)).unwrap();
    let path = format!("{MIGRATIONS}/{}", job["id"].as_str().map_or(job["id"].to_string(), str::to_owned));
    std::thread::sleep(Duration::from_millis(300));
    api.delete(&path).unwrap();
    let mut state_now = String::new();
    for _ in 0..500 {
        state_now = api.get(&path).unwrap()["state"].as_str().unwrap().to_owned();
        if matches!(state_now.as_str(), "cancelled" | "failed" | "completed") {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(state_now, "cancelled");
    assert_eq!(state(&cluster), "running");
    full_speed(&cluster.lab.node1);
    let pieces = writer.acknowledged().len();
    writer.wait_for(pieces + 50).unwrap();
    let acknowledged = writer.finish().unwrap();
    verify(&cluster.lab, "file", &acknowledged);
}

#[test]
fn the_death_of_the_destination_leaves_the_source_running() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    let mut receiver = modules::receive_poisoned(&cluster.lab, &cluster.artifacts, &cluster.lab.client1).unwrap();
    slow_down(&cluster.lab.node1);
    let body = modules::port_request(&cluster.lab.client1);
    let (state_now, ported) = std::thread::scope(|scope| {
        let port = scope.spawn(|| modules::try_port(&mut cluster.nmodule, &body).unwrap());
        std::thread::sleep(Duration::from_millis(500));
        receiver.daemon.kill().unwrap();
        port.join().unwrap()
    });
    assert_eq!(state_now, "failed", "{}", ported.job);
    full_speed(&cluster.lab.node1);
    assert_eq!(state(&cluster), "running");
    let pieces = writer.acknowledged().len();
    writer.wait_for(pieces + 50).unwrap();
    let acknowledged = writer.finish().unwrap();
    verify(&cluster.lab, "file", &acknowledged);
}

#[test]
fn a_port_to_a_host_that_refuses_fails_and_the_source_runs_on() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    // Nobody listens there.
    let (state_now, ported) =
        modules::try_port(&mut cluster.nmodule, &json!({"to": format!("{}:7999", cluster.lab.client1.ip)})).unwrap();
    assert_eq!(state_now, "failed", "{}", ported.job);
    assert!(ported.job["error"].as_str().is_some_and(|e| !e.is_empty()), "{}", ported.job);
    // Something else listens there: no vmm.
    let other = cluster.lab.client1.enter(|| Ok(std::net::TcpListener::bind("10.77.0.2:7998")?)).unwrap();
    let talker = std::thread::spawn(move || other.accept().map(drop));
    let (state_now, ported) =
        modules::try_port(&mut cluster.nmodule, &json!({"to": format!("{}:7998", cluster.lab.client1.ip)})).unwrap();
    assert_eq!(state_now, "failed", "{}", ported.job);
    talker.join().unwrap().unwrap();
    assert_eq!(state(&cluster), "running");
    let pieces = writer.acknowledged().len();
    writer.wait_for(pieces + 50).unwrap();
    let acknowledged = writer.finish().unwrap();
    verify(&cluster.lab, "file", &acknowledged);
}

#[test]
fn a_cable_pulled_during_a_port_loses_nothing() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    writer.wait_for(50).unwrap();
    let mut receiver = modules::receive_poisoned(&cluster.lab, &cluster.artifacts, &cluster.lab.client1).unwrap();
    slow_down(&cluster.lab.node1);
    let body = modules::port_request(&cluster.lab.client1);
    let Cluster { nmodule, lab, .. } = &mut cluster;
    let (state_now, ported) = std::thread::scope(|scope| {
        let port = scope.spawn(|| modules::try_port(nmodule, &body).unwrap());
        std::thread::sleep(Duration::from_millis(500));
        lab.client1.cable(false).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        lab.client1.cable(true).unwrap();
        port.join().unwrap()
    });
    full_speed(&cluster.lab.node1);
    // Either way: one of them runs, never both.
    let source_ended = state_now == "completed";
    if source_ended {
        cluster.nmodule.daemon.wait(Duration::from_secs(10)).unwrap();
        std::mem::swap(&mut cluster.nmodule, &mut receiver);
    }
    assert_eq!(state(&cluster), "running", "{}", ported.job);
    let acknowledged = writer.finish().unwrap();
    verify(&cluster.lab, "file", &acknowledged);
}
