//! Frames for tests: TCP segments between this machine ([`OWN`]) and a peer ([`PEER`]).
use crate::virtio::net::ETHERNET;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;
use std::vec::Vec;

pub(crate) const OWN: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
pub(crate) const PEER: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);
pub(crate) const MACS: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
/// The ports of the two.
pub(crate) const PORTS: (u16, u16) = (2049, 700);
pub(crate) const WINDOW: u16 = 1234;

/// A frame with right checksums, from this machine or to it.
pub(crate) fn frame(from: Ipv4Address, number: u32, control: TcpControl, ack: Option<i32>, payload: usize) -> Vec<u8> {
    let (src_port, dst_port, dst) = if from == OWN { (PORTS.0, PORTS.1, PEER) } else { (PORTS.1, PORTS.0, OWN) };
    let data = vec![7; payload];
    let tcp = TcpRepr {
        src_port,
        dst_port,
        control,
        seq_number: TcpSeqNumber(number as i32),
        ack_number: ack.map(TcpSeqNumber),
        window_len: WINDOW,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &data,
    };
    let payload_len = tcp.buffer_len();
    let ip = Ipv4Repr { src_addr: from, dst_addr: dst, next_header: IpProtocol::Tcp, payload_len, hop_limit: 64 };
    let mut f = vec![0; ETHERNET + ip.buffer_len() + tcp.buffer_len()];
    f[..12].copy_from_slice(&MACS);
    f[12..14].copy_from_slice(&[8, 0]);
    let caps = ChecksumCapabilities::default();
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut f[ETHERNET..]), &caps);
    tcp.emit(&mut TcpPacket::new_unchecked(&mut f[ETHERNET + 20..]), &from.into(), &dst.into(), &caps);
    f
}
