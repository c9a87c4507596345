//! The sending half: frames on their way to the device, and what it is told of their checksums and segments.
//!
//! Owns the transmit buffers. Always true: a buffer is used again only when the device has returned it; spare ones are at
//! most [`SPARE`] of each kind.
use super::super::queue::{Queue, Segment};
use super::{ETHERNET, HEADER, MAX_FRAME, NEEDS_CSUM, SMALL, broken};
use alloc::{boxed::Box, vec, vec::Vec};

/// Most spare buffers kept of each kind: up to [`SMALL`] bytes, and larger.
const SPARE: usize = 32;
/// Kinds of segmentation.
pub(super) const GSO_NONE: u8 = 0;
pub(super) const GSO_TCPV4: u8 = 1;

/// The sending half.
pub(crate) struct Sender {
    pub(super) queue: Queue,
    in_flight: Vec<Option<Box<[u8]>>>,
    spare_small: Vec<Box<[u8]>>,
    spare_large: Vec<Box<[u8]>>,
    checksum: bool,
    broken: bool,
    frames: u64,
    bytes: u64,
}

impl Sender {
    pub(super) fn new(queue: Queue, checksum: bool) -> Sender {
        Sender {
            in_flight: (0..queue.size()).map(|_| None).collect(),
            queue,
            spare_small: Vec::new(),
            spare_large: Vec::new(),
            checksum,
            broken: false,
            frames: 0,
            bytes: 0,
        }
    }

    /// Frames and bytes sent so far.
    pub(super) fn sent(&self) -> (u64, u64) {
        (self.frames, self.bytes)
    }

    /// Whether the device has nothing left to send.
    pub(super) fn is_quiet(&self) -> bool {
        self.broken || self.queue.in_flight() == 0 || self.queue.has_used()
    }

    /// Whether something was sent since the last look.
    pub(super) fn has_sent(&self) -> bool {
        !self.broken && self.queue.has_used()
    }

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
pub(super) fn header_of(frame: &mut [u8], segment: Option<u16>, checksum: bool) -> [u8; HEADER] {
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
