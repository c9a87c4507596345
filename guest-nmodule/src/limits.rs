//! How the N-module divides its memory.
//!
//! Always true: what connections, calls and the way to the D-module can take together is less than the memory there is,
//! so that no client can make the image run out of it. At a limit the N-module stops reading (calls, records) or
//! closes what has been idle longest (connections); it never fails a call for want of memory.

use nfs::nfs3::arguments::SMALL_REPLY;
use nfs::nfs3::results::Capacity;

#[cfg(test)]
mod tests;

/// What a volume of the data layout holds. The N-module does not know the layout; a test compares.
pub const CAPACITY: Capacity = Capacity { file_size_max: 1 << 44, links_max: 65_000 };

/// Memory of the image itself: code, tables, stacks.
const IMAGE: u64 = 9 << 20;
/// Kept free: network buffers of the driver, the duplicate-request cache, tasks, slack of the allocator.
const RESERVE: u64 = 5 << 20;
/// TCP buffers towards the D-module, each way.
pub const LINK_BUFFER: usize = 512 << 10;
/// TCP buffers of an NFS connection, each way: at 1 GB/s good for a round trip of 250 µs.
pub const NFS_BUFFER: usize = 256 << 10;
/// TCP buffers of a portmap connection, each way.
pub const PORTMAP_BUFFER: usize = 4 << 10;
/// Most portmap connections.
pub const PORTMAP_CONNECTIONS: usize = 8;
/// Most connections of a port that wait to be accepted. Each has its buffers already, and one more listens.
pub const BACKLOG: usize = 2;
/// Most calls of one connection being executed.
pub const CALLS_PER_CONNECTION: usize = 32;
/// Room for a small call (not READ, WRITE or a listing) with a record of usual size, and its reply.
const SMALL_CALL_ROOM: usize = SMALL_REPLY + 256;
/// What the largest call costs: its record, or its reply, and as much again for what it is made from.
pub const LARGEST_CALL: usize = 2 * nfs::record::RECORD_MAX;

/// Limits of an N-module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most NFS connections.
    pub connections: usize,
    /// Most sockets of all kinds before no more connections are accepted.
    pub sockets: usize,
    /// Most bytes of records and replies of all calls with bulk data together.
    pub call_bytes: usize,
    /// The same of small calls: enough for as many as there can be, so that they wait for nothing else, even while
    /// the D-module is away.
    pub small_bytes: usize,
}

/// There is too little memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} MiB of memory are too little: the N-module needs 24 MiB")]
pub struct TooLittleMemory(u64);

impl Limits {
    /// For a VM with so many bytes of memory: two fifths of what is free for calls, the rest for connections.
    pub fn of(memory_size: u64) -> Result<Limits, TooLittleMemory> {
        let portmap = PORTMAP_CONNECTIONS * (CALLS_PER_CONNECTION * SMALL_CALL_ROOM + 2 * PORTMAP_BUFFER);
        let fixed = IMAGE + RESERVE + (2 * LINK_BUFFER + portmap) as u64;
        let free = memory_size.saturating_sub(fixed);
        let call_bytes = (free / 5 * 2).min(256 << 20);
        let connection = 2 * NFS_BUFFER + CALLS_PER_CONNECTION * SMALL_CALL_ROOM;
        let sockets = ((free - call_bytes) / connection as u64).min(256) as usize;
        let connections = sockets.saturating_sub(BACKLOG + 1);
        if call_bytes < LARGEST_CALL as u64 || connections < 4 {
            return Err(TooLittleMemory(memory_size >> 20));
        }
        let small_bytes = (connections + PORTMAP_CONNECTIONS) * CALLS_PER_CONNECTION * SMALL_CALL_ROOM;
        // The small ones of portmap and the D-module's come on top.
        let sockets = sockets + PORTMAP_CONNECTIONS + BACKLOG + 1 + 1;
        Ok(Limits { connections, sockets, call_bytes: call_bytes as usize, small_bytes })
    }
}
