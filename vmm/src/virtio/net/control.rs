//! The control queue (virtio 1.2, section 5.1.6.5): commands as values.
//!
//! Owns the decoding of commands. Always true: a command has at most [`COMMAND_MAX`] bytes, a table at most [`TABLE_MAX`]
//! addresses; what is longer makes the table [`Table::overflow`], so that the device accepts more frames, never fewer, than
//! the driver asked for. Anything malformed is answered with an error, and nothing is changed.

use crate::config::MacAddress;
use crate::memory::Memory;
use crate::virtio::queue::{Chain, QueueError, VirtQueue, read_front, total, write_at};

/// Longest command looked at.
pub const COMMAND_MAX: usize = 4096;
/// Most addresses of a table kept.
pub const TABLE_MAX: usize = 64;
/// Commands served in one go, at most.
const BUDGET: usize = 64;

const OK: u8 = 0;
const ERR: u8 = 1;

const RX: u8 = 0;
const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

/// Addresses a driver wants to receive.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Table {
    /// The addresses.
    pub addresses: Vec<[u8; 6]>,
    /// There were more than are kept.
    pub overflow: bool,
}

/// What a driver asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Receive everything.
    Promiscuous(bool),
    /// Receive all multicast.
    AllMulticast(bool),
    /// Receive these unicast and multicast addresses.
    Tables(Table, Table),
    /// This is the MAC from now on.
    Mac(MacAddress),
    /// The guest has announced itself.
    Announced,
    /// Use this many queue pairs.
    Pairs(u16),
    /// Use these receive offloads.
    Offloads(u64),
}

/// Decodes a command; `complete` says that `bytes` is all of it. `None`: unknown or malformed.
pub fn parse(bytes: &[u8], complete: bool) -> Option<Command> {
    let (head, data) = bytes.split_at_checked(2)?;
    let flag = || (complete && data.len() == 1).then(|| data[0] != 0);
    match (head[0], head[1]) {
        (RX, RX_PROMISC) => flag().map(Command::Promiscuous),
        (RX, RX_ALLMULTI) => flag().map(Command::AllMulticast),
        (MAC, MAC_TABLE_SET) => {
            let (unicast, rest) = table(data, complete)?;
            let (multicast, rest) = table(rest, complete)?;
            rest.is_empty().then_some(Command::Tables(unicast, multicast))
        }
        (MAC, MAC_ADDR_SET) if complete => {
            let mac = MacAddress(data.try_into().ok()?);
            (!mac.is_multicast() && mac != MacAddress::default()).then_some(Command::Mac(mac))
        }
        (ANNOUNCE, ANNOUNCE_ACK) => data.is_empty().then_some(Command::Announced),
        (MQ, MQ_PAIRS_SET) if complete => Some(Command::Pairs(u16::from_le_bytes(data.try_into().ok()?))),
        (GUEST_OFFLOADS, GUEST_OFFLOADS_SET) if complete => {
            Some(Command::Offloads(u64::from_le_bytes(data.try_into().ok()?)))
        }
        _ => None,
    }
}

/// One table off the front. When the command was cut short, what is missing counts as overflow.
fn table(data: &[u8], complete: bool) -> Option<(Table, &[u8])> {
    let cut = || (!complete).then_some((Table { addresses: Vec::new(), overflow: true }, &data[data.len()..]));
    let Some((count, rest)) = data.split_first_chunk::<4>() else { return cut() };
    let count = u32::from_le_bytes(*count) as usize;
    let Some((entries, rest)) = count.checked_mul(6).and_then(|n| rest.split_at_checked(n)) else { return cut() };
    let addresses = entries.chunks_exact(6).take(TABLE_MAX).filter_map(|c| c.try_into().ok()).collect();
    Some((Table { addresses, overflow: count > TABLE_MAX }, rest))
}

/// Takes the commands of a queue; `apply` says whether one was carried out (`None`: it is
/// none). True if there may be more.
pub fn serve(
    queue: &mut VirtQueue,
    memory: &Memory,
    mut apply: impl FnMut(Option<Command>) -> bool,
) -> Result<bool, QueueError> {
    let mut budget = BUDGET;
    loop {
        while let Some(chain) = queue.pop(memory)? {
            let head = chain.head;
            let written = answer(chain, memory, &mut apply)?;
            queue.push(memory, head, written)?;
            budget -= 1;
            if budget == 0 {
                return Ok(true);
            }
        }
        if !queue.arm(memory)? {
            return Ok(false);
        }
    }
}

fn answer(
    mut chain: Chain,
    memory: &Memory,
    apply: &mut impl FnMut(Option<Command>) -> bool,
) -> Result<u32, QueueError> {
    // Without room for the answer the driver could not learn what became of its command.
    if total(&chain.writable) == 0 {
        return Err(QueueError("control command without room for its answer".into()));
    }
    let len = total(&chain.readable);
    let mut bytes = vec![0; len.min(COMMAND_MAX as u64) as usize];
    if !read_front(memory, &mut chain.readable, &mut bytes) {
        return Err(QueueError("control command outside memory".into()));
    }
    let done = apply(parse(&bytes, len <= COMMAND_MAX as u64));
    if !write_at(memory, &chain.writable, 0, &[if done { OK } else { ERR }]) {
        return Err(QueueError("answer outside memory".into()));
    }
    Ok(1)
}

#[cfg(test)]
mod tests;
