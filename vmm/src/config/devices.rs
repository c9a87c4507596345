//! The devices of which a VM has at most one: entropy source, balloon.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MemorySize;

/// Id of the entropy source.
pub const RNG_ID: &str = "rng0";
/// Id of the balloon.
pub const BALLOON_ID: &str = "balloon0";
/// Most seconds between two statistics.
const STATS_SECONDS_MAX: u32 = 86_400;

/// A virtio-rng device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {}

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
