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

/// One side's message, as bytes.
fn framed(sender: &mut Sender, message: &Message) -> Vec<u8> {
    let (mut payload, mut out) = (Vec::new(), Vec::new());
    message.encode(&mut payload);
    sender.frame(message.frame_type(), &payload, &mut out);
    out
}

fn aborted() -> Message {
    Message::Aborted { reason: Reason::new(ReasonCode::State, "cannot load it"), epoch: migration::ownership::Epoch(2) }
}

/// Writes until the kernel says that there is no connection any more.
fn write_until_it_fails(connection: &mut Connection) {
    let payload = [0; 1000];
    loop {
        let header = connection.seal(FrameType::Frames, &[&payload]);
        if connection.write(&[&header, &payload], &|| false).is_err() {
            return;
        }
    }
}

/// The destination says ABORTED and closes; the source, busy with frames, writes before it reads.
#[test]
fn what_came_before_a_write_failed_is_heard_before_the_loss() {
    let (mut source, mut peer) = pair();
    let mut sender = Sender::new();
    let mut bytes = framed(&mut sender, &Message::RoundDone { round: 4 });
    bytes.extend(framed(&mut sender, &aborted()));
    // And half a frame: nobody hears of that.
    bytes.extend(&framed(&mut sender, &aborted())[..40]);
    peer.write_all(&bytes).unwrap();
    // What is unread there makes it a reset.
    source.send(&Message::Pausing).unwrap();
    wait(&[(peer.as_raw_fd(), Interest::Read)], None).unwrap();
    drop(peer);
    write_until_it_fails(&mut source);
    assert!(source.send(&Message::Pausing).is_err(), "nothing follows half a frame");
    for message in [Message::RoundDone { round: 4 }, aborted()] {
        let incoming = source.poll().unwrap().expect("it had come");
        assert_eq!(source.message(incoming).unwrap(), message);
    }
    assert!(matches!(source.poll(), Err(ConnectionError::Broken(_))), "then the loss");
    assert!(matches!(source.poll(), Err(ConnectionError::Broken(_))));
}

#[test]
fn what_came_before_a_write_failed_is_heard_through_tls() {
    let (mut source, mut destination) = secured();
    source.send(&Message::Pausing).unwrap();
    wait(&[(destination.as_raw_fd(), Interest::Read)], None).unwrap();
    destination.send(&aborted()).unwrap();
    drop(destination);
    write_until_it_fails(&mut source);
    let incoming = source.poll().unwrap().expect("it had come");
    assert_eq!(source.message(incoming).unwrap(), aborted());
    assert!(matches!(source.poll(), Err(ConnectionError::Broken(_))));
}

/// A peer that has said more than anybody need hear.
#[test]
fn a_broken_connection_is_not_read_for_ever() {
    let (mut source, mut peer) = pair();
    let mut sender = Sender::new();
    let bytes: Vec<u8> =
        (0..2 * LAST_FRAMES_MAX as u32).flat_map(|round| framed(&mut sender, &Message::RoundDone { round })).collect();
    peer.write_all(&bytes).unwrap();
    source.send(&Message::Pausing).unwrap();
    wait(&[(peer.as_raw_fd(), Interest::Read)], None).unwrap();
    drop(peer);
    write_until_it_fails(&mut source);
    for _ in 0..LAST_FRAMES_MAX {
        assert!(source.poll().unwrap().is_some());
    }
    assert!(matches!(source.poll(), Err(ConnectionError::Broken(_))));
}

/// ABORTED stands in the kernel of the destination behind a window that is shut; and there are bytes that it has not read.
#[test]
fn an_end_that_is_seen_off_takes_nothing_back() {
    let (destination, mut peer) = pair();
    let filling = pattern(1 << 20, 3);
    let mut out = 0;
    while let Ok(n) = (&destination.socket).write(&filling) {
        out += n;
    }
    let last = pattern(5000, 9);
    let sent = std::thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(20);
        let mut rest = &last[..];
        while !rest.is_empty() && Instant::now() < until {
            rest = &rest[(&destination.socket).write(rest).unwrap_or(0)..];
        }
        assert!(rest.is_empty());
        destination.end(Duration::from_secs(20));
    });
    peer.write_all(&[7; 5000]).unwrap();
    let mut all = Vec::new();
    peer.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), out + 5000);
    drop(peer);
    sent.join().unwrap();
}
