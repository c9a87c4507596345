//! What the command line says, and how the memory is divided.
use alloc::string::{String, ToString};
use dserver::{FormatPolicy, OwnersPolicy};
use guest_rt::Cmdline;
use guest_rt::net::{self, Buffers};

/// Default of `port=`.
const PORT: u16 = 7100;
/// Default of `volume=`.
const VOLUME: &str = "vol0";
/// Least memory.
const MEMORY_MIN: u64 = 48 << 20;
/// Image, stacks, network buffers, the heap's own loss.
const RESERVE: u64 = 20 << 20;
/// Bytes a cached block takes with its bookkeeping.
const BLOCK_COST: u64 = 4096 + 160;

/// Smallest and largest buffers of a connection: the first ones get large ones, as long as there is room for them.
pub const BUFFER_MIN: usize = 16 << 10;
pub const BUFFER_MAX: usize = 1 << 20;
/// Bytes a connection takes at least: its buffers, and a session with the replies it remembers.
const CONNECTION_COST: u64 = 2 * BUFFER_MIN as u64 + (64 << 10);
/// Fewest and most connections at a time, by the size of the memory.
const CONNECTIONS_MIN: u64 = 24;
const CONNECTIONS_MAX: u64 = fabric::owner::VMS_MAX as u64;
/// Fewest bytes of frames that have begun and are not complete.
const FRAME_BYTES_MIN: u64 = 4 << 20;
const _: () = assert!(FRAME_BYTES_MIN > 2 * fabric::wire::MAX_FRAME as u64);

/// A command line that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    Net(#[from] net::ConfigError),
    #[error("gw={0:?} is not an address")]
    Gateway(String),
    #[error("port={0:?} is not a port")]
    Port(String),
    #[error("volume= must have 1 to {max} bytes", max = layout::VOLUME_NAME_MAX)]
    Volume,
    #[error("format={0:?}: it is if-blank or never")]
    Format(String),
    #[error("owners={0:?}: it is keep or forget")]
    Owners(String),
    #[error("{0} MiB of memory; the D-module needs {min} MiB", min = MEMORY_MIN >> 20)]
    Memory(u64),
}

/// The command line.
pub struct Config {
    pub net: net::Config,
    pub port: u16,
    pub volume: String,
    pub format: FormatPolicy,
    pub owners: OwnersPolicy,
    pub memory: Memory,
}

/// Who gets how much memory.
pub struct Memory {
    pub cache_blocks: usize,
    pub dirty_blocks: usize,
    pub held_bytes: usize,
    /// Of the first connections.
    pub buffers: Buffers,
    /// Buffers of all connections may have as much, beyond the smallest.
    pub buffer_bytes: usize,
    /// Frames that are not complete may have as much, of all connections.
    pub frame_bytes: usize,
    pub connections: usize,
    /// More than connections: a session outlives its connection while something executes.
    pub sessions: usize,
}

impl Config {
    pub fn parse(cmdline: &Cmdline, memory_size: u64) -> Result<Config, ConfigError> {
        let mut net = net::Config::from_cmdline(cmdline, 0, memory_size)?;
        if let Some(gateway) = cmdline.get("gw") {
            net.gateway = Some(gateway.parse().map_err(|_| ConfigError::Gateway(gateway.into()))?);
        }
        let port = match cmdline.get("port") {
            None => PORT,
            Some(text) => text.parse().ok().filter(|port| *port != 0).ok_or_else(|| ConfigError::Port(text.into()))?,
        };
        let volume = cmdline.get("volume").unwrap_or(VOLUME).to_string();
        if volume.is_empty() || volume.len() > layout::VOLUME_NAME_MAX {
            return Err(ConfigError::Volume);
        }
        let format = match cmdline.get("format") {
            None | Some("never") => FormatPolicy::Never,
            Some("if-blank") => FormatPolicy::IfBlank,
            Some(other) => return Err(ConfigError::Format(other.into())),
        };
        let owners = match cmdline.get("owners") {
            None | Some("keep") => OwnersPolicy::Keep,
            Some("forget") => OwnersPolicy::Forget,
            Some(other) => return Err(ConfigError::Owners(other.into())),
        };
        Ok(Config { net, port, volume, format, owners, memory: Memory::divide(memory_size)? })
    }
}

impl Memory {
    fn divide(size: u64) -> Result<Memory, ConfigError> {
        if size < MEMORY_MIN {
            return Err(ConfigError::Memory(size >> 20));
        }
        // Dirty and being written: a quarter in all. Requests and replies: an eighth in all.
        let dirty = (size / 8 / BLOCK_COST).min(8192);
        let held = (size / 16).clamp(dserver::HELD_BYTES_MIN as u64, 32 << 20);
        let rest = size.saturating_sub(RESERVE + 2 * dirty * BLOCK_COST + 2 * held);
        // A quarter stays free for connections and for what is not counted here.
        let cache = rest / 4 * 3 / BLOCK_COST;
        let buffer_bytes = (size / 32) as usize;
        let buffer = buffer_size(buffer_bytes);
        let connections = (size / 16 / CONNECTION_COST).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX) as usize;
        Ok(Memory {
            cache_blocks: cache.max(2 * dirty) as usize,
            dirty_blocks: dirty as usize,
            held_bytes: held as usize,
            buffers: Buffers { rx: buffer, tx: buffer },
            buffer_bytes,
            frame_bytes: (size / 32).max(FRAME_BYTES_MIN) as usize,
            connections,
            sessions: connections + connections / 4,
        })
    }
}

/// Size of a connection's buffers, each way, when there is so much left for all that are to come.
pub fn buffer_size(left: usize) -> usize {
    (left / 8).clamp(BUFFER_MIN, BUFFER_MAX)
}
