//! TCP: from this process to the image through QEMU's user network, and between two images over taps and a bridge.
use crate::harness::{Monitor, Vm};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

/// Answers never take this long unless there are none.
const PATIENCE: Duration = Duration::from_secs(60);
const ECHO: u16 = 7;
const SINK: u16 = 9;
const SOURCE: u16 = 19;
const QUIT: u16 = 99;

/// The byte at an offset of the image's stream.
fn byte(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

/// Ports of this host that lead to those of the image.
struct Forwarded(Vec<(u16, SocketAddr)>);

impl Forwarded {
    fn new() -> Self {
        // Held together, so that they are different.
        let held: Vec<_> = [ECHO, SINK, SOURCE, QUIT].map(|p| (p, TcpListener::bind("127.0.0.1:0").unwrap())).into();
        Forwarded(held.iter().map(|(p, l)| (*p, l.local_addr().unwrap())).collect())
    }

    fn option(&self) -> String {
        let rules = self.0.iter().map(|(p, at)| format!(",hostfwd=tcp:{at}-10.0.2.15:{p}"));
        format!("user,id=n,restrict=on{}", rules.collect::<String>())
    }

    fn connect(&self, port: u16) -> TcpStream {
        let (_, at) = self.0.iter().find(|(p, _)| *p == port).unwrap();
        let stream = TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Waits until the image answers: QEMU takes connections before it does.
    fn wait(&self) {
        for _ in 0..600 {
            let mut one = [0];
            if let Ok(mut stream) = TcpStream::connect(self.0[0].1)
                && stream.set_read_timeout(Some(Duration::from_secs(1))).is_ok()
                && stream.write_all(b"?").is_ok()
                && stream.read_exact(&mut one).is_ok()
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the image does not answer");
    }
}

#[test]
fn streams_through_qemu() {
    let forwarded = Forwarded::new();
    let vm = Vm::new(Monitor::Tcg, 48, "test=echo ip=10.0.2.15/24,10.0.2.2")
        .args(&["-netdev", &forwarded.option(), "-device", "virtio-net-device,netdev=n"])
        .start();
    forwarded.wait();

    let data: Vec<u8> = (0..3_000_000).map(byte).collect();
    let mut echo = forwarded.connect(ECHO);
    let mut sender = echo.try_clone().unwrap();
    let copy = data.clone();
    let sending = std::thread::spawn(move || {
        sender.write_all(&copy).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    echo.read_to_end(&mut back).unwrap();
    sending.join().unwrap();
    assert!(back == data, "{} of {} bytes", back.len(), data.len());

    let mut sink = forwarded.connect(SINK);
    sink.write_all(&data).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut count = [0; 8];
    sink.read_exact(&mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), data.len() as u64);

    let mut source = forwarded.connect(SOURCE);
    source.write_all(&(data.len() as u64).to_le_bytes()).unwrap();
    back.clear();
    source.read_to_end(&mut back).unwrap();
    assert!(back == data);

    // Several at once, in an order of their own.
    let mut several: Vec<_> = (0..6).map(|_| forwarded.connect(ECHO)).collect();
    for (i, stream) in several.iter_mut().enumerate() {
        stream.write_all(&[i as u8; 100]).unwrap();
    }
    for (i, stream) in several.iter_mut().enumerate().rev() {
        let mut answer = [0; 100];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [i as u8; 100]);
    }
    drop(several);

    forwarded.connect(QUIT).read_to_end(&mut back).unwrap();
    vm.wait().is_well(&["serving", "asked to quit"]);
}

/// A network namespace with a bridge and two taps; gone when dropped.
struct Namespace(String);

impl Namespace {
    fn new(name: &str) -> Self {
        let namespace = Namespace(format!("{name}-{}", std::process::id()));
        ip(&["netns", "add", &namespace.0]);
        for arguments in [
            &["link", "add", "br0", "type", "bridge"][..],
            &["tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"],
            &["tuntap", "add", "tap1", "mode", "tap", "vnet_hdr"],
            &["link", "set", "tap0", "master", "br0", "up"],
            &["link", "set", "tap1", "master", "br0", "up"],
            &["link", "set", "br0", "up"],
        ] {
            ip(&[&["-n", &namespace.0], arguments].concat());
        }
        namespace
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn ip(arguments: &[&str]) {
    let out = Command::new("ip").args(arguments).output().expect("ip of iproute2");
    assert!(out.status.success(), "ip {arguments:?} (needs root): {}", String::from_utf8_lossy(&out.stderr));
}

fn two_images(monitor: Monitor, name: &str) {
    let namespace = Namespace::new(name);
    let with_tap = |vm: Vm, tap: &str, mac: &str| {
        if monitor.is_qemu() {
            let netdev = format!("tap,id=n,ifname={tap},script=no,downscript=no");
            vm.args(&["-netdev", &netdev, "-device", &format!("virtio-net-device,netdev=n,mac={mac}")])
        } else {
            vm.args(&["--net", &format!("tap={tap},mac={mac}")])
        }
    };
    let server = Vm::new(monitor, 48, "test=echo ip=10.9.0.2/24");
    let server = with_tap(server, "tap0", "02:00:00:00:00:02").in_namespace(&namespace.0).start();
    let client = Vm::new(monitor, 48, "test=client ip=10.9.0.3/24 peer=10.9.0.2:7 quit=10.9.0.2:99");
    let client = with_tap(client, "tap1", "02:00:00:00:00:03").in_namespace(&namespace.0).run();
    client.is_well(&["segmentation: true", "echo of 2000000 bytes is right", "port 1: the connection was refused"]);
    server.wait().is_well(&["asked to quit"]);
}

#[test]
fn two_images_under_our_vmm() {
    two_images(Monitor::Direct, "guestrt-vmm");
}

#[test]
fn two_images_under_qemu() {
    two_images(Monitor::QemuKvm, "guestrt-qemu");
}
