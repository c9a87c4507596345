//! Clients that mean no good, against the real N-module in 32 MiB: others go on being served.
use crate::{cluster, one_at_a_time};
use socket2::{Domain, Socket, Type};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use xtask::lab::{CLIENT1_IP, Lab, NMODULE_IP};
use xtask::{copy, modules::Cluster};

/// More than a client waits for anything that works.
const PATIENCE: Duration = Duration::from_secs(30);
const NFS: u32 = 100_003;
const MOUNT: u32 = 100_005;
const READ: u32 = 6;

/// From a privileged port, as the N-module wants it.
fn connect() -> TcpStream {
    static PORT: AtomicU16 = AtomicU16::new(0);
    let server = SocketAddr::from((NMODULE_IP, 2049));
    let attempt = || {
        let port = 512 + PORT.fetch_add(1, Ordering::Relaxed) % 512;
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
        socket.bind(&SocketAddr::from((CLIENT1_IP, port)).into()).ok()?;
        socket.connect_timeout(&server.into(), PATIENCE).ok()?;
        Some(TcpStream::from(socket))
    };
    let stream = std::iter::repeat_with(attempt).take(512).flatten().next().expect("a free privileged port");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A call with its record mark, and AUTH_SYS of root.
fn call(program: u32, procedure: u32, arguments: &[u8]) -> Vec<u8> {
    let words = [7, 0, 2, program, 3, procedure, 1, 20, 0, 0, 0, 0, 0, 0, 0];
    let mark = 0x8000_0000 | (words.len() * 4 + arguments.len()) as u32;
    let words = std::iter::once(mark).chain(words).flat_map(u32::to_be_bytes);
    words.chain(arguments.iter().copied()).collect()
}

fn opaque(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u32).to_be_bytes().to_vec();
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// The results of a call that was accepted and executed.
fn ask(stream: &mut TcpStream, call: &[u8]) -> Vec<u8> {
    stream.write_all(call).unwrap();
    let mut mark = [0; 4];
    stream.read_exact(&mut mark).unwrap();
    let mut reply = vec![0; (u32::from_be_bytes(mark) & 0x7fff_ffff) as usize];
    stream.read_exact(&mut reply).unwrap();
    let header = [0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(reply[..24], header);
    reply[24..].to_vec()
}

fn handle(results: &[u8]) -> Vec<u8> {
    assert_eq!(results[..8], [0, 0, 0, 0, 0, 0, 0, 24]);
    results[8..32].to_vec()
}

/// A file of 8 MiB on the N-module; its handle.
fn file(cluster: &Cluster) -> Vec<u8> {
    let source = cluster.lab.data_dir().join("in");
    copy::random_file(&source, 8 << 20).unwrap();
    let mut copying = Command::new("nfs-cp");
    cluster.lab.client1.output(copying.arg(&source).arg(copy::url("file"))).unwrap();
    inside(&cluster.lab, || {
        let mut stream = connect();
        let root = handle(&ask(&mut stream, &call(MOUNT, 1, &opaque(b"/vol0"))));
        let name = [opaque(&root), opaque(b"file")].concat();
        handle(&ask(&mut stream, &call(NFS, 3, &name)))
    })
}

fn inside<T: Send>(lab: &Lab, f: impl FnOnce() -> T + Send) -> T {
    lab.client1.enter(|| Ok(f())).unwrap()
}

fn read(file: &[u8], offset: u64, count: u32) -> Vec<u8> {
    let arguments = [opaque(file), offset.to_be_bytes().to_vec(), count.to_be_bytes().to_vec()].concat();
    call(NFS, READ, &arguments)
}

/// NULL, a small call and a large one are answered.
fn others_are_served(file: &[u8]) {
    let mut stream = connect();
    assert!(ask(&mut stream, &call(NFS, 0, &[])).is_empty());
    assert_eq!(ask(&mut stream, &call(NFS, 1, &opaque(file)))[..4], [0; 4]);
    assert!(ask(&mut stream, &read(file, 0, 1 << 20)).len() > 1 << 20);
}

#[test]
fn clients_that_never_read_their_replies() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let file = file(&cluster);
    inside(&cluster.lab, || {
        let silent: Vec<TcpStream> = (0..8)
            .map(|_| {
                let mut stream = connect();
                for index in 0..32 {
                    stream.write_all(&read(&file, (index % 8) << 20, 1 << 20)).unwrap();
                }
                stream
            })
            .collect();
        others_are_served(&file);
        drop(silent);
        others_are_served(&file);
    });
}

#[test]
fn clients_that_send_half_a_record() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let file = file(&cluster);
    inside(&cluster.lab, || {
        let half: Vec<TcpStream> = (0..10)
            .map(|_| {
                let mut stream = connect();
                stream.write_all(&(0x8000_0000u32 | 1 << 20).to_be_bytes()).unwrap();
                stream.write_all(&[0; 100]).unwrap();
                stream
            })
            .collect();
        others_are_served(&file);
        drop(half);
    });
}

#[test]
fn more_connections_than_there_is_room_for() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let file = file(&cluster);
    inside(&cluster.lab, || {
        // Each new one takes the place of the one idle longest, after a while.
        let idle: Vec<TcpStream> = (0..24).map(|_| connect()).collect();
        others_are_served(&file);
        drop(idle);
    });
}

#[test]
fn rubbish() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let file = file(&cluster);
    inside(&cluster.lab, || {
        let mut state = 1u64;
        for _ in 0..100 {
            let mut bytes: Vec<u8> = (0..3000)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) as u8
                })
                .collect();
            // Half of them as records of a bearable length.
            if state & 1 << 40 != 0 {
                bytes[..4].copy_from_slice(&(0x8000_0000u32 | 2996).to_be_bytes());
            }
            let mut stream = connect();
            // It may be reset meanwhile.
            let _ = stream.write_all(&bytes);
        }
        others_are_served(&file);
    });
}
