//! The duplicate-request cache: a client that got no reply sends its call again, maybe on a new connection, and a
//! call such as REMOVE must not be executed twice.
//!
//! Owns: the replies of recent calls whose repetition would differ, by client address and port, transaction id,
//! procedure and a checksum of the call. Always true: at most [`ENTRIES_MAX`] replies of at most [`BYTES_MAX`] bytes in
//! all are kept, the oldest going first; a call being executed is never started a second time.
//! It does not survive a restart of the N-module; the D-module's own reply cache covers the way between the modules.
use alloc::{
    collections::{BTreeMap, VecDeque},
    vec::Vec,
};
use core::net::SocketAddr;
use xxhash_rust::xxh3::xxh3_64;

/// Most replies kept.
pub const ENTRIES_MAX: usize = 1024;
/// Most bytes of replies kept.
pub const BYTES_MAX: usize = 512 * 1024;
/// Most calls being executed that are watched for duplicates; beyond it a call is executed unwatched.
pub const IN_PROGRESS_MAX: usize = 1024;
/// Bytes of a call that the checksum covers.
const CHECKED: usize = 256;

/// What makes two calls the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    client: SocketAddr,
    xid: u32,
    program: u32,
    procedure: u32,
    checksum: u64,
}

impl Key {
    /// Key of the call `message` from `client`.
    pub fn new(client: SocketAddr, call: &crate::rpc::Call, message: &[u8]) -> Key {
        Key {
            client,
            xid: call.xid.0,
            program: call.program,
            procedure: call.procedure,
            checksum: xxh3_64(&message[..message.len().min(CHECKED)]),
        }
    }
}

#[derive(Debug)]
enum Entry {
    InProgress,
    Done(Vec<u8>),
}

/// What a call turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// New: execute it, then call [`DuplicateCache::finish`].
    New,
    /// New, but there is no room to watch it: execute it.
    Unwatched,
    /// A duplicate of one being executed: no reply, the first one's will come.
    InProgress,
    /// A duplicate of one answered with these bytes.
    Done(Vec<u8>),
}

/// The cache.
#[derive(Debug, Default)]
pub struct DuplicateCache {
    entries: BTreeMap<Key, Entry>,
    /// Keys of the `Done` entries, oldest first.
    done: VecDeque<Key>,
    bytes: usize,
}

impl DuplicateCache {
    /// Looks a call up, and enters a new one.
    pub fn begin(&mut self, key: Key) -> Seen {
        match self.entries.get(&key) {
            Some(Entry::InProgress) => Seen::InProgress,
            Some(Entry::Done(reply)) => Seen::Done(reply.clone()),
            None if self.entries.len() - self.done.len() >= IN_PROGRESS_MAX => Seen::Unwatched,
            None => {
                self.entries.insert(key, Entry::InProgress);
                Seen::New
            }
        }
    }

    /// Keeps the reply of a call that was [`Seen::New`]; `None` forgets the call, so that it may be tried again.
    pub fn finish(&mut self, key: Key, reply: Option<&[u8]>) {
        let Some(reply) = reply.filter(|reply| reply.len() <= BYTES_MAX) else {
            self.entries.remove(&key);
            return;
        };
        while self.done.len() >= ENTRIES_MAX || self.bytes + reply.len() > BYTES_MAX {
            let Some(oldest) = self.done.pop_front() else { break };
            if let Some(Entry::Done(gone)) = self.entries.remove(&oldest) {
                self.bytes -= gone.len();
            }
        }
        self.bytes += reply.len();
        self.done.push_back(key);
        let before = self.entries.insert(key, Entry::Done(reply.to_vec()));
        debug_assert!(matches!(before, Some(Entry::InProgress)));
    }

    /// Replies kept, and their bytes.
    pub fn usage(&self) -> (usize, usize) {
        (self.done.len(), self.bytes)
    }
}

#[cfg(test)]
mod tests;
