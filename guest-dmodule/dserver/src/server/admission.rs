//! What is let in: requests by the bytes they bring, reads by the bytes of their replies.
//!
//! Always true: what is held of either is bounded, and a connection whose peer does not take its replies does not keep the others
//! from theirs.
use super::{Now, Server};
use crate::jobs::{Held, Kind};
use fabric::op::{Op, Request};
use fabric::server::{ConnectionId, KeepKey, Token};

/// Pieces being read ahead at a time.
pub(super) const READ_AHEADS_MAX: usize = 4;

impl Server {
    /// Whether more bytes should be read from connections now: else too much is held already.
    pub fn takes_requests(&self) -> bool {
        self.held < self.held_max
    }

    /// A frame of so many bytes has left.
    pub fn sent(&mut self, connection: ConnectionId, bytes: usize, now: Now) {
        if let Some(unsent) = self.unsent.get_mut(&connection) {
            *unsent = unsent.saturating_sub(bytes);
        }
        if !self.waiting_reads.is_empty() {
            self.run(now);
        }
    }

    pub(super) fn admit(&mut self, token: Token, request: Request, keep: Option<KeepKey>) {
        let held = match &request.op {
            Op::Read { .. } => return self.waiting_reads.push_back((token, request)),
            Op::Write { data, .. } => {
                self.held += data.len();
                Held::Request(data.len())
            }
            _ => Held::Nothing,
        };
        self.jobs.add(Kind::Request { token, request, keep, held });
    }

    /// Reads begin while not too many bytes wait to be sent. A connection whose peer does not take its replies must not
    /// keep the others': it has half at most, and each may have one reply whatever the others have.
    pub(super) fn admit_reads(&mut self) {
        let mut total = self.unsent.values().sum::<usize>();
        for _ in 0..self.waiting_reads.len() {
            let Some((token, request)) = self.waiting_reads.pop_front() else { break };
            let Op::Read { handle, offset, length } = request.op else { continue };
            let connection = self.sessions.connection(token);
            let bytes = length as usize;
            if let Some(connection) = connection {
                let own = self.unsent.entry(connection).or_default();
                if *own > 0 && (*own + bytes > self.held_max / 2 || total + bytes > self.held_max) {
                    self.waiting_reads.push_back((token, request));
                    continue;
                }
                *own += bytes;
                total += bytes;
            }
            let held = Held::Reply(connection, bytes);
            self.jobs.add(Kind::Request { token, request, keep: None, held });
            if let Some((offset, length)) = self.readahead.read(handle, offset, length)
                && self.jobs.read_aheads < READ_AHEADS_MAX
            {
                self.jobs.add(Kind::ReadAhead { handle, offset, length });
            }
        }
    }

    /// A request is done with what it held.
    pub(super) fn release(&mut self, held: Held) {
        match held {
            Held::Nothing => {}
            Held::Request(bytes) => self.held -= bytes,
            Held::Reply(connection, bytes) => {
                if let Some(own) = connection.and_then(|c| self.unsent.get_mut(&c)) {
                    *own = own.saturating_sub(bytes);
                }
            }
        }
    }
}
