//! Peers that are rustls itself, used in ways that this program does not use it, and strangers.
use std::io::Write;
use std::net::{SocketAddr, TcpListener};

use super::*;
use crate::port::connection::{Connection as Port, ConnectionError};
use crate::port::tls::tests::{World, credentials};
use crate::port::tls::{Protection, Route};
use migration::wire::Sender;

/// A listener, and where it is.
fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    (listener, at)
}

fn name() -> ServerName<'static> {
    ServerName::try_from("b").unwrap()
}

/// A destination, and rustls as its source, after the handshake.
fn visited(cipher: Cipher) -> (Port, TcpStream, Connection) {
    let world = World::new();
    let (a, b) = (credentials(&world.host("a", false)), credentials(&world.host("b", false)));
    let (listener, at) = listen();
    let source = std::thread::spawn(move || {
        let mut socket = TcpStream::connect(at).unwrap();
        let mut tls: Connection = ClientConnection::new(Arc::new(a.client(cipher).unwrap()), name()).unwrap().into();
        tls.complete_io(&mut socket).unwrap();
        (socket, tls)
    });
    let (socket, from) = listener.accept().unwrap();
    let port = Port::accept(socket, from, &Protection::Tls(b), &|| false).unwrap();
    let (socket, tls) = source.join().unwrap();
    (port, socket, tls)
}

fn next(port: &mut Port) -> Result<FrameType, ConnectionError> {
    loop {
        if let Some(incoming) = port.poll()? {
            return Ok(incoming.frame_type);
        }
        wait(&[(port.as_raw_fd(), Interest::Read)], None).unwrap();
    }
}

fn put(socket: &mut TcpStream, tls: &mut Connection, bytes: &[u8]) {
    for chunk in bytes.chunks(32 << 10) {
        tls.writer().write_all(chunk).unwrap();
        while tls.wants_write() {
            tls.write_tls(socket).unwrap();
        }
    }
}

#[test]
fn rustls_reads_what_is_sealed_here_and_the_other_way_round() {
    for cipher in [Cipher::Aes, Cipher::ChaCha] {
        let (mut port, mut socket, mut tls) = visited(cipher);
        let state = vec![5; 300_000];
        let mut bytes = Vec::new();
        Sender::new().frame(FrameType::State, &state, &mut bytes);
        let writer = std::thread::spawn(move || {
            put(&mut socket, &mut tls, &bytes);
            (socket, tls)
        });
        assert_eq!(next(&mut port).unwrap(), FrameType::State);
        assert_eq!(port.payload(), state);
        let (mut socket, mut tls) = writer.join().unwrap();
        port.send(&Message::RoundDone { round: 3 }).unwrap();
        let mut got = [0; FRAME_HEADER_LEN + 8];
        let mut done = 0;
        while done < got.len() {
            tls.read_tls(&mut socket).unwrap();
            tls.process_new_packets().unwrap();
            done += tls.reader().read(&mut got[done..]).unwrap_or(0);
        }
        let header = Receiver::new().header(got.first_chunk().unwrap()).unwrap();
        assert_eq!(header.frame_type, FrameType::RoundDone);
        header.verify(&got[FRAME_HEADER_LEN..]).unwrap();
    }
}

#[test]
fn an_end_in_order_is_told_from_a_lost_connection() {
    let (mut port, mut socket, mut tls) = visited(Cipher::Aes);
    tls.send_close_notify();
    tls.write_tls(&mut socket).unwrap();
    assert!(matches!(next(&mut port), Err(ConnectionError::Tls { source: TlsError::Closed, .. })));
    let (mut port, socket, _tls) = visited(Cipher::Aes);
    drop(socket);
    assert!(matches!(next(&mut port), Err(ConnectionError::Io { .. })));
}

#[test]
fn another_key_breaks_the_connection() {
    let (mut port, mut socket, mut tls) = visited(Cipher::Aes);
    tls.refresh_traffic_keys().unwrap();
    tls.write_tls(&mut socket).unwrap();
    let broken = next(&mut port);
    assert!(matches!(broken, Err(ConnectionError::Tls { source: TlsError::Record(_), .. })), "{broken:?}");
}

#[test]
fn tickets_for_resumption_break_the_connection() {
    let world = World::new();
    let (a, b) = (credentials(&world.host("a", false)), credentials(&world.host("b", false)));
    let (listener, at) = listen();
    let destination = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut config = b.server().unwrap();
        config.send_tls13_tickets = 2;
        let mut tls: Connection = ServerConnection::new(Arc::new(config)).unwrap().into();
        tls.complete_io(&mut socket).unwrap();
        socket
    });
    let route = Route::Tls { credentials: a, name: name(), ticket: Vec::new() };
    let mut port = Port::connect(at, &route, 1 << 20, &|| false).unwrap();
    let broken = next(&mut port);
    assert!(matches!(broken, Err(ConnectionError::Tls { source: TlsError::Record(_), .. })), "{broken:?}");
    destination.join().unwrap();
}

/// What a destination makes of a stranger who says this and stays.
fn stranger(bytes: &[u8]) -> TlsError {
    let world = World::new();
    let b = credentials(&world.host("b", false));
    let (listener, at) = listen();
    let mut socket = TcpStream::connect(at).unwrap();
    socket.write_all(bytes).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    accepted.set_nonblocking(true).unwrap();
    accept(&accepted, &b, &|| false).unwrap_err()
}

#[test]
fn strangers_end() {
    let fatal = [21, 3, 3, 0, 2, 2, 40];
    assert!(matches!(stranger(&fatal), TlsError::Handshake(rustls::Error::AlertReceived(_))));
    // Records without content, ends that are no ends, warnings, changes of the cipher: more than anybody has a use for.
    let (nothing, close_notify, cancelled) = ([22, 3, 3, 0, 0], [21, 3, 3, 0, 2, 1, 0], [21, 3, 3, 0, 2, 1, 90]);
    let (change, data) = ([20, 3, 3, 0, 1, 1], [23, 3, 3, 0, 0]);
    for record in [&nothing[..], &close_notify, &cancelled, &change, &data] {
        let end = stranger(&record.repeat(2000));
        assert!(matches!(end, TlsError::Handshake(_)), "{record:?}: {end:?}");
    }
}
