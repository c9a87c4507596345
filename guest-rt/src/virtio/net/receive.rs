//! The receiving half: the buffers the device fills, and the frames in them.
//!
//! Owns all receive buffers. Always true: a buffer goes back to the device as soon as its frame was looked at; a frame that
//! comes out is whole, has at most [`MAX_FRAME`] bytes and a checksum that is right, or that the device vouches for.
use super::super::queue::{Queue, Segment};
use super::buffer::Buffer;
use super::{DATA_VALID, ETHERNET, HEADER, MAX_FRAME, NEEDS_CSUM, NetStatistics, RxBuffers, SMALL, broken};
use alloc::{vec, vec::Vec};

/// The receiving half.
pub(crate) struct Receiver {
    pub(super) queue: Queue,
    /// All buffers, how many of them the device was ever given, and for each head in flight which it is.
    buffers: Vec<Buffer>,
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

impl Receiver {
    pub(super) fn new(queue: Queue, mergeable: bool) -> Receiver {
        Receiver {
            by_head: vec![0; usize::from(queue.size())],
            queue,
            buffers: Vec::new(),
            started: 0,
            gathered: Vec::new(),
            missing: 0,
            good: true,
            vouched: false,
            mergeable,
            broken: false,
            statistics: NetStatistics::default(),
        }
    }

    /// What was counted of frames that came.
    pub(super) fn statistics(&self) -> NetStatistics {
        self.statistics
    }

    /// Makes the buffers; the device does not have them yet.
    pub(super) fn prepare(&mut self, buffers: RxBuffers) {
        // Without mergeable buffers each must take the largest frame the device may deliver.
        let least = if self.mergeable { HEADER + SMALL } else { HEADER + MAX_FRAME };
        let size = buffers.size.max(least);
        for _ in self.buffers.len()..usize::from(buffers.count.clamp(1, self.queue.size())) {
            self.buffers.push(Buffer::new(size));
        }
    }

    /// Gives the device the buffers.
    pub(super) fn start(&mut self, buffers: RxBuffers) {
        self.prepare(buffers);
        for buffer in self.started..self.buffers.len() {
            self.give(buffer as u16);
        }
        self.started = self.buffers.len();
    }

    /// Whether a frame has come.
    pub(super) fn has_received(&self) -> bool {
        !self.broken && self.queue.has_used()
    }

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
