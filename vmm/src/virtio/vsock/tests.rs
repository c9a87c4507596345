//! Streams between a guest's driver and programs of the host.

mod hostile;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use super::connection::BUFFER;
use super::packet::shutdown;
use super::*;
use crate::virtio::testing::{Bench, DATA, Random, STATUS_NEEDS_RESET, WRITE};

const CID: u32 = 3;
const EVENTS: u64 = 2;
/// Where the guest's packets are, and its receive buffers.
const OUT: u64 = DATA;
const IN: u64 = DATA + 0x4_0000;
const IN_LEN: u32 = 4096 + HEADER as u32;

/// A guest with a vsock device, seen from its driver.
struct Guest {
    bench: Bench,
    dir: tempfile::TempDir,
    room: u32,
}

impl Guest {
    fn new() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let device = Vsock::open("vsock0", &config(&dir)).unwrap();
        let mut bench = Bench::new(Box::new(device));
        bench.start(0, 3);
        Guest { bench, dir, room: 256 << 10 }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// Sends a packet; it must be taken.
    fn send(&mut self, op: u16, ports: (u32, u32), flags: u32, bytes: &[u8]) {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.0,
            dst_port: ports.1,
            len: bytes.len() as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: self.room,
            fwd_cnt: 0,
        };
        self.send_raw(&header, bytes);
    }

    fn send_raw(&mut self, header: &Header, bytes: &[u8]) {
        self.bench.write(OUT, &header.encode());
        self.bench.write(OUT + 0x1000, bytes);
        match bytes.len() as u32 {
            0 => self.bench.chain(1, &[(OUT, HEADER as u32, 0)]),
            n => self.bench.chain(1, &[(OUT, HEADER as u32, 0), (OUT + 0x1000, n, 0)]),
        };
        while self.bench.transport.process() == Progress::More {}
        assert_eq!(self.bench.used(1).len(), 1);
    }

    /// Offers one receive buffer and waits for a packet in it.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.bench.chain(0, &[(IN, IN_LEN, WRITE)]);
        let used = self.bench.wait_used(0);
        assert_eq!(used.len(), 1);
        let bytes = self.bench.read(IN, used[0].1 as usize);
        let header = Header::parse(bytes[..HEADER].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
        assert_eq!(header.len as usize, bytes.len() - HEADER);
        (header, bytes[HEADER..].to_vec())
    }

    fn hear(&mut self) -> (u16, Vec<u8>) {
        let (header, bytes) = self.receive();
        (header.op, bytes)
    }

    /// A connection made by the host to port 52; returns the stream and the ports as the guest sees them.
    fn accept(&mut self) -> (UnixStream, (u32, u32)) {
        let mut host = UnixStream::connect(self.path()).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        host.write_all(b"CONNECT 52\n").unwrap();
        let (request, _) = self.receive();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 52));
        let ports = (52, request.src_port);
        self.send(op::RESPONSE, ports, 0, &[]);
        let mut line = vec![0; format!("OK {}\n", ports.1).len()];
        host.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", ports.1).as_bytes());
        (host, ports)
    }

    fn connections(&self) -> usize {
        let mut out = crate::metrics::Exposition::default();
        self.bench.transport.device().metrics(&mut out);
        let text = out.text();
        let line = text.lines().find(|l| l.starts_with("vmm_vsock_connections{")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as usize
    }
}

fn config(dir: &tempfile::TempDir) -> VsockConfig {
    VsockConfig { cid: CID, path: dir.path().join("v") }
}

#[test]
fn the_host_connects_to_a_port_of_the_guest() {
    let mut g = Guest::new();
    assert_eq!((g.bench.reg(0x100), g.bench.reg(0x104)), (CID, 0));
    let (mut host, ports) = g.accept();
    host.write_all(b"hello").unwrap();
    assert_eq!(g.hear(), (op::RW, b"hello".to_vec()));
    g.send(op::RW, ports, 0, b"world");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"world");
    // the host is done: the guest hears all of it, then that both directions are closed, and ends it
    host.write_all(b"bye").unwrap();
    drop(host);
    assert_eq!(g.hear(), (op::RW, b"bye".to_vec()));
    let (last, _) = g.receive();
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, shutdown::BOTH));
    g.send(op::RST, ports, 0, &[]);
    assert_eq!(g.connections(), 0);
}

#[test]
fn the_guest_connects_to_a_port_of_the_host() {
    let mut g = Guest::new();
    let listener = UnixListener::bind(g.dir.path().join("v_1234")).unwrap();
    g.send(op::REQUEST, (9, 1234), 0, &[]);
    let (answer, _) = g.receive();
    assert_eq!((answer.op, answer.src_port, answer.dst_port), (op::RESPONSE, 1234, 9));
    assert_eq!(answer.buf_alloc as usize, BUFFER);
    let (mut host, _) = listener.accept().unwrap();
    g.send(op::RW, (9, 1234), 0, b"question");
    let mut bytes = [0; 8];
    host.read_exact(&mut bytes).unwrap();
    // half closed: the host sees the end and can still answer
    g.send(op::SHUTDOWN, (9, 1234), shutdown::SEND, &[]);
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    host.write_all(b"answer").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(g.hear(), (op::RW, b"answer".to_vec()));
    let (end, _) = g.receive();
    assert_eq!((end.op, end.flags & shutdown::SEND), (op::SHUTDOWN, shutdown::SEND));
    // closed by the guest as well: a reset ends it
    g.send(op::SHUTDOWN, (9, 1234), shutdown::BOTH, &[]);
    assert_eq!(g.hear().0, op::RST);
    assert_eq!(g.connections(), 0);
}

#[test]
fn where_nobody_listens_there_is_a_reset() {
    let mut g = Guest::new();
    g.send(op::REQUEST, (9, 77), 0, &[]);
    let (answer, _) = g.receive();
    assert_eq!((answer.op, answer.src_port, answer.dst_port), (op::RST, 77, 9));
    // nor for packets of no connection, but a reset is never answered
    g.send(op::RW, (9, 78), 0, b"x");
    assert_eq!(g.hear().0, op::RST);
    g.send(op::RST, (9, 78), 0, &[]);
    g.send(op::CREDIT_REQUEST, (9, 79), 0, &[]);
    let (answer, _) = g.receive();
    assert_eq!((answer.op, answer.src_port), (op::RST, 79));
    // the guest has nobody at the port the host wants
    let mut host = UnixStream::connect(g.path()).unwrap();
    host.write_all(b"CONNECT 1\n").unwrap();
    let (request, _) = g.receive();
    g.send(op::RST, (1, request.src_port), 0, &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut g = Guest::new();
    g.room = 10;
    let (mut host, ports) = g.accept();
    host.write_all(&[7; 25]).unwrap();
    assert_eq!(g.hear(), (op::RW, vec![7; 10]));
    assert_eq!(g.hear().0, op::CREDIT_REQUEST);
    g.bench.chain(0, &[(IN, IN_LEN, WRITE)]);
    g.bench.transport.process();
    assert_eq!(g.bench.used(0), [], "nothing more without room");
    let update = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: ports.0,
        dst_port: ports.1,
        kind: STREAM,
        op: op::CREDIT_UPDATE,
        buf_alloc: 10,
        fwd_cnt: 10,
        ..Header::default()
    };
    g.send_raw(&update, &[]);
    let used = g.bench.wait_used(0);
    assert_eq!(used.iter().map(|(_, len)| *len as usize).collect::<Vec<_>>(), [HEADER + 10]);
    // a count that makes no sense is no room at all
    g.send_raw(&Header { fwd_cnt: 4_000_000_000, ..update }, &[]);
    assert_eq!(g.hear().0, op::CREDIT_REQUEST);
}

#[test]
fn a_host_that_does_not_read_costs_one_buffer() {
    let mut g = Guest::new();
    let (mut host, ports) = g.accept();
    // what the socket takes in the kernel, and then our buffer
    let chunk = vec![5; 32 << 10];
    let mut sent = 0u64;
    let mut taken = 0u64;
    loop {
        g.send(op::CREDIT_REQUEST, ports, 0, &[]);
        let (credit, _) = g.receive();
        assert_eq!(credit.op, op::CREDIT_UPDATE);
        taken = taken.max(u64::from(credit.fwd_cnt));
        if sent - taken + chunk.len() as u64 > BUFFER as u64 {
            break;
        }
        g.send(op::RW, ports, 0, &chunk);
        sent += chunk.len() as u64;
        assert!(sent < 16 << 20);
    }
    // the host reads: everything arrives, and the guest hears that there is room
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; sent as usize];
        host.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 5));
        host
    });
    let (credit, _) = g.receive();
    assert_eq!(credit.op, op::CREDIT_UPDATE);
    assert!(u64::from(credit.fwd_cnt) > taken);
    while !reader.is_finished() {
        for _ in g.bench.events.io.wait(Some(Duration::from_millis(20))).iter() {
            g.bench.transport.event();
        }
    }
    let _host = reader.join().unwrap();
    // a guest that sends more than it was allowed is cut off
    let mut last = op::RW;
    for _ in 0..64 {
        g.send(op::RW, ports, 0, &vec![1; 60 << 10]);
        g.bench.chain(0, &[(IN, IN_LEN, WRITE)]);
        g.bench.transport.process();
        for (_, len) in g.bench.used(0) {
            let bytes = g.bench.read(IN, len as usize);
            last = Header::parse(bytes[..HEADER].try_into().unwrap()).op;
        }
        if last == op::RST {
            break;
        }
    }
    assert_eq!((last, g.connections()), (op::RST, 0));
}

#[test]
fn what_a_guest_has_sent_before_it_closed_reaches_a_slow_host() {
    let mut g = Guest::new();
    let listener = UnixListener::bind(g.dir.path().join("v_1234")).unwrap();
    let ports = (9, 1234);
    g.send(op::REQUEST, ports, 0, &[]);
    assert_eq!(g.hear().0, op::RESPONSE);
    let (mut host, _) = listener.accept().unwrap();
    let chunk = vec![5; 32 << 10];
    let (mut sent, mut taken) = (0u64, 0u64);
    while sent - taken + chunk.len() as u64 <= BUFFER as u64 {
        g.send(op::RW, ports, 0, &chunk);
        sent += chunk.len() as u64;
        g.send(op::CREDIT_REQUEST, ports, 0, &[]);
        taken = g.receive().0.fwd_cnt.into();
    }
    g.send(op::SHUTDOWN, ports, shutdown::BOTH, &[]);
    g.send(op::RST, ports, 0, &[]);
    assert_eq!(g.connections(), 1);
    // the guest uses the same ports again
    g.send(op::REQUEST, ports, 0, &[]);
    assert_eq!(g.hear().0, op::RESPONSE);
    assert_eq!(g.connections(), 2);
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        bytes.len() as u64
    });
    while !reader.is_finished() {
        for _ in g.bench.events.io.wait(Some(Duration::from_millis(20))).iter() {
            g.bench.transport.event();
        }
    }
    assert_eq!(reader.join().unwrap(), sent);
    assert_eq!(g.connections(), 1);
    g.send(op::CREDIT_REQUEST, ports, 0, &[]);
    assert_eq!(g.hear().0, op::CREDIT_UPDATE);
}

#[test]
fn connections_end_with_the_driver_and_do_not_move_with_the_guest() {
    let mut g = Guest::new();
    let (mut host, ports) = g.accept();
    g.bench.transport.quiesce();
    let state = g.bench.transport.save();
    // here they go on
    g.bench.transport.resume();
    host.write_all(b"still").unwrap();
    assert_eq!(g.hear(), (op::RW, b"still".to_vec()));
    // there the guest is told that they are gone
    let there = tempfile::tempdir().unwrap();
    let device = Vsock::open("vsock0", &config(&there)).unwrap();
    let mut other =
        Guest { bench: Bench::with_memory(Box::new(device), g.bench.memory.clone()), dir: there, room: 1024 };
    let fresh =
        |n: &super::super::queue::QueueState| super::super::queue::QueueState { next_avail: 0, next_used: 0, ..*n };
    let queues = state.queues.iter().map(fresh).collect();
    let zero = vec![0; 0x1_0000];
    other.bench.write(crate::virtio::testing::rings(0), &zero);
    other.bench.transport.restore(&crate::virtio::mmio::TransportState { queues, ..state.clone() }).unwrap();
    let head = other.bench.chain(EVENTS, &[(IN, 8, WRITE)]);
    other.bench.write(IN, &[0xff; 8]);
    other.bench.transport.resume();
    assert_eq!(other.bench.wait_used(EVENTS), [(u32::from(head), 4)]);
    assert_eq!(other.bench.read(IN, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    // and no new connection has the ports of an old one
    other.send(op::RW, ports, 0, b"old");
    assert_eq!(other.hear().0, op::RST);
    let (_stream, new) = other.accept();
    assert_ne!(new.1, ports.1);
    // a reset by the driver ends those here
    g.bench.set(0x70, 0);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(g.connections(), 0);
}
