//! Guests, programs and states that do not keep to the rules, and all there is a bound for.

use super::*;

#[test]
fn greetings_that_are_none_are_refused_and_slow_ones_given_up() {
    let mut g = Guest::new();
    for bad in [&b"HELLO\n"[..], b"CONNECT x\n", b"CONNECT 1234567890123456789012345678901234567890"] {
        let mut host = UnixStream::connect(g.path()).unwrap();
        host.write_all(bad).unwrap();
        g.bench.transport.process();
        // Closed with bytes unread, so a reset or an end.
        assert!(!matches!(host.read(&mut [0; 8]), Ok(1..)), "{bad:?}");
    }
    assert_eq!(g.connections(), 0);
    let mut silent = UnixStream::connect(g.path()).unwrap();
    silent.write_all(b"CONN").unwrap();
    g.bench.transport.process();
    assert_eq!(g.connections(), 1);
    let end = Instant::now() + 3 * crate::virtio::vsock::connection::HELLO_TIME;
    while g.connections() == 1 && Instant::now() < end {
        for _ in g.bench.events.io.wait(Some(Duration::from_millis(100))).iter() {
            g.bench.transport.event();
        }
    }
    assert_eq!(g.connections(), 0);
}

#[test]
fn there_are_not_more_connections_than_allowed() {
    let mut g = Guest::new();
    let mut hosts: Vec<UnixStream> = Vec::new();
    // In pieces: only so many wait to be accepted.
    for _ in 0..CONNECTIONS_MAX + 8 {
        hosts.push(UnixStream::connect(g.path()).unwrap());
        g.bench.transport.process();
    }
    assert_eq!(g.connections(), CONNECTIONS_MAX);
    let listener = UnixListener::bind(g.dir.path().join("v_5")).unwrap();
    listener.set_nonblocking(true).unwrap();
    g.send(op::REQUEST, (9, 5), 0, &[]);
    assert_eq!(g.hear().0, op::RST);
    assert!(listener.accept().is_err());
    drop(hosts);
    g.bench.transport.process();
    assert_eq!(g.connections(), 0);
    g.send(op::REQUEST, (9, 5), 0, &[]);
    assert_eq!(g.hear().0, op::RESPONSE);
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let mut g = Guest::new();
    g.bench.transport.quiesce();
    let state = g.bench.transport.save();
    for device in [DeviceState::Stateless, DeviceState::Vsock(VsockState { cid: 2, next_port: 0 })] {
        let bad = crate::virtio::mmio::TransportState { device, ..state.clone() };
        assert!(g.bench.transport.restore(&bad).is_err());
    }
}

#[test]
fn packets_that_make_no_sense() {
    let mut g = Guest::new();
    let (mut host, ports) = g.accept();
    let good = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: ports.0,
        dst_port: ports.1,
        len: 0,
        kind: STREAM,
        op: op::RW,
        ..Header::default()
    };
    // of or for somebody else: passed over
    g.send_raw(&Header { src_cid: 4, ..good }, &[]);
    g.send_raw(&Header { dst_cid: 5, ..good }, &[]);
    assert_eq!(g.connections(), 1);
    // too short for a header: given back
    g.bench.chain(1, &[(OUT, 43, 0)]);
    assert_eq!(g.bench.wait_used(1).len(), 1);
    // longer than its buffer: the connection is not to be trusted
    g.send_raw(&Header { len: 100, ..good }, &[1; 50]);
    assert_eq!(g.hear().0, op::RST);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    // of another kind
    g.send_raw(&Header { kind: 2, op: op::REQUEST, dst_port: 6, ..good }, &[]);
    let (answer, _) = g.receive();
    assert_eq!((answer.op, answer.kind), (op::RST, 2));
    // a receive buffer in which no packet fits
    g.send(op::RW, (9, 9), 0, &[]);
    g.bench.chain(0, &[(IN, HEADER as u32, WRITE)]);
    g.bench.transport.process();
    assert_ne!(g.bench.status() & STATUS_NEEDS_RESET, 0);
}

#[test]
fn resets_that_nobody_takes_are_bounded() {
    let mut g = Guest::new();
    for n in 0..RESETS_MAX as u32 + 50 {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: n,
            dst_port: 1,
            kind: STREAM,
            op: op::RW,
            ..Header::default()
        };
        g.bench.write(OUT + 64 * u64::from(n), &header.encode());
        g.bench.chain(1, &[(OUT + 64 * u64::from(n), HEADER as u32, 0)]);
    }
    while g.bench.transport.process() == Progress::More {}
    assert_eq!(g.bench.used(1).len(), RESETS_MAX);
    // with room for them all packets are served
    for n in 0..200 {
        g.bench.chain(0, &[(IN + 64 * n, 64, WRITE)]);
    }
    while g.bench.transport.process() == Progress::More {}
    assert_eq!(g.bench.used(1).len(), 50);
    while g.bench.transport.process() == Progress::More {}
    assert_eq!(g.bench.used(0).len(), RESETS_MAX + 50);
}

#[test]
fn hostile_drivers_never_bring_it_down() {
    let mut random = Random(0x5eed_0003);
    for _ in 0..40 {
        let mut g = Guest::new();
        let listener = UnixListener::bind(g.dir.path().join("v_1")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut hosts = Vec::new();
        for n in 0..random.next() % 40 {
            match random.next() % 6 {
                0 => {
                    let mut host = UnixStream::connect(g.path()).unwrap();
                    let _ = host.write_all(b"CONNECT 1\nsome bytes");
                    hosts.push(host);
                }
                1 => {
                    if let Ok((mut host, _)) = listener.accept() {
                        let _ = host.set_nonblocking(true);
                        let _ = host.write_all(&[3; 1000]);
                        hosts.push(host);
                    }
                }
                2 => {
                    let pieces: Vec<(u64, u32, u16)> = (0..1 + random.next() % 3)
                        .map(|_| {
                            let len = random.next() as u32 >> (random.next() % 32);
                            (random.next() >> (random.next() % 64), len, (random.next() & 7) as u16)
                        })
                        .collect();
                    g.bench.chain(random.next() % 3, &pieces);
                }
                3 => {
                    g.bench.chain(0, &[(IN + n * 256, 44 + (random.next() % 200) as u32, WRITE)]);
                }
                _ => {
                    let header = Header {
                        src_cid: CID.into(),
                        dst_cid: HOST_CID,
                        src_port: 1 + (random.next() % 2) as u32,
                        dst_port: if random.next().is_multiple_of(2) {
                            1
                        } else {
                            (1 << 30) + (random.next() % 3) as u32
                        },
                        len: (random.next() % 300) as u32,
                        kind: 1,
                        op: (random.next() % 9) as u16,
                        flags: random.next() as u32,
                        buf_alloc: random.next() as u32 >> (random.next() % 32),
                        fwd_cnt: random.next() as u32 >> (random.next() % 32),
                    };
                    g.bench.write(OUT + n * 512, &header.encode());
                    g.bench.chain(1, &[(OUT + n * 512, (44 + random.next() % 300) as u32, 0)]);
                }
            }
            let mut rounds = 0;
            while g.bench.transport.process() == Progress::More {
                rounds += 1;
                assert!(rounds < 1000);
            }
            if random.next().is_multiple_of(8) {
                hosts.clear();
            }
        }
        g.bench.transport.quiesce();
        g.bench.transport.save();
        g.bench.set(0x70, 0);
        assert_eq!((g.bench.status(), g.connections()), (0, 0));
    }
}
