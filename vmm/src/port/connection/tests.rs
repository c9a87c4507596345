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
