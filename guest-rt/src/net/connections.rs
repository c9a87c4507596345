//! What was last said on each connection, and acknowledgements that the peer does not throw away.
//!
//! When its retransmission timer fires, smoltcp (0.14) goes back to the first unacknowledged byte, and numbers its pure
//! acknowledgements from there too. A peer that has received the bytes after it finds such a number too old (RFC 9293,
//! 3.10.7.4: "unacceptable") and drops the segment with the acknowledgement in it. If that happens to both ends at
//! once, each drops what the other needs to go on, and the connection stands still until it times out. RFC 9293 wants
//! SND.NXT there, the next number never sent; so a pure acknowledgement that is numbered lower gets that.
//!
//! Owns the highest number sent on each connection, which end asked for it, and what an acknowledgement of this machine's would say now, for
//! at most [`MAX_CONNECTIONS`] of them; beyond that some connections go without.
use super::segment::{ACK, Acknowledgement, FIN, Key, RST, SYN, change, outgoing, payload};
use alloc::collections::BTreeMap;
use smoltcp::time::Instant;

/// Most connections remembered.
const MAX_CONNECTIONS: usize = 4096;

/// What is known of a connection.
#[derive(Clone, Copy)]
struct Connection {
    /// The next number never sent.
    next: u32,
    /// The peer asked for the connection.
    accepted: bool,
    /// When and what was said last.
    at: Instant,
    said: Acknowledgement,
}

/// The connections of one stack.
#[derive(Default)]
pub(super) struct Connections(BTreeMap<Key, Connection>);

impl Connections {
    /// Looks at a frame that goes out at `at`, and renumbers it if it is a pure acknowledgement with too low a number.
    /// `has_checksum`: smoltcp has filled in the TCP checksum.
    pub(super) fn outgoing(&mut self, frame: &mut [u8], has_checksum: bool, at: Instant) {
        let Some(said) = Acknowledgement::of(frame) else { return };
        let Some((key, tcp)) = outgoing(frame) else { return };
        let number = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let (flags, payload) = (tcp[13], payload(tcp) as u32);
        let next = number.wrapping_add(payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0));
        if flags & RST != 0 {
            self.0.remove(&key);
        } else if flags & SYN != 0 {
            if self.0.len() < MAX_CONNECTIONS {
                self.0.insert(key, Connection { next, accepted: flags & ACK != 0, at, said });
            }
        } else if let Some(connection) = self.0.get_mut(&key) {
            (connection.at, connection.said) = (at, said);
            // One byte may be the probe of a closed window, which the peer does not take.
            if next != number && payload != 1 {
                if is_before(connection.next, next) {
                    connection.next = next;
                }
            } else if next == number && flags & ACK != 0 && is_before(number, connection.next) {
                change(tcp, 4, &connection.next.to_be_bytes(), has_checksum);
            }
        }
    }

    /// Those a peer asked for on which something was said since `since`.
    pub(super) fn accepted_since(&self, since: Instant) -> impl Iterator<Item = Key> {
        self.0.iter().filter(move |(_, c)| c.accepted && c.at >= since).map(|(key, _)| *key)
    }

    /// Whether it is known, and a peer asked for it.
    pub(super) fn is_accepted(&self, key: &Key) -> bool {
        self.0.get(key).is_some_and(|c| c.accepted)
    }

    /// The next number never sent on a connection, and what was acknowledged last.
    pub(super) fn last(&self, key: &Key) -> Option<(u32, Acknowledgement)> {
        self.0.get(key).map(|c| (c.next, c.said))
    }

    /// Forgets a connection.
    pub(super) fn forget(&mut self, own_port: u16, peer_port: u16, peer: [u8; 4]) {
        self.0.remove(&(own_port, peer_port, peer));
    }
}

/// `a < b` in sequence space.
fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests;
