//! The network device as smoltcp wants it.
use super::connections::Connections;
use super::window::Windows;
use crate::time;
use crate::virtio::net::{ETHERNET, Frame, MAX_FRAME, NetDevice, Receiver, Sender};
use alloc::vec::Vec;
use core::cell::Cell;
use core::num::NonZeroUsize;
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

/// Headers of a TCP segment without options.
const IP_AND_TCP: usize = 40;

/// A network device for smoltcp.
pub(super) struct SmolDevice {
    pub(super) net: NetDevice,
    /// There was no room to send, so smoltcp has something left.
    blocked: Cell<bool>,
    waiting_for_room: bool,
    /// Ports whose backlog is full.
    full_ports: Vec<u16>,
    /// A frame that waits until smoltcp knows its sender.
    held: Option<Frame>,
    pub(super) connections: Connections,
    pub(super) windows: Windows,
}

/// Most frames dropped in one look for a frame.
const MAX_DROPS: usize = 64;

impl SmolDevice {
    pub(super) fn new(net: NetDevice) -> Self {
        SmolDevice {
            net,
            blocked: Cell::new(false),
            waiting_for_room: false,
            full_ports: Vec::new(),
            held: None,
            connections: Connections::default(),
            windows: Windows::default(),
        }
    }

    /// Whether the last poll was cut short for want of room; remembered for [`SmolDevice::has_work`].
    pub(super) fn take_blocked(&mut self) -> bool {
        self.waiting_for_room = self.blocked.take();
        self.waiting_for_room
    }

    /// Sets the ports whose backlog is full. A SYN for one of them is dropped, so that the peer tries again; smoltcp
    /// would answer with a reset, since nobody listens.
    pub(super) fn set_full_ports(&mut self, ports: impl Iterator<Item = u16>) {
        self.full_ports.clear();
        self.full_ports.extend(ports);
    }

    fn is_unwelcome(&self, frame: &Frame) -> bool {
        !self.full_ports.is_empty()
            && syn_port(self.net.rx.bytes(frame)).is_some_and(|port| self.full_ports.contains(&port))
    }

    /// Whether there is a frame for smoltcp.
    pub(super) fn has_received(&self) -> bool {
        self.held.is_some() || self.net.has_received()
    }

    /// Whether there is something to do: a frame, or room again that the last poll lacked.
    pub(super) fn has_work(&self) -> bool {
        self.has_received() || (self.waiting_for_room && self.net.has_sent())
    }

    /// Tells the peers that are still to be told how the windows are; true if there were any.
    pub(super) fn tell_windows(&mut self) -> bool {
        let has_checksum = !self.net.offloads().checksum;
        let mut any = false;
        while self.windows.are_to_tell() {
            if !self.net.tx.has_room() {
                self.blocked.set(true);
                break;
            }
            if let Some(frame) = self.windows.next_to_tell(&self.connections, has_checksum) {
                self.net.tx.send(frame.len(), None, |bytes| bytes.copy_from_slice(&frame));
                any = true;
            }
        }
        any
    }
}

pub(super) struct RxToken<'a> {
    receiver: &'a mut Receiver,
    content: Content,
}

enum Content {
    /// What the device received.
    Frame(Frame),
    /// What nobody sent: see [`neighbour`].
    Neighbour([u8; ARP_FRAME]),
}

pub(super) struct TxToken<'a> {
    sender: &'a mut Sender,
    segment: Option<u16>,
    connections: &'a mut Connections,
    windows: &'a mut Windows,
    /// smoltcp fills in the TCP checksum.
    has_checksum: bool,
    now: Instant,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        match self.content {
            Content::Frame(frame) => {
                let result = f(self.receiver.bytes(&frame));
                self.receiver.finish(frame);
                result
            }
            Content::Neighbour(arp) => f(&arp),
        }
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let TxToken { sender, segment, connections, windows, has_checksum, now } = self;
        sender.send(length, segment, |frame| {
            let result = f(frame);
            connections.outgoing(frame, has_checksum, now);
            windows.outgoing(frame, connections, has_checksum);
            result
        })
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(|size| size.get());
    }
}

impl phy::Device for SmolDevice {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, now: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        if !self.has_received() {
            return None;
        }
        // A frame may need an answer at once.
        if !self.net.tx.has_room() {
            self.blocked.set(true);
            return None;
        }
        let content = match self.held.take() {
            Some(frame) => Content::Frame(frame),
            None => {
                let mut frame = self.net.rx.receive()?;
                for _ in 0..MAX_DROPS {
                    if !self.is_unwelcome(&frame) {
                        break;
                    }
                    self.net.rx.finish(frame);
                    frame = self.net.rx.receive()?;
                }
                match neighbour(self.net.rx.bytes(&frame)) {
                    Some(arp) => {
                        self.held = Some(frame);
                        Content::Neighbour(arp)
                    }
                    None => Content::Frame(frame),
                }
            }
        };
        let has_checksum = !self.net.offloads().checksum;
        let NetDevice { rx, tx, .. } = &mut self.net;
        let (connections, windows) = (&mut self.connections, &mut self.windows);
        if let Content::Frame(frame) = &content {
            windows.incoming(rx.bytes(frame), connections, time::Instant::now);
        }
        let answer = TxToken { sender: tx, segment: None, connections, windows, has_checksum, now };
        Some((RxToken { receiver: rx, content }, answer))
    }

    fn transmit(&mut self, now: Instant) -> Option<TxToken<'_>> {
        let has_checksum = !self.net.offloads().checksum;
        let sender = &mut self.net.tx;
        if !sender.has_room() {
            self.blocked.set(true);
            return None;
        }
        let (connections, windows) = (&mut self.connections, &mut self.windows);
        Some(TxToken { sender, segment: None, connections, windows, has_checksum, now })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        let mtu = usize::from(self.net.mtu());
        c.medium = Medium::Ethernet;
        c.max_transmission_unit = ETHERNET + mtu;
        let offloads = self.net.offloads();
        // Received frames nobody vouched for are verified by the driver.
        c.checksum.tcp = if offloads.checksum { Checksum::None } else { Checksum::Tx };
        if offloads.segmentation {
            // As many whole segments as one IPv4 packet can hold.
            let segment = mtu - IP_AND_TCP;
            let largest = ETHERNET + IP_AND_TCP + (MAX_FRAME - 18 - IP_AND_TCP) / segment * segment;
            c.segmentation.tcpv4 = NonZeroUsize::new(largest);
        }
        c
    }
}

/// Bytes of an ARP packet in an Ethernet frame.
const ARP_FRAME: usize = ETHERNET + 28;

/// For a frame that asks for a TCP connection: the ARP reply (RFC 826) that would have told us its sender's address.
///
/// smoltcp learns a neighbour from ARP alone and asks for at most one a second. A client that still knows us from before a
/// restart does not ask, so without this its first answer could take seconds.
fn neighbour(frame: &[u8]) -> Option<[u8; ARP_FRAME]> {
    syn_port(frame)?;
    let (to, from) = (&frame[..6], &frame[6..12]);
    let ip = &frame[ETHERNET..];
    let mut arp = [0; ARP_FRAME];
    arp[..6].copy_from_slice(to);
    arp[6..12].copy_from_slice(from);
    arp[12..22].copy_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
    arp[22..28].copy_from_slice(from);
    arp[28..32].copy_from_slice(&ip[12..16]);
    arp[32..38].copy_from_slice(to);
    arp[38..42].copy_from_slice(&ip[16..20]);
    Some(arp)
}

/// The destination port of a frame that asks for a TCP connection over IPv4.
fn syn_port(frame: &[u8]) -> Option<u16> {
    let ip = frame.get(ETHERNET..)?;
    if frame[12..14] != [0x08, 0x00] || ip.len() < 20 || ip[9] != 6 {
        return None;
    }
    let tcp = ip.get(usize::from(ip[0] & 15) * 4..)?;
    let flags = tcp.get(13)?;
    // SYN without ACK.
    (flags & 0x12 == 0x02).then(|| u16::from_be_bytes([tcp[2], tcp[3]]))
}

#[cfg(test)]
mod tests;
