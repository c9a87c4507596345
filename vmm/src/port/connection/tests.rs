use super::*;
use migration::wire::CONTROL_MAX;
use std::net::TcpListener;

fn pair() -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = listener.local_addr().unwrap();
    let a = TcpStream::connect(peer).unwrap();
    let (socket, from) = listener.accept().unwrap();
    (Connection::new(socket, from).unwrap(), a)
}

fn next(connection: &mut Connection) -> Result<Incoming, ConnectionError> {
    loop {
        if let Some(incoming) = connection.poll()? {
            return Ok(incoming);
        }
        wait(&[(connection.as_raw_fd(), Interest::Read)], None).unwrap();
    }
}

#[test]
fn frames_arrive_however_they_are_cut() {
    let (mut connection, mut peer) = pair();
    let mut sender = Sender::new();
    let mut bytes = Vec::new();
    for round in 0..200 {
        let mut payload = Vec::new();
        Message::RoundDone { round }.encode(&mut payload);
        sender.frame(FrameType::RoundDone, &payload, &mut bytes);
        sender.frame(FrameType::State, &vec![round as u8; 3000 * round as usize], &mut bytes);
    }
    let writer = std::thread::spawn(move || {
        for (i, chunk) in bytes.chunks(7919).enumerate() {
            if i % 16 == 0 {
                std::thread::yield_now();
            }
            peer.write_all(chunk).unwrap();
        }
    });
    for round in 0..200u32 {
        let incoming = next(&mut connection).unwrap();
        assert_eq!(connection.message(incoming).unwrap(), Message::RoundDone { round });
        assert_eq!(next(&mut connection).unwrap().frame_type, FrameType::State);
        assert_eq!(connection.payload(), vec![round as u8; 3000 * round as usize]);
    }
    writer.join().unwrap();
    assert!(matches!(next(&mut connection), Err(ConnectionError::Io { .. })), "end of the stream");
}

#[test]
fn a_hostile_length_allocates_nothing() {
    let (mut connection, mut peer) = pair();
    let mut header = Sender::new().seal(FrameType::Hello, &[]);
    header[16..20].copy_from_slice(&(CONTROL_MAX as u32 + 1).to_le_bytes());
    peer.write_all(&header).unwrap();
    assert!(matches!(next(&mut connection), Err(ConnectionError::Protocol { .. })));
    assert_eq!(connection.input.len(), READ_AHEAD);
}

/// Both ends of a connection with TLS.
fn secured() -> (Connection, Connection) {
    use crate::port::tls::tests::{World, credentials};
    let world = World::new();
    let (a, b) = (credentials(&world.host("a", false)), credentials(&world.host("b", false)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = listener.local_addr().unwrap();
    let name = rustls::pki_types::ServerName::try_from("b").unwrap();
    let route = Route::Tls { credentials: a, name, ticket: Vec::new() };
    let source = std::thread::spawn(move || Connection::connect(peer, &route, 1 << 20, &|| false).unwrap());
    let (socket, from) = listener.accept().unwrap();
    let destination = Connection::accept(socket, from, &Protection::Tls(b), &|| false).unwrap();
    (source.join().unwrap(), destination)
}

/// Bytes that differ from place to place.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|i| ((i * 31 + seed) ^ (i >> 8)) as u8).collect()
}

#[test]
fn frames_of_any_length_come_through_records() {
    let (mut source, mut destination) = secured();
    assert!(source.certificate().is_some() && destination.certificate().is_some());
    let lengths = [0, 1, 16_000, 16_352, 16_384, 40_000, 256 << 10, 1 << 20, 5, (1 << 20) + 8000, 4 << 20, 0, 300_000];
    let sender = std::thread::spawn(move || {
        for (n, length) in lengths.into_iter().cycle().take(3 * lengths.len()).enumerate() {
            let payload = pattern(length, n as u64);
            let (one, other) = payload.split_at(length / 3);
            let header = source.seal(FrameType::State, &[one, other]);
            source.write(&[&header, one, &[], other], &|| false).unwrap();
        }
        source
    });
    for (n, length) in lengths.into_iter().cycle().take(3 * lengths.len()).enumerate() {
        next(&mut destination).unwrap();
        assert!(destination.payload() == pattern(length, n as u64), "frame {n} of {length} bytes");
    }
    let mut source = sender.join().unwrap();
    assert!(destination.poll().unwrap().is_none());
    // And the other way.
    destination.send(&Message::RoundDone { round: 7 }).unwrap();
    let incoming = next(&mut source).unwrap();
    assert_eq!(source.message(incoming).unwrap(), Message::RoundDone { round: 7 });
    let received = destination.received;
    let sent = source.sent;
    assert_eq!(received, sent);
    drop(destination);
    assert!(matches!(next(&mut source), Err(ConnectionError::Io { .. })));
}

/// How long it takes to bring pages over loopback, with and without TLS: `cargo test -p vmm --lib --release -- --ignored bandwidth`.
#[test]
#[ignore = "a measurement"]
fn bandwidth() {
    let plain = || {
        let (destination, socket) = pair();
        let peer = socket.peer_addr().unwrap();
        (Connection::new(socket, peer).unwrap(), destination)
    };
    for turn in 0..6 {
        let (mut source, mut destination) = if turn % 2 == 0 { secured() } else { plain() };
        let (payload, frames) = (pattern(1 << 20, 1), 256);
        let began = Instant::now();
        let sender = std::thread::spawn(move || {
            for _ in 0..frames {
                let header = source.seal(FrameType::State, &[&payload]);
                source.write(&[&header, &payload], &|| false).unwrap();
            }
            source
        });
        for _ in 0..frames {
            next(&mut destination).unwrap();
        }
        let took = began.elapsed();
        drop(sender.join().unwrap());
        println!(
            "TLS {}: {frames} MiB in {took:?}, {:.0} MiB/s",
            turn % 2 == 0,
            f64::from(frames) / took.as_secs_f64()
        );
    }
}
