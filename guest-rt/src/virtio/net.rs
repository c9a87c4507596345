//! virtio-net (virtio 1.2, section 5.1): frames in and out, with checksum and TCP segmentation offload.
//!
//! Owns the receive buffers (all in the device's hands, or being looked at) and the transmit buffers.
//! Always true: a receive buffer goes back to the device as soon as its frame was looked at; a transmit buffer is
//! used again only when the device has returned it; a received frame has at most [`MAX_FRAME`] bytes.
//! Survives: headers, lengths and buffer counts that make no sense (the frame is dropped and counted); a device that
//! breaks the rules of the ring (it is given up: nothing is received or sent any more).
use super::VirtioError;
use super::mmio::Transport;
use super::queue::{Queue, QueueError, Segment};
use alloc::{boxed::Box, vec, vec::Vec};

/// Longest frame with offload: an IPv4 packet of 65535 bytes and its Ethernet header (with a VLAN tag).
pub const MAX_FRAME: usize = 65535 + 18;
/// Ethernet header.
pub const ETHERNET: usize = 14;
/// Most entries of a queue that are used.
const QUEUE_SIZE: u16 = 256;
/// Length of `struct virtio_net_hdr` with VERSION_1.
const HEADER: usize = 12;
/// Transmit buffers up to this size are of the small kind.
const SMALL: usize = 2048;
/// Most spare transmit buffers kept of each kind.
const SPARE: usize = 32;
/// MTU without VIRTIO_NET_F_MTU.
const DEFAULT_MTU: u16 = 1500;
/// Least and largest IP MTU that is believed.
const MTU: core::ops::RangeInclusive<u16> = 576..=65_521;

mod bit {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const MRG_RXBUF: u64 = 1 << 15;
}

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;

/// How many receive buffers the device gets, and of which size.
///
/// A large buffer takes a frame of any size in one piece; small ones save memory, but large frames are put together by
/// a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxBuffers {
    /// How many (at most 256).
    pub count: u16,
    /// Bytes of each.
    pub size: usize,
}

impl RxBuffers {
    /// What suits a guest of so much memory: 1 MiB of small buffers below 64 MiB, else 64 that take any frame.
    pub fn for_memory(memory_size: u64) -> RxBuffers {
        if memory_size < 64 << 20 {
            RxBuffers { count: 256, size: 4096 }
        } else {
            RxBuffers { count: 64, size: (HEADER + MAX_FRAME).next_multiple_of(4096) }
        }
    }
}

/// What the device counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStatistics {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames dropped: bad headers, lengths or checksums.
    pub rx_dropped: u64,
    /// Frames sent (a segmented one counts once).
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// What the device does for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// It fills in checksums.
    pub checksum: bool,
    /// It cuts TCP segments.
    pub segmentation: bool,
    /// Frames may come with checksums that are not filled in, or were verified already.
    pub rx_checksum: bool,
}

/// A network device.
pub struct NetDevice {
    pub(crate) rx: Receiver,
    pub(crate) tx: Sender,
    transport: Transport,
    mac: [u8; 6],
    /// If the device says which: the generation of the clock page it was read in.
    mac_read: Option<u32>,
    mtu: u16,
    offloads: Offloads,
}

/// The receiving half.
pub(crate) struct Receiver {
    queue: Queue,
    /// All buffers, how many of them the device was ever given, and for each head in flight which it is.
    buffers: Vec<Box<[u8]>>,
    started: usize,
    by_head: Vec<u16>,
    /// Where frames of several buffers are put together.
    gathered: Vec<u8>,
    /// Parts still to come, whether those so far are good, whether the device vouches for the checksum.
    missing: u16,
    good: bool,
    vouched: bool,
    mergeable: bool,
    broken: bool,
    statistics: NetStatistics,
}

/// The sending half.
pub(crate) struct Sender {
    queue: Queue,
    in_flight: Vec<Option<Box<[u8]>>>,
    spare_small: Vec<Box<[u8]>>,
    spare_large: Vec<Box<[u8]>>,
    checksum: bool,
    broken: bool,
    frames: u64,
    bytes: u64,
}

/// What a filled buffer is.
enum Taken {
    /// The end of a good frame.
    Frame(Frame),
    /// A part of one.
    Part,
    /// The end of a bad one.
    Bad,
}

/// A received frame: where it lies.
pub(crate) enum Frame {
    /// In one buffer.
    Single { buffer: u16, length: usize },
    /// In `gathered`.
    Gathered,
}

fn read_mac(transport: &Transport) -> [u8; 6] {
    [0, 1, 2, 3, 4, 5].map(|i| transport.config8(i))
}

impl NetDevice {
    /// Sets the device up; frames are received from [`NetDevice::start`] on.
    pub fn new(transport: Transport) -> Result<NetDevice, VirtioError> {
        let wanted =
            bit::CSUM | bit::GUEST_CSUM | bit::MTU | bit::MAC | bit::GUEST_TSO4 | bit::HOST_TSO4 | bit::MRG_RXBUF;
        let features = transport.negotiate(wanted)?;
        let has = |bit| features & bit != 0;
        let rx = transport.queue(0, QUEUE_SIZE)?;
        let tx = transport.queue(1, QUEUE_SIZE)?;
        let mac = if has(bit::MAC) {
            read_mac(&transport)
        } else {
            // Locally administered, from nothing better than chance.
            let r = crate::rng::random_u64().to_le_bytes();
            [2, r[0], r[1], r[2], r[3], r[4]]
        };
        let mtu = if has(bit::MTU) {
            u16::from(transport.config8(10)) | u16::from(transport.config8(11)) << 8
        } else {
            DEFAULT_MTU
        };
        if !MTU.contains(&mtu) || mac[0] & 1 != 0 {
            return Err(transport.fail(VirtioError::Config("MTU or MAC address")));
        }
        transport.ready();
        let (rx_size, tx_size) = (usize::from(rx.size()), usize::from(tx.size()));
        Ok(NetDevice {
            rx: Receiver {
                queue: rx,
                buffers: Vec::new(),
                started: 0,
                by_head: vec![0; rx_size],
                gathered: Vec::new(),
                missing: 0,
                good: true,
                vouched: false,
                mergeable: has(bit::MRG_RXBUF),
                broken: false,
                statistics: NetStatistics::default(),
            },
            tx: Sender {
                queue: tx,
                in_flight: (0..tx_size).map(|_| None).collect(),
                spare_small: Vec::new(),
                spare_large: Vec::new(),
                checksum: has(bit::CSUM),
                broken: false,
                frames: 0,
                bytes: 0,
            },
            transport,
            mac,
            mac_read: has(bit::MAC).then(crate::time::generation),
            mtu,
            offloads: Offloads {
                checksum: has(bit::CSUM),
                segmentation: has(bit::CSUM) && has(bit::HOST_TSO4),
                rx_checksum: has(bit::GUEST_CSUM),
            },
        })
    }

    /// MAC address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// IP MTU.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// What the device does for us.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// What was counted so far.
    pub fn statistics(&self) -> NetStatistics {
        NetStatistics { tx_frames: self.tx.frames, tx_bytes: self.tx.bytes, ..self.rx.statistics }
    }

    /// Reads the MAC address anew if the VM is not what it was: an instance of a template has another. One that makes no sense
    /// is not taken.
    pub(crate) fn renew_mac(&mut self) {
        let now = crate::time::generation();
        if self.mac_read.is_some_and(|then| then != now) {
            self.mac_read = Some(now);
            let mac = read_mac(&self.transport);
            if mac[0] & 1 == 0 {
                self.mac = mac;
            }
        }
    }

    /// Makes the receive buffers; the device does not have them yet.
    pub(crate) fn prepare(&mut self, buffers: RxBuffers) {
        // Without mergeable buffers each must take the largest frame the device may deliver.
        let least = if self.rx.mergeable { HEADER + SMALL } else { HEADER + MAX_FRAME };
        let size = buffers.size.max(least);
        for _ in self.rx.buffers.len()..usize::from(buffers.count.clamp(1, self.rx.queue.size())) {
            self.rx.buffers.push(vec![0; size].into_boxed_slice());
        }
    }

    /// Gives the device its receive buffers.
    pub fn start(&mut self, buffers: RxBuffers) {
        self.prepare(buffers);
        for buffer in self.rx.started..self.rx.buffers.len() {
            self.rx.give(buffer as u16);
        }
        self.rx.started = self.rx.buffers.len();
    }

    /// Rings the doorbells that are due.
    pub(crate) fn kick(&mut self) {
        self.rx.queue.kick(&self.transport);
        self.tx.queue.kick(&self.transport);
    }

    /// Whether a frame has come.
    pub(crate) fn has_received(&self) -> bool {
        !self.rx.broken && self.rx.queue.has_used()
    }

    /// Whether the device has nothing left to send.
    pub(crate) fn is_quiet(&self) -> bool {
        self.tx.broken || self.tx.queue.in_flight() == 0 || self.tx.queue.has_used()
    }

    /// Whether something was sent since the last look.
    pub(crate) fn has_sent(&self) -> bool {
        !self.tx.broken && self.tx.queue.has_used()
    }
}

fn broken(what: &str, e: QueueError) -> bool {
    log::error!("network device given up ({what}): {e}");
    true
}

impl Receiver {
    /// Gives a buffer to the device.
    fn give(&mut self, buffer: u16) {
        let b = &mut self.buffers[usize::from(buffer)];
        let segment = Segment { address: b.as_mut_ptr() as u64, length: b.len() as u32, device_writes: true };
        // SAFETY: the buffer is owned by `buffers`, never freed or resized while the device lives, and not touched
        // until the chain comes back.
        let head = unsafe { self.queue.add(&[segment]) };
        // There are no more buffers than entries.
        if let Some(head) = head {
            self.by_head[usize::from(head)] = buffer;
        }
    }

    fn pop(&mut self) -> Option<(u16, usize)> {
        if self.broken {
            return None;
        }
        match self.queue.pop() {
            Ok(used) => used.map(|(head, length)| (self.by_head[usize::from(head)], length as usize)),
            Err(e) => {
                self.broken = broken("receive", e);
                None
            }
        }
    }

    /// The next good frame.
    pub(crate) fn receive(&mut self) -> Option<Frame> {
        // At most all buffers can be bad.
        for _ in 0..=self.buffers.len() {
            let (buffer, length) = self.pop()?;
            match self.take(buffer, length) {
                Taken::Frame(frame) => {
                    self.statistics.rx_frames += 1;
                    self.statistics.rx_bytes += self.bytes(&frame).len() as u64;
                    return Some(frame);
                }
                Taken::Part => {}
                Taken::Bad => self.statistics.rx_dropped += 1,
            }
        }
        None
    }

    /// Looks at a buffer the device has filled. Unless it is a frame's only one, it goes back at once.
    fn take(&mut self, buffer: u16, length: usize) -> Taken {
        let bytes = &self.buffers[usize::from(buffer)][..length];
        if self.missing == 0 {
            let Some(h) = bytes.first_chunk::<HEADER>() else {
                self.give(buffer);
                return Taken::Bad;
            };
            let vouched = h[0] & (NEEDS_CSUM | DATA_VALID) != 0;
            let count = if self.mergeable { u16::from_le_bytes([h[10], h[11]]) } else { 1 };
            if count == 1 {
                return self.check(Frame::Single { buffer, length: length - HEADER }, vouched);
            }
            // The first part of several.
            self.gathered.clear();
            self.gathered.extend_from_slice(&bytes[HEADER..]);
            self.vouched = vouched;
            self.missing = count.saturating_sub(1);
            self.good = usize::from(count) <= self.buffers.len();
            self.give(buffer);
            return if count == 0 { Taken::Bad } else { Taken::Part };
        }
        self.missing -= 1;
        self.good &= self.gathered.len() + length <= MAX_FRAME;
        if self.good {
            self.gathered.extend_from_slice(bytes);
        }
        self.give(buffer);
        match (self.missing, self.good) {
            (0, true) => self.check(Frame::Gathered, self.vouched),
            (0, false) => Taken::Bad,
            _ => Taken::Part,
        }
    }

    fn check(&mut self, frame: Frame, vouched: bool) -> Taken {
        let bytes = self.bytes(&frame);
        if bytes.len() < ETHERNET || bytes.len() > MAX_FRAME || !(vouched || checksum_is_right(bytes)) {
            self.finish(frame);
            return Taken::Bad;
        }
        Taken::Frame(frame)
    }

    /// The frame's bytes.
    pub(crate) fn bytes(&self, frame: &Frame) -> &[u8] {
        match *frame {
            Frame::Single { buffer, length } => &self.buffers[usize::from(buffer)][HEADER..HEADER + length],
            Frame::Gathered => &self.gathered,
        }
    }

    /// Gives the frame's buffer back to the device.
    pub(crate) fn finish(&mut self, frame: Frame) {
        if let Frame::Single { buffer, .. } = frame {
            self.give(buffer);
        }
    }
}

/// Verifies the TCP checksum of an IPv4 frame that nobody vouched for; other frames are for the stack to check.
fn checksum_is_right(frame: &[u8]) -> bool {
    use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket};
    let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return false };
    if ethernet.ethertype() != EthernetProtocol::Ipv4 {
        return true;
    }
    let Ok(ip) = Ipv4Packet::new_checked(ethernet.payload()) else { return false };
    if ip.next_header() != IpProtocol::Tcp {
        return true;
    }
    TcpPacket::new_checked(ip.payload())
        .is_ok_and(|tcp| tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()))
}

impl Sender {
    /// Whether a frame can be sent now. Takes back what the device has sent.
    pub(crate) fn has_room(&mut self) -> bool {
        self.reclaim();
        !self.broken && self.queue.free() > 0
    }

    fn reclaim(&mut self) {
        while !self.broken {
            match self.queue.pop() {
                Ok(None) => break,
                Ok(Some((head, _))) => {
                    if let Some(buffer) = self.in_flight[usize::from(head)].take() {
                        let spare = if buffer.len() <= SMALL { &mut self.spare_small } else { &mut self.spare_large };
                        if spare.len() < SPARE {
                            spare.push(buffer);
                        }
                    }
                }
                Err(e) => self.broken = broken("transmit", e),
            }
        }
    }

    /// Sends a frame of `length` bytes that `fill` writes; `segment` is the size the device cuts TCP data into.
    /// Only if there [is room](Sender::has_room).
    pub(crate) fn send<R>(&mut self, length: usize, segment: Option<u16>, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let total = HEADER + length;
        let mut buffer = if total <= SMALL {
            self.spare_small.pop().unwrap_or_else(|| vec![0; SMALL].into_boxed_slice())
        } else {
            let size = (HEADER + MAX_FRAME).max(total);
            self.spare_large.pop().filter(|b| b.len() >= total).unwrap_or_else(|| vec![0; size].into_boxed_slice())
        };
        let (header, frame) = buffer[..total].split_at_mut(HEADER);
        let result = fill(frame);
        header.copy_from_slice(&header_of(frame, segment, self.checksum));
        let part = Segment { address: buffer.as_ptr() as u64, length: total as u32, device_writes: false };
        // SAFETY: the buffer is kept in `in_flight` until the chain comes back.
        if let Some(head) = unsafe { self.queue.add(&[part]) } {
            self.in_flight[usize::from(head)] = Some(buffer);
            self.frames += 1;
            self.bytes += length as u64;
        }
        result
    }
}

/// Builds the virtio header of a frame and, if the device fills in checksums, prepares the TCP checksum field.
fn header_of(frame: &mut [u8], segment: Option<u16>, checksum: bool) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let tcp = checksum.then(|| tcp_of(frame)).flatten();
    let Some(Tcp { start, pseudo_sum, header_length }) = tcp else { return header };
    header[0] = NEEDS_CSUM;
    header[1] = GSO_NONE;
    if let Some(segment) = segment {
        header[1] = GSO_TCPV4;
        header[2..4].copy_from_slice(&((start + header_length) as u16).to_le_bytes());
        header[4..6].copy_from_slice(&segment.to_le_bytes());
    }
    header[6..8].copy_from_slice(&(start as u16).to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    frame[start + 16..start + 18].copy_from_slice(&pseudo_sum.to_be_bytes());
    header
}

struct Tcp {
    /// Where the TCP header begins.
    start: usize,
    /// Sum of the pseudo-header, not complemented.
    pseudo_sum: u16,
    header_length: usize,
}

/// The TCP part of an IPv4 frame of our own making.
fn tcp_of(frame: &[u8]) -> Option<Tcp> {
    let ip = frame.get(ETHERNET..)?;
    if frame[12..14] != [0x08, 0x00] || ip.len() < 20 || ip[0] >> 4 != 4 || ip[9] != 6 {
        return None;
    }
    let ip_header = usize::from(ip[0] & 15) * 4;
    let tcp = ip.get(ip_header..)?;
    if tcp.len() < 20 {
        return None;
    }
    let words = ip[12..20].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let mut sum = words.sum::<u32>() + 6 + tcp.len() as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    Some(Tcp { start: ETHERNET + ip_header, pseudo_sum: sum as u16, header_length: usize::from(tcp[12] >> 4) * 4 })
}

#[cfg(test)]
mod tests;
