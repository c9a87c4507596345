//! TCP segments in IPv4 frames, as bytes: whose they are, changing a word of their header, acknowledgements.
//!
//! Owns nothing. Always true: what is not such a frame, or is cut short, is none.
use crate::virtio::net::ETHERNET;

pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;
/// Headers of a segment without options: Ethernet, IPv4, TCP.
pub(super) const HEADERS: usize = ETHERNET + 20 + 20;

/// A connection: own port, peer's port, peer's address.
pub(super) type Key = (u16, u16, [u8; 4]);

/// Where in a frame the TCP header begins, and where the segment ends.
fn place(frame: &[u8]) -> Option<core::ops::Range<usize>> {
    let ip = frame.get(ETHERNET..)?;
    if frame[12..14] != [0x08, 0x00] || ip.len() < 20 || ip[0] >> 4 != 4 || ip[9] != 6 {
        return None;
    }
    let start = usize::from(ip[0] & 15) * 4;
    let end = usize::from(u16::from_be_bytes([ip[2], ip[3]])).min(ip.len());
    (start + 20 <= end).then_some(ETHERNET + start..ETHERNET + end)
}

fn port(tcp: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([tcp[at], tcp[at + 1]])
}

/// The connection of a frame of our own making, and its segment.
pub(super) fn outgoing(frame: &mut [u8]) -> Option<(Key, &mut [u8])> {
    let place = place(frame)?;
    let ip = &frame[ETHERNET..];
    let peer = [ip[16], ip[17], ip[18], ip[19]];
    let tcp = &mut frame[place];
    Some(((port(tcp, 0), port(tcp, 2), peer), tcp))
}

/// The connection of a frame that has come, and how many bytes of data are in it.
pub(super) fn incoming(frame: &[u8]) -> Option<(Key, usize)> {
    let tcp = &frame[place(frame)?];
    let ip = &frame[ETHERNET..];
    let peer = [ip[12], ip[13], ip[14], ip[15]];
    Some(((port(tcp, 2), port(tcp, 0), peer), payload(tcp)))
}

/// Bytes of data in a segment.
pub(super) fn payload(tcp: &[u8]) -> usize {
    tcp.len().saturating_sub(usize::from(tcp[12] >> 4) * 4)
}

/// Changes bytes of a TCP header (an even number, at an even place), and the checksum with them (RFC 1624, equation 3) if there is one.
pub(super) fn change(tcp: &mut [u8], at: usize, new: &[u8], has_checksum: bool) {
    if has_checksum {
        let mut sum = u32::from(!u16::from_be_bytes([tcp[16], tcp[17]]));
        for (i, word) in new.chunks_exact(2).enumerate() {
            let old = &tcp[at + 2 * i..];
            sum += u32::from(!u16::from_be_bytes([old[0], old[1]]));
            sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
        }
        tcp[16..18].copy_from_slice(&(!fold(sum)).to_be_bytes());
    }
    tcp[at..at + new.len()].copy_from_slice(new);
}

/// The internet checksum of a segment with its pseudo-header (RFC 9293, 3.1); its own field must be zero.
pub(super) fn checksum(source: [u8; 4], destination: [u8; 4], tcp: &[u8]) -> u16 {
    let mut sum = 6 + tcp.len() as u32;
    for bytes in [&source[..], &destination[..], tcp] {
        sum += words(bytes);
    }
    !fold(sum)
}

/// The checksum of an IPv4 header (RFC 791, 3.1); its own field must be zero.
pub(super) fn header_checksum(header: &[u8]) -> u16 {
    !fold(words(header))
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w.get(1).copied().unwrap_or(0)]))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a segment of this machine's acknowledges, and all else it takes to say that again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Acknowledgement {
    ethernet: [u8; ETHERNET],
    own: [u8; 4],
    number: [u8; 4],
    window: [u8; 2],
}

impl Acknowledgement {
    /// Of a frame of our own making, if it is a TCP segment.
    pub(super) fn of(frame: &[u8]) -> Option<Acknowledgement> {
        let tcp = frame.get(place(frame)?)?;
        Some(Acknowledgement {
            ethernet: *frame.first_chunk()?,
            own: *frame.get(ETHERNET + 12..)?.first_chunk()?,
            number: *tcp.get(8..)?.first_chunk()?,
            window: *tcp.get(14..)?.first_chunk()?,
        })
    }

    /// The same without data, as the segment with this sequence number; `closed`: with a window of zero.
    pub(super) fn frame(
        &self,
        (own_port, peer_port, peer): Key,
        number: u32,
        closed: bool,
        has_checksum: bool,
    ) -> [u8; HEADERS] {
        let mut frame = [0; HEADERS];
        frame[..ETHERNET].copy_from_slice(&self.ethernet);
        let (ip, tcp) = frame[ETHERNET..].split_at_mut(20);
        // Version and length; 40 bytes in all; not to be fragmented; 64 hops; TCP.
        ip[..10].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6]);
        ip[12..16].copy_from_slice(&self.own);
        ip[16..20].copy_from_slice(&peer);
        let sum = header_checksum(ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        tcp[..2].copy_from_slice(&own_port.to_be_bytes());
        tcp[2..4].copy_from_slice(&peer_port.to_be_bytes());
        tcp[4..8].copy_from_slice(&number.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.number);
        tcp[12..14].copy_from_slice(&[5 << 4, ACK]);
        if !closed {
            tcp[14..16].copy_from_slice(&self.window);
        }
        if has_checksum {
            let sum = checksum(self.own, peer, tcp);
            tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        }
        frame
    }
}

#[cfg(test)]
pub(super) mod frames;
