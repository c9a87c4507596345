//! The devices of which a VM has at most one: entropy source, balloon, vsock.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MemorySize;
use crate::limit::Limits;

/// Id of the entropy source.
pub const RNG_ID: &str = "rng0";
/// Id of the balloon.
pub const BALLOON_ID: &str = "balloon0";
/// Most seconds between two statistics.
const STATS_SECONDS_MAX: u32 = 86_400;

/// A virtio-rng device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Requests and bytes a second.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

/// A virtio-balloon device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Bytes that are to be in the balloon from the start.
    pub target: MemorySize,
    /// The guest may take pages out when it would otherwise have to kill a program.
    pub deflate_on_oom: bool,
    /// The guest reports the memory it does not use.
    pub reporting: bool,
    /// Seconds between two statistics from the guest; 0: only when asked.
    pub stats_seconds: u32,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        BalloonConfig { target: MemorySize::from_bytes(0), deflate_on_oom: true, reporting: true, stats_seconds: 0 }
    }
}

impl BalloonConfig {
    /// Checks the fields of a VM with so much memory.
    pub(super) fn validate(&self, memory: MemorySize, bad: &mut impl FnMut(String, String)) {
        if self.target.bytes() >= memory.bytes() {
            bad("balloon.target".into(), format!("{} bytes: must be less than the memory", self.target.bytes()));
        }
        if self.stats_seconds > STATS_SECONDS_MAX {
            bad("balloon.stats_seconds".into(), format!("at most {STATS_SECONDS_MAX}"));
        }
    }
}

/// Id of the vsock device.
pub const VSOCK_ID: &str = "vsock0";
/// Longest path of a unix socket (`sun_path` less its NUL).
const SOCKET_PATH_MAX: usize = 107;
/// Longest that is put behind the path for a guest's connection: `_` and a port.
const PORT_SUFFIX: usize = 11;

/// A virtio-vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest.
    #[serde(default = "VsockConfig::default_cid")]
    pub cid: u32,
    /// Unix socket at which the host's programs connect to the guest's ports; the guest's connections to port N of the
    /// host go to this path with `_N` behind it.
    pub path: PathBuf,
}

impl VsockConfig {
    /// The context ids a guest may have: 0 to 2 have a meaning of their own, the last one as well.
    pub const CIDS: std::ops::Range<u32> = 3..u32::MAX;

    /// The first that is free.
    pub const fn default_cid() -> u32 {
        Self::CIDS.start
    }

    /// Checks the fields.
    pub(super) fn validate(&self, bad: &mut impl FnMut(String, String)) {
        let cids = Self::CIDS;
        if !cids.contains(&self.cid) {
            bad("vsock.cid".into(), format!("{}: must be from {} to {}", self.cid, cids.start, cids.end - 1));
        }
        check_socket_path("vsock.path", &self.path, PORT_SUFFIX, bad);
    }
}

/// A path a unix socket can have, with `room` bytes more behind it, in a directory that is there.
pub(super) fn check_socket_path(
    field: &str,
    path: &std::path::Path,
    room: usize,
    bad: &mut impl FnMut(String, String),
) {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.contains(&0) || path.file_name().is_none() {
        bad(field.into(), format!("{path:?} is not the path of a socket"));
    } else if bytes.len() + room > SOCKET_PATH_MAX {
        bad(field.into(), format!("{} bytes: at most {}", bytes.len(), SOCKET_PATH_MAX - room));
    } else if let Some(dir) = path.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        bad(field.into(), format!("{}: no such directory", dir.display()));
    }
}
