//! Telling the neighbours: a gratuitous ARP request (RFC 5227, section 1.1, "ARP announcement") when a stack comes up.
//!
//! A neighbour that knows the address under another MAC learns the new one at once, and one that waits for an answer to
//! a question asked before this machine was there goes on, instead of after its next question a second later. smoltcp sends none.
use crate::virtio::net::{ETHERNET, NetDevice};
use core::net::Ipv4Addr;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Ipv4Address,
};

/// Ethernet header and an ARP packet for IPv4.
const LENGTH: usize = ETHERNET + 28;

/// Sends the announcement; without room in the device's queue nothing is sent.
pub(super) fn announce(device: &mut NetDevice, address: Ipv4Addr) {
    let mac = device.mac();
    if device.tx.has_room() {
        device.tx.send(LENGTH, None, |frame| fill(frame, mac, address));
        device.kick();
    }
}

fn fill(frame: &mut [u8], mac: [u8; 6], address: Ipv4Address) {
    let mac = EthernetAddress(mac);
    let mut ethernet = EthernetFrame::new_unchecked(frame);
    let header = EthernetRepr { src_addr: mac, dst_addr: EthernetAddress::BROADCAST, ethertype: EthernetProtocol::Arp };
    header.emit(&mut ethernet);
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: mac,
        source_protocol_addr: address,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: address,
    };
    repr.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut frame = [0xaa; LENGTH];
        fill(&mut frame, [2, 0, 0, 0, 0, 7], Ipv4Addr::new(10, 77, 0, 10));
        let expected: [u8; LENGTH] = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6, // Ethernet
            0, 1, 8, 0, 6, 4, 0, 1, // ARP request, Ethernet, IPv4
            2, 0, 0, 0, 0, 7, 10, 77, 0, 10, // sender
            0, 0, 0, 0, 0, 0, 10, 77, 0, 10, // target
        ];
        assert_eq!(frame, expected);
    }
}
