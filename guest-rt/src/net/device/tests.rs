use super::*;
use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol};

/// An Ethernet frame with a TCP segment over IPv4.
fn segment(flags: u8) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + IP_AND_TCP];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 0x08, 0x00]);
    frame[14] = 0x45;
    frame[23] = 6;
    frame[26..34].copy_from_slice(&[10, 77, 0, 2, 10, 77, 0, 10]);
    frame[36..38].copy_from_slice(&2049u16.to_be_bytes());
    frame[47] = flags;
    frame
}

#[test]
fn a_syn_tells_who_its_sender_is() {
    let arp = neighbour(&segment(0x02)).unwrap();
    let frame = EthernetFrame::new_checked(&arp[..]).unwrap();
    assert_eq!(frame.ethertype(), EthernetProtocol::Arp);
    let repr = ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap()).unwrap();
    let expected = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress([2, 0, 0, 0, 0, 9]),
        source_protocol_addr: [10, 77, 0, 2].into(),
        target_hardware_addr: EthernetAddress([2, 0, 0, 0, 0, 1]),
        target_protocol_addr: [10, 77, 0, 10].into(),
    };
    assert_eq!(repr, expected);
}

#[test]
fn other_frames_tell_nothing() {
    for flags in [0x10, 0x12, 0x11, 0x04] {
        assert_eq!(neighbour(&segment(flags)), None);
    }
    let syn = segment(0x02);
    for length in 0..syn.len() - 6 {
        assert_eq!(neighbour(&syn[..length]), None, "{length}");
    }
}
