//! Closing the windows of TCP before this machine is stopped for a moment.
//!
//! A peer that has sent data waits for its acknowledgement; after twice the round-trip time and two milliseconds (RFC 8985, section 7.2) it
//! believes that its last segment may be lost, and sends it again. So before the stop each connection is told of a window of zero, and each segment
//! that goes out says so again: the peer sends no more, what it had sent is acknowledged, and when nothing comes any more nobody waits for this
//! machine: a closed window is probed no sooner than after 200 ms. Afterwards one acknowledgement on each of these connections opens it again.
//!
//! Owns which connections were closed. Always true: a window is only ever closed on connections that a peer asked for, so what
//! this machine has asked of others is still answered; smoltcp knows nothing of it, and takes what comes by the window it has offered itself.
use super::connections::Connections;
use super::segment::{ACK, HEADERS, Key, RST, SYN, change, incoming, outgoing};
use crate::time::{Duration, Instant};
use alloc::collections::BTreeSet;

/// When no data has come for so long, none is under way: the acknowledgement that closed the window has had the time to get there, and what was sent
/// until then the time to get here.
pub(super) const QUIET: Duration = Duration::from_micros(250);
/// On a connection that has been silent for longer nobody is about to send anything: it is closed only if somebody does.
pub(super) const ACTIVE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(1);

/// See the module.
#[derive(Default)]
pub(super) struct Windows {
    closing: bool,
    /// Since when no data has come, while closing.
    quiet_since: Instant,
    /// Peers that have been told of a closed window, and those that are still to be told of how it is now.
    closed: BTreeSet<Key>,
    untold: BTreeSet<Key>,
}

impl Windows {
    /// Closes windows from now on, or opens them again: see [`Windows::next_to_tell`].
    pub(super) fn close(&mut self, closing: bool, connections: &Connections, now: Instant) {
        if closing {
            let active = super::smol(now) - ACTIVE;
            self.closed.extend(connections.accepted_since(active));
        }
        self.closing = closing;
        self.quiet_since = now;
        self.untold = if closing { self.closed.clone() } else { core::mem::take(&mut self.closed) };
    }

    /// Whether they are closed and no peer seems to have anything under way.
    pub(super) fn are_closed(&self, now: Instant) -> bool {
        self.closing && self.untold.is_empty() && now.since(self.quiet_since) >= QUIET
    }

    /// A frame has come.
    pub(super) fn incoming(&mut self, frame: &[u8], connections: &Connections, now: impl FnOnce() -> Instant) {
        if self.closing
            && let Some((key, 1..)) = incoming(frame)
            && connections.is_accepted(&key)
        {
            self.quiet_since = now();
        }
    }

    /// A frame goes out, of which `connections` have heard.
    pub(super) fn outgoing(&mut self, frame: &mut [u8], connections: &Connections, has_checksum: bool) {
        if !self.closing {
            return;
        }
        let Some((key, tcp)) = outgoing(frame) else { return };
        if tcp[13] & (SYN | RST | ACK) == ACK && connections.is_accepted(&key) {
            self.closed.insert(key);
            self.untold.remove(&key);
            change(tcp, 14, &[0, 0], has_checksum);
        }
    }

    /// Whether there are peers to be told.
    pub(super) fn are_to_tell(&self) -> bool {
        !self.untold.is_empty()
    }

    /// The next frame to be sent so that all peers know how the windows are now; a connection that has ended meanwhile needs none.
    pub(super) fn next_to_tell(&mut self, connections: &Connections, has_checksum: bool) -> Option<[u8; HEADERS]> {
        loop {
            let key = self.untold.pop_first()?;
            if let Some((number, said)) = connections.last(&key) {
                return Some(said.frame(key, number, self.closing, has_checksum));
            }
        }
    }
}

#[cfg(test)]
mod tests;
