use super::super::segment::frames::{MACS, OWN, PEER, frame};
use super::*;
use crate::virtio::net::ETHERNET;
use smoltcp::wire::*;
use std::vec::Vec;

/// What a peer makes of a frame of ours: number, acknowledgement, window, bytes of data. All checksums must be right.
fn seen(frame: &[u8]) -> (u32, u32, u16, usize) {
    let ip = Ipv4Packet::new_checked(&frame[ETHERNET..]).unwrap();
    assert!(ip.verify_checksum());
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&OWN.into(), &PEER.into()));
    (tcp.seq_number().0 as u32, tcp.ack_number().0 as u32, tcp.window_len(), tcp.payload().len())
}

/// A connection the peer asked for (or, `accepted` false, this machine).
fn connection(accepted: bool) -> Connections {
    let mut numbers = Connections::default();
    numbers.outgoing(
        &mut frame(OWN, 99, TcpControl::Syn, accepted.then_some(5), 0),
        true,
        smoltcp::time::Instant::ZERO,
    );
    numbers
}

fn send(windows: &mut Windows, numbers: &mut Connections, mut frame: Vec<u8>) -> (u32, u32, u16, usize) {
    numbers.outgoing(&mut frame, true, smoltcp::time::Instant::ZERO);
    windows.outgoing(&mut frame, numbers, true);
    seen(&frame)
}

/// All that peers are told now.
fn told(windows: &mut Windows, numbers: &Connections) -> Vec<(u32, u32, u16, usize)> {
    let mut all = Vec::new();
    while windows.are_to_tell() {
        all.extend(windows.next_to_tell(numbers, true).map(|f| seen(&f)));
    }
    all
}

#[test]
fn peers_are_told_at_once_and_again_when_it_is_over() {
    let (mut windows, mut numbers, now) = (Windows::default(), connection(true), Instant::from_nanos(0));
    let data = |number, ack| frame(OWN, number, TcpControl::Psh, Some(ack), 50);
    assert_eq!(send(&mut windows, &mut numbers, data(100, 6)), (100, 6, 1234, 50), "no lull");
    windows.close(true, &numbers, now);
    assert!(!windows.are_closed(now + QUIET), "the peer does not know yet");
    let mut again = Windows::default();
    again.close(true, &numbers, now);
    let frame = again.next_to_tell(&numbers, true).unwrap();
    assert_eq!((&frame[..12], &frame[12..14]), (&MACS[..], &[8, 0][..]));
    // The device fills checksums in: it is given none.
    again.close(true, &numbers, now);
    assert_eq!(again.next_to_tell(&numbers, false).unwrap()[HEADERS - 4..HEADERS - 2], [0, 0]);

    assert_eq!(told(&mut windows, &numbers), [(150, 6, 0, 0)]);
    assert!(windows.are_closed(now + QUIET));
    assert_eq!(send(&mut windows, &mut numbers, data(150, 7)), (150, 7, 0, 50));
    assert_eq!(told(&mut windows, &numbers), []);

    windows.close(false, &numbers, now);
    assert_eq!(told(&mut windows, &numbers), [(200, 7, 1234, 0)]);
    assert_eq!(send(&mut windows, &mut numbers, data(200, 8)), (200, 8, 1234, 50));
    windows.close(false, &numbers, now);
    assert_eq!(told(&mut windows, &numbers), [], "once");
}

#[test]
fn a_peer_that_was_silent_is_told_when_it_is_not() {
    let (mut windows, mut numbers) = (Windows::default(), connection(true));
    let later = Instant::from_nanos(10_000_000_000);
    windows.close(true, &numbers, later);
    assert!(windows.are_closed(later + QUIET), "nobody to tell");
    let ack = frame(OWN, 100, TcpControl::None, Some(8), 0);
    assert_eq!(send(&mut windows, &mut numbers, ack), (100, 8, 0, 0));
    windows.close(false, &numbers, later);
    assert_eq!(told(&mut windows, &numbers), [(100, 8, 1234, 0)]);
}

#[test]
fn connections_of_our_own_are_left_alone_and_so_are_their_ends() {
    let (mut windows, mut numbers, now) = (Windows::default(), connection(false), Instant::from_nanos(0));
    windows.close(true, &numbers, now);
    assert_eq!(told(&mut windows, &numbers), []);
    assert_eq!(send(&mut windows, &mut numbers, frame(OWN, 100, TcpControl::Psh, Some(6), 5)), (100, 6, 1234, 5));
    let mut numbers = connection(true);
    assert_eq!(send(&mut windows, &mut numbers, frame(OWN, 99, TcpControl::Syn, Some(6), 0)).2, 1234, "no window yet");
    assert_eq!(send(&mut windows, &mut numbers, frame(OWN, 100, TcpControl::Psh, Some(6), 5)).2, 0);
    assert_eq!(send(&mut windows, &mut numbers, frame(OWN, 105, TcpControl::Rst, Some(6), 0)).2, 1234);
    windows.close(false, &numbers, now);
    assert_eq!(told(&mut windows, &numbers), [], "it was reset");
}

#[test]
fn it_is_quiet_when_no_data_has_come_for_a_while() {
    let (mut windows, numbers) = (Windows::default(), connection(true));
    let at = |us: u64| Instant::from_nanos(us * 1000);
    assert!(!windows.are_closed(at(500)), "not asked for");
    windows.close(true, &numbers, at(1000));
    assert_eq!(told(&mut windows, &numbers).len(), 1);
    assert!(!windows.are_closed(at(1249)));
    assert!(windows.are_closed(at(1250)));
    windows.incoming(&frame(PEER, 5, TcpControl::Psh, Some(100), 9), &numbers, || at(1050));
    assert!(!windows.are_closed(at(1299)));
    // Without data, and what is nobody's.
    windows.incoming(&frame(PEER, 14, TcpControl::None, Some(100), 0), &numbers, || at(1290));
    windows.incoming(&[0; 20], &numbers, || at(1290));
    windows.incoming(&frame(PEER, 5, TcpControl::Psh, Some(100), 9), &connection(false), || at(1290));
    assert!(windows.are_closed(at(1300)));
}
