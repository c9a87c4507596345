//! Acknowledgements that the peer does not throw away.
//!
//! When its retransmission timer fires, smoltcp (0.14) goes back to the first unacknowledged byte, and numbers its pure
//! acknowledgements from there too. A peer that has received the bytes after it finds such a number too old (RFC 9293,
//! 3.10.7.4: "unacceptable") and drops the segment with the acknowledgement in it. If that happens to both ends at
//! once, each drops what the other needs to go on, and the connection stands still until it times out. RFC 9293 wants
//! SND.NXT there, the next number never sent; so a pure acknowledgement that is numbered lower gets that.
//!
//! Owns the highest number sent on each connection, for at most [`MAX_CONNECTIONS`] of them; beyond that some
//! connections go without.
use crate::virtio::net::ETHERNET;
use alloc::collections::BTreeMap;

/// Most connections remembered.
const MAX_CONNECTIONS: usize = 4096;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Own port, peer's port, peer's address.
type Key = (u16, u16, [u8; 4]);

/// The next number never sent, by connection.
#[derive(Default)]
pub(super) struct NextNumbers(BTreeMap<Key, u32>);

impl NextNumbers {
    /// Looks at a frame that goes out, and renumbers it if it is a pure acknowledgement with too low a number.
    /// `has_checksum`: smoltcp has filled in the TCP checksum.
    pub(super) fn outgoing(&mut self, frame: &mut [u8], has_checksum: bool) {
        let Some((key, tcp)) = parse(frame) else { return };
        let header = &frame[tcp..];
        let number = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let flags = header[13];
        let payload = header.len().saturating_sub(usize::from(header[12] >> 4) * 4) as u32;
        let next = number.wrapping_add(payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0));
        if flags & RST != 0 {
            self.0.remove(&key);
        } else if flags & SYN != 0 {
            if self.0.len() < MAX_CONNECTIONS {
                self.0.insert(key, next);
            }
        } else if let Some(highest) = self.0.get_mut(&key) {
            // One byte may be the probe of a closed window, which the peer does not take.
            if next != number && payload != 1 {
                if is_before(*highest, next) {
                    *highest = next;
                }
            } else if next == number && flags & ACK != 0 && is_before(number, *highest) {
                renumber(&mut frame[tcp..], *highest, has_checksum);
            }
        }
    }

    /// Forgets a connection.
    pub(super) fn forget(&mut self, own_port: u16, peer_port: u16, peer: [u8; 4]) {
        self.0.remove(&(own_port, peer_port, peer));
    }
}

/// The connection of an IPv4 TCP frame of our own making, and where its TCP header begins.
fn parse(frame: &[u8]) -> Option<(Key, usize)> {
    let ip = frame.get(ETHERNET..)?;
    if frame[12..14] != [0x08, 0x00] || ip.len() < 20 || ip[0] >> 4 != 4 || ip[9] != 6 {
        return None;
    }
    let start = usize::from(ip[0] & 15) * 4;
    let tcp = ip.get(start..).filter(|tcp| tcp.len() >= 20)?;
    let port = |at| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    Some(((port(0), port(2), [ip[16], ip[17], ip[18], ip[19]]), ETHERNET + start))
}

/// `a < b` in sequence space.
fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// Changes the sequence number of a TCP header, and the checksum with it (RFC 1624, equation 3).
fn renumber(tcp: &mut [u8], number: u32, has_checksum: bool) {
    let new = number.to_be_bytes();
    if has_checksum {
        let mut sum = u32::from(!u16::from_be_bytes([tcp[16], tcp[17]]));
        for i in [0, 2] {
            sum += u32::from(!u16::from_be_bytes([tcp[4 + i], tcp[5 + i]]));
            sum += u32::from(u16::from_be_bytes([new[i], new[i + 1]]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    tcp[4..8].copy_from_slice(&new);
}

#[cfg(test)]
mod tests;
