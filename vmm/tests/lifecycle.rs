//! The life of a `vmm` that is configured over its control socket, and what it tells those who watch.

#![allow(clippy::unwrap_used)]

mod control;
mod guest;

use std::io::{BufRead, BufReader, Write};
use std::time::Duration;

use control::{Process, park_for_ever};
use serde_json::{Value, json};

/// The calling thread and what it starts have a network of their own.
fn network_namespace() {
    // SAFETY: no memory is involved; only this thread changes its namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
}

fn state(p: &mut Process) -> String {
    p.json("GET", "/v1/vm", "").1["state"].as_str().unwrap().to_owned()
}

/// Lines of an event stream.
fn events(p: &mut Process, headers: &str) -> BufReader<std::os::unix::net::UnixStream> {
    let mut stream = p.connect();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET /v1/events HTTP/1.0\r\n{headers}\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
    reader
}

/// The next event: name, id, data. `None` at the end.
fn next_event(reader: &mut impl BufRead) -> Option<(String, u64, Value)> {
    let (mut name, mut id, mut data) = (String::new(), 0, Value::Null);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() == 0 {
            return None;
        }
        match line.trim_end().split_once(": ") {
            Some(("event", v)) => name = v.to_owned(),
            Some(("id", v)) => id = v.parse().unwrap(),
            Some(("data", v)) => data = serde_json::from_str(v).unwrap(),
            _ if !data.is_null() => return Some((name, id, data)),
            _ => {}
        }
    }
}

#[test]
fn configured_booted_and_watched_over_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, guest::image(park_for_ever())).unwrap();
    let mut p = Process::empty(dir.path());
    assert_eq!(state(&mut p), "unconfigured");
    // nothing is there yet, and each says what to do
    for (method, path) in [
        ("GET", "/v1/vm/config"),
        ("PUT", "/v1/vm/boot"),
        ("PUT", "/v1/vm/pause"),
        ("PUT", "/v1/vm/resume"),
        ("PUT", "/v1/vm/reset"),
        ("POST", "/v1/migrations"),
    ] {
        let (status, problem) = p.json(method, path, r#"{"to":"127.0.0.1:1"}"#);
        assert_eq!((status, problem["type"].as_str()), (409, Some("urn:outrigger:vmm:conflict")), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("PUT /v1/vm/"), "{problem}");
    }
    let mut watch = events(&mut p, "");
    let (name, _, data) = next_event(&mut watch).unwrap();
    assert_eq!((name.as_str(), data["state"].as_str()), ("state", Some("unconfigured")));

    // every mistake, by its path, and nothing is kept
    let (status, problem) = p.json("PUT", "/v1/vm/config", r#"{"memory":"3M","nets":[{"tap":"a/b"},{}],"image":""}"#);
    assert_eq!((status, problem["type"].as_str()), (400, Some("urn:outrigger:vmm:invalid")));
    let mut fields: Vec<&str> =
        problem["errors"].as_array().unwrap().iter().map(|e| e["field"].as_str().unwrap()).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["image", "memory", "nets[0].tap", "nets[1]"]);
    let (_, problem) = p.json("PUT", "/v1/vm/config", r#"{"memory":"x","disks":[{"path":"p"},{"pat":1}],"colour":1}"#);
    assert_eq!(problem["errors"].as_array().unwrap().len(), 3, "{problem}");
    assert_eq!(state(&mut p), "unconfigured");

    // in parts; what is missing is said at boot
    let (status, config) = p.json("PATCH", "/v1/vm/config", r#"{"memory":"8M","serial":"none","name":"rest"}"#);
    assert_eq!((status, config["memory"].as_u64()), (200, Some(8 << 20)), "{config}");
    let (status, problem) = p.json("PUT", "/v1/vm/boot", "");
    assert_eq!((status, problem["field"].as_str()), (400, Some("image")), "{problem}");
    let (status, problem) = p.json("PATCH", "/v1/vm/config", r#"{"memory":"3M"}"#);
    assert_eq!((status, problem["field"].as_str()), (400, Some("memory")), "{problem}");
    // an image that cannot be booted is no end
    let text = dir.path().join("text");
    std::fs::write(&text, "no image").unwrap();
    let (status, _) = p.json("PATCH", "/v1/vm/config", &json!({ "image": text }).to_string());
    assert_eq!(status, 200);
    let (status, problem) = p.json("PUT", "/v1/vm/boot", "");
    assert_eq!((status, problem["type"].as_str()), (422, Some("urn:outrigger:vmm:unusable")), "{problem}");
    assert_eq!(state(&mut p), "configured");
    let (status, _) = p.json("PATCH", "/v1/vm/config", &json!({ "image": image }).to_string());
    assert_eq!(status, 200);
    let (status, vm) = p.json("PUT", "/v1/vm/boot", "");
    assert_eq!((status, vm["config"]["name"].as_str()), (200, Some("rest")), "{vm}");
    p.serving();
    for (method, path, body) in
        [("PUT", "/v1/vm/config", json!({ "image": image })), ("PUT", "/v1/vm/boot", Value::Null)]
    {
        let (status, problem) = p.json(method, path, &body.to_string());
        assert_eq!(status, 409, "{problem}");
    }
    let (status, problem) = p.json("PUT", "/v1/vm/power-button", "");
    assert_eq!(status, 409, "an image that was started directly has no ACPI: {problem}");
    assert_eq!(p.json("PUT", "/v1/vm/pause", "").1["state"], "paused");
    assert_eq!(p.json("PUT", "/v1/vm/resume", "").1["state"], "running");
    assert_eq!(p.json("PUT", "/v1/vm/shutdown", "").0, 202);

    // who watched has seen all of it
    let mut seen = Vec::new();
    let mut last = 0;
    while let Some((name, id, data)) = next_event(&mut watch) {
        assert!(id > last && data["time_ms"].is_u64(), "{data}");
        last = id;
        seen.push(format!("{name} {}", data["state"].as_str().unwrap_or_default()));
    }
    let states: Vec<&str> = seen.iter().map(|s| s.strip_prefix("state ").unwrap()).collect();
    assert_eq!(states, ["configured", "configured", "configured", "running", "paused", "running", "ended"]);
    assert_eq!(p.wait(), Some(0));
}

#[test]
fn who_comes_back_is_told_what_it_missed_and_streams_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut p = Process::start(dir.path(), park_for_ever(), &[]);
    p.serving();
    for _ in 0..2 {
        p.json("PUT", "/v1/vm/pause", "");
        p.json("PUT", "/v1/vm/resume", "");
    }
    // running, paused, running, paused, running
    let mut back = events(&mut p, "Last-Event-ID: 3\r\n");
    let ids: Vec<_> =
        (0..2).map(|_| next_event(&mut back).unwrap()).map(|(_, id, d)| (id, d["state"].clone())).collect();
    assert_eq!(ids, [(4, json!("paused")), (5, json!("running"))]);
    let mut open = vec![back];
    let mut refused = None;
    for _ in 0..32 {
        let mut stream = p.connect();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET /v1/events HTTP/1.0\r\n\r\n").unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if !line.contains(" 200 ") {
            refused = Some(line);
            break;
        }
        open.push(reader);
    }
    assert!(refused.as_deref().is_some_and(|l| l.contains(" 503 ")), "{refused:?}");
    assert_eq!(open.len(), 16);
    drop(open);
    p.json("PUT", "/v1/vm/pause", "");
}

#[test]
fn kill_waits_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut p = Process::start(dir.path(), park_for_ever(), &[]);
    p.serving();
    assert_eq!(p.json("PUT", "/v1/vm/kill", "").0, 202);
    assert_eq!(p.wait(), Some(137));
    assert!(!p.socket.exists());
}

#[test]
fn devices_are_listed_and_the_balloon_has_a_target() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    network_namespace();
    let mut p = Process::empty(dir.path());
    p.connect();
    assert_eq!(p.json("GET", "/v1/devices", "").0, 409);
    let image = dir.path().join("image");
    std::fs::write(&image, guest::image(park_for_ever())).unwrap();
    let config = json!({
        "image": image, "memory": "8M", "serial": "none", "disks": [{ "path": disk }], "balloon": {},
        "nets": [{ "tap": "tap0" }],
    });
    let (status, answer) = p.json("PUT", "/v1/vm/config", &config.to_string());
    assert_eq!(status, 200, "{answer}");
    assert_eq!(p.json("PUT", "/v1/vm/boot", "").0, 200);
    let (status, all) = p.json("GET", "/v1/devices", "");
    assert_eq!(status, 200);
    let ids: Vec<_> = all["devices"].as_array().unwrap().iter().map(|d| (&d["id"], &d["kind"], &d["driver"])).collect();
    assert!(ids.contains(&(&json!("disk0"), &json!("block"), &json!("idle"))), "{ids:?}");
    let (status, balloon) = p.json("PUT", "/v1/devices/balloon0/target", r#"{"target":"2M"}"#);
    assert_eq!((status, balloon["balloon"]["target"].as_u64()), (200, Some(2 << 20)), "{balloon}");
    let (_, balloon) = p.json("GET", "/v1/devices/balloon0", "");
    assert_eq!(balloon["balloon"]["target"].as_u64(), Some(2 << 20));
    let tx = r#"{"tx_limits":{"bytes":{"rate":"10M","burst":4096}}}"#;
    let (status, net) = p.json("PUT", "/v1/devices/net0/limits", tx);
    assert_eq!((status, net["tx_limits"]["bytes"]["rate"].as_u64()), (200, Some(10 << 20)), "{net}");
    assert!(net["rx_limits"]["bytes"].is_null());
    let (_, net) = p.json("PUT", "/v1/devices/net0/limits", r#"{"tx_limits":{}}"#);
    assert!(net["tx_limits"]["bytes"].is_null(), "{net}");
    let ops = r#"{"limits":{"ops":{"rate":100}}}"#;
    let (status, answer) = p.json("PUT", "/v1/devices/disk0/limits", ops);
    assert_eq!((status, answer["limits"]["ops"]["rate"].as_u64()), (200, Some(100)), "{answer}");
    let (status, answer) = p.json("PUT", "/v1/devices/disk0/size", r#"{"size":"2M"}"#);
    assert_eq!((status, answer["bytes"].as_u64()), (200, Some(2 << 20)), "{answer}");
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 2 << 20);
    let zero = r#"{"rx_limits":{"ops":{"rate":0}}}"#;
    for (method, path, body, status, field) in [
        ("PUT", "/v1/devices/net0/limits", zero, 400, Some("rx_limits.ops.rate")),
        ("PUT", "/v1/devices/balloon0/limits", "{}", 409, None),
        ("PUT", "/v1/devices/net0/limits", ops, 400, Some("limits")),
        ("PUT", "/v1/devices/disk0/limits", r#"{"rx_limits":{}}"#, 400, Some("rx_limits")),
        ("PUT", "/v1/devices/disk0/size", r#"{"size":"1M"}"#, 409, None),
        ("PUT", "/v1/devices/net0/size", r#"{"size":"1M"}"#, 409, None),
        ("GET", "/v1/devices/nothing", "", 404, None),
        ("PUT", "/v1/devices/nothing/target", r#"{"target":1}"#, 404, None),
        ("PUT", "/v1/devices/disk0/target", r#"{"target":1}"#, 409, None),
        ("PUT", "/v1/devices/balloon0/target", r#"{"target":"8M"}"#, 400, Some("target")),
        ("PUT", "/v1/devices/balloon0/target", r#"{"target":-1}"#, 400, Some("target")),
        ("PUT", "/v1/devices/balloon0/target", r#"{"size":1}"#, 400, Some("size")),
    ] {
        let (got, problem) = p.json(method, path, body);
        assert_eq!((got, problem["field"].as_str()), (status, field), "{method} {path} {body}: {problem}");
    }
}
