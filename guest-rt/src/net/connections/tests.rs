use super::super::segment::frames::{OWN, PORTS, frame as any_frame};
use super::*;
use crate::virtio::net::ETHERNET;
use proptest::prelude::*;
use smoltcp::wire::*;

/// A frame of this machine's.
fn frame(number: u32, control: TcpControl, payload: usize) -> Vec<u8> {
    any_frame(OWN, number, control, Some(9), payload)
}

/// The number a frame goes out with.
fn sent(numbers: &mut Connections, number: u32, control: TcpControl, payload: usize) -> u32 {
    let mut f = frame(number, control, payload);
    numbers.outgoing(&mut f, true, Instant::ZERO);
    let (src, dst) = (Ipv4Address::new(10, 0, 0, 1), Ipv4Address::new(10, 0, 0, 2));
    let tcp = TcpPacket::new_checked(&f[ETHERNET + 20..]).unwrap();
    assert!(tcp.verify_checksum(&src.into(), &dst.into()), "the checksum stays right");
    tcp.seq_number().0 as u32
}

#[test]
fn pure_acknowledgements_are_numbered_as_if_nothing_had_been_sent_again() {
    use TcpControl::*;
    let mut n = Connections::default();
    let start = u32::MAX - 1000;
    assert_eq!(sent(&mut n, start, None, 0), start, "an unknown connection is left alone");
    assert_eq!(sent(&mut n, start, Syn, 0), start);
    let first = start + 1;
    assert_eq!(sent(&mut n, first, Psh, 3000), first);
    let next = first.wrapping_add(3000);
    // Retransmission: data keeps its number, acknowledgements get the highest, across the wrap.
    assert_eq!(sent(&mut n, first, None, 1460), first);
    assert_eq!(sent(&mut n, first.wrapping_add(1460), None, 0), next);
    assert_eq!(sent(&mut n, next, None, 0), next);
    // A probe of a closed window does not count, nor does a keep-alive.
    assert_eq!(sent(&mut n, next, None, 1), next);
    assert_eq!(sent(&mut n, next, None, 0), next);
    assert_eq!(sent(&mut n, next - 1, None, 1), next - 1);
    // The end of the stream does.
    assert_eq!(sent(&mut n, next, Fin, 0), next);
    assert_eq!(sent(&mut n, next, None, 0), next + 1);
    assert_eq!(sent(&mut n, next, Rst, 0), next);
    assert_eq!(sent(&mut n, next, None, 0), next, "forgotten");
    sent(&mut n, 5, Syn, 0);
    n.forget(PORTS.0, PORTS.1, [10, 0, 0, 2]);
    assert!(n.0.is_empty());
}

#[test]
fn memory_is_bounded() {
    let mut n = Connections::default();
    for i in 0..MAX_CONNECTIONS as u32 + 100 {
        let mut f = frame(i, TcpControl::Syn, 0);
        f[ETHERNET + 16..ETHERNET + 20].copy_from_slice(&i.to_be_bytes());
        n.outgoing(&mut f, false, Instant::ZERO);
    }
    assert_eq!(n.0.len(), MAX_CONNECTIONS);
}

proptest! {
    #[test]
    fn any_frame_is_taken(mut f in proptest::collection::vec(any::<u8>(), 14..100), tcp in any::<bool>()) {
        if tcp && f.len() > 24 {
            f[12..14].copy_from_slice(&[8, 0]);
            f[14] = 0x45;
            f[23] = 6;
        }
        let length = f.len();
        Connections::default().outgoing(&mut f, true, Instant::ZERO);
        prop_assert_eq!(f.len(), length);
    }
}
