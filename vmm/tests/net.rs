//! Network devices of real `vmm` processes on /dev/kvm: what a user can get wrong, limits, a tap that vanishes, a back end
//! that is another process.
#![allow(clippy::unwrap_used)]

mod net_support;
mod port_support;

use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};

use port_support::{Echo, GUEST, Lab, MAC, Vmm, eventually, image, ip};

/// What `vmm` says when it cannot start.
fn refused(net: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["--image", image().to_str().unwrap(), "--net", net])
        .output()
        .unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{net}: {}", output.status);
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn metric(vmm: &Vmm, line: &str) -> bool {
    let mut socket = std::os::unix::net::UnixStream::connect(&vmm.sock).unwrap();
    use std::io::Write;
    write!(socket, "GET /v1/metrics HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text.lines().any(|l| l.trim() == line)
}

#[test]
fn mistakes_name_their_field() {
    let _lab = Lab::new(1);
    for (net, field) in [
        ("tap=tap0,queues=0", "nets[0].queues"),
        ("tap=tap0,queues=17", "nets[0].queues"),
        ("tap=tap0,queues=4", "multi_queue"),
        ("tap=tap0,vhost=yes", "--net[0].vhost"),
        ("tap=tap0,vhost=on,rx_bytes=1M", "nets[0].vhost"),
        ("tap=tap0,vhost=on", "nets[0].vhost"),
        ("tap=tap0,tx_ops=0", "nets[0].tx_limits.ops.rate"),
        ("tap=tap0,vhost_user=x", "nets[0]"),
        ("vhost_user=/nowhere", "nets[0].vhost_user"),
        ("vhost_user=/nowhere,queues=2", "nets[0].queues"),
    ] {
        let said = refused(net);
        assert!(said.contains(field), "{net}: {said}");
    }
}

#[test]
fn the_vm_outlives_its_tap() {
    let lab = Lab::new(1);
    let mut vmm = lab.boot("echo", &[]);
    Echo::new(&lab).turn();
    assert!(metric(&vmm, "vmm_net_link_up{device=\"lan\"} 1"));
    ip("link del tap0");
    eventually("the link is down", || metric(&vmm, "vmm_net_link_up{device=\"lan\"} 0").then_some(()));
    assert!(metric(&vmm, "vmm_net_taps_lost_total{device=\"lan\"} 1"));
    assert_eq!(vmm.state(), "running");
    assert!(vmm.is_alive());
    let log = std::fs::read_to_string(lab.dir.path().join("boot.log")).unwrap();
    assert!(log.contains("lan: interface tap0 was deleted"), "{log}");
}

#[test]
fn limits_hold_for_a_stream_in_both_directions() {
    const BYTES: usize = 1 << 20;
    // Both may come at once: a bucket goes into debt for one frame, however long.
    const BURST: usize = 256 << 10;
    const FRAME: usize = 64 << 10;
    let lab = Lab::new(1);
    let cmdline = format!("test=echo ip={GUEST}/24 log=warn");
    let net = format!("tap=tap0,mac={MAC},id=lan,rx_bytes=2M:256K,tx_bytes=2M:256K");
    let args = ["--image", image().to_str().unwrap(), "--memory", "64M", "--cmdline", &cmdline, "--net", &net];
    let vmm = lab.spawn("boot", &args);
    let at_least = Duration::from_secs_f64((BYTES - BURST - FRAME) as f64 / (2 << 20) as f64);
    use std::io::Write;
    let mut sink = lab.connect(9);
    let start = Instant::now();
    sink.write_all(&vec![7; BYTES]).unwrap();
    sink.shutdown(std::net::Shutdown::Write).unwrap();
    let mut count = [0; 8];
    sink.read_exact(&mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), BYTES as u64);
    assert!(start.elapsed() >= at_least, "{:?}", start.elapsed());
    let mut source = lab.connect(19);
    let start = Instant::now();
    source.write_all(&(BYTES as u64).to_le_bytes()).unwrap();
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), BYTES);
    assert!(start.elapsed() >= at_least, "{:?}", start.elapsed());
    assert!(!metric(&vmm, "vmm_net_rx_throttled_total{device=\"lan\"} 0"));
    assert!(!metric(&vmm, "vmm_net_tx_throttled_total{device=\"lan\"} 0"));
}

#[test]
fn several_queues_are_there_for_a_driver_that_uses_one() {
    let lab = Lab::new(0);
    ip("tuntap add mode tap vnet_hdr multi_queue name tap0");
    ip("link set tap0 master br0 up");
    let cmdline = format!("test=echo ip={GUEST}/24 log=warn");
    let net = format!("tap=tap0,mac={MAC},id=lan,queues=4");
    let args = ["--image", image().to_str().unwrap(), "--memory", "64M", "--cmdline", &cmdline, "--net", &net];
    let vmm = lab.spawn("boot", &args);
    let mut clients: Vec<_> = (0..8).map(|_| Echo::new(&lab)).collect();
    for _ in 0..50 {
        for client in &mut clients {
            client.turn();
        }
    }
    assert!(metric(&vmm, "vmm_net_queue_pairs{device=\"lan\"} 1"));
}

#[test]
fn another_process_works_the_queues() {
    let lab = Lab::new(1);
    let (mut vmm, connection) = net_support::boot(&lab);
    let mut echo = Echo::new(&lab);
    for _ in 0..200 {
        echo.turn();
    }
    assert!(metric(&vmm, "vmm_vhost_user_connected{device=\"lan\"} 1"));
    // what cannot be is refused with the reason
    let (status, answer) = vmm.try_api("POST", "/v1/migrations", Some("{\"to\":\"127.0.0.1:9\"}")).unwrap();
    assert!(status >= 400 && answer.to_string().contains("vhost_user"), "{status} {answer}");
    // the back end goes, the VM stays
    connection.shutdown();
    eventually("its end is noticed", || metric(&vmm, "vmm_vhost_user_connected{device=\"lan\"} 0").then_some(()));
    assert_eq!(vmm.state(), "running");
    assert!(vmm.is_alive());
}
