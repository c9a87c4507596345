//! The measuring tools against a server known to be good.
use crate::one_at_a_time;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};
use xtask::artifacts::{data_dir, workspace_root};
use xtask::ganesha::Ganesha;
use xtask::lab::{Lab, NODE1_IP};
use xtask::load::{Load, Mode};
use xtask::probe::Prober;
use xtask::throughput::Sampler;
use xtask::{setup, tcp};

#[test]
fn a_pulled_cable_is_seen_as_a_silence_and_retransmits() {
    let _one = one_at_a_time();
    let lab = Lab::create(&data_dir().unwrap()).unwrap();
    let server = Ganesha::start(&lab).unwrap();
    let before = tcp::retransmits(&lab.client1).unwrap();
    let prober = Prober::start(&lab.client1, SocketAddrV4::new(NODE1_IP, 2049).into()).unwrap();
    let sampler = Sampler::start(&lab.client1);
    let connection = tcp::connections(&lab.client1, std::process::id(), NODE1_IP).unwrap();
    assert_eq!(connection.len(), 1);
    std::thread::sleep(Duration::from_millis(300));

    let pulled = Instant::now();
    lab.node1.cable(false).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    lab.node1.cable(true).unwrap();
    let plugged = Instant::now();
    std::thread::sleep(Duration::from_secs(2));

    // The far cable: a frame that the local device drops is not a segment sent.
    let again = tcp::connections(&lab.client1, std::process::id(), NODE1_IP).unwrap();
    assert!(again[0].is_same(&connection[0]), "{connection:?} {again:?}");
    let all = tcp::retransmits(&lab.client1).unwrap() - before;
    assert!(again[0].retransmits > 0 && all >= again[0].retransmits, "{again:?} {all}");
    let end = Instant::now();
    let log = prober.finish().unwrap();
    assert!(log.questions() > 100);
    assert_eq!(log.unanswered(), 0);
    let silence = log.longest_silence(pulled, plugged).unwrap();
    assert!(silence >= Duration::from_millis(150), "{silence:?}");
    assert!(sampler.finish().unwrap().mb_s(pulled, end).unwrap() > 0.0);
    drop(server);
}

#[test]
fn the_load_generator_writes_and_reads() {
    let _one = one_at_a_time();
    let data = data_dir().unwrap();
    let program = setup::load_generator(&workspace_root(), &data).unwrap();
    let lab = Lab::create(&data).unwrap();
    let server = Ganesha::start(&lab).unwrap();
    let url = server.url("file");
    let load = Load { mode: Mode::Fill, request_bytes: 1 << 20, depth: 4, seconds: 0.2, file_bytes: 32 << 20 };
    let report = load.run(&program, &lab.client1, &url).unwrap();
    assert_eq!(report.operations, 32.0);
    assert_eq!(std::fs::metadata(lab.data_dir().join("ganesha/file")).unwrap().len(), 32 << 20);
    for (mode, request_bytes) in [(Mode::Write, 1 << 20), (Mode::Read, 1 << 20), (Mode::RandomRead, 4096)] {
        let report = Load { mode, request_bytes, ..load }.run(&program, &lab.client1, &url).unwrap();
        assert!(report.operations > 0.0 && report.p50_us <= report.p99_us);
    }
    let missing = Load { mode: Mode::Read, ..load }.run(&program, &lab.client1, &server.url("missing"));
    assert!(format!("{:#}", missing.unwrap_err()).contains("open"));
    assert!(server.cpu_seconds().unwrap() > 0.0);
}
