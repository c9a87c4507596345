//! What an operator may see of a device and its transport.

use schemars::JsonSchema;
use serde::Serialize;

use super::{Transport, status};

/// Where a device is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DriverState {
    /// No driver has taken it.
    Idle,
    /// A driver uses it.
    Active,
    /// The driver has broken a rule; nothing is served until it resets the device.
    NeedsReset,
    /// The driver has given it up.
    Failed,
}

/// A queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct QueueReport {
    /// Entries.
    pub size: u16,
    /// Set up by the driver.
    pub ready: bool,
    /// Chains that wait for the device.
    pub depth: u16,
}

/// What every device has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct TransportReport {
    /// Id.
    pub id: String,
    /// Kind: `network`, `block`, `entropy`, `balloon`, `vsock`, or `virtio-` and the type's number.
    pub kind: String,
    /// Where it is in its life.
    pub driver: DriverState,
    /// Features the driver has accepted, in hexadecimal.
    pub features: String,
    /// Queues.
    pub queues: Vec<QueueReport>,
}

fn kind(number: u32) -> String {
    match number {
        1 => "network".into(),
        2 => "block".into(),
        4 => "entropy".into(),
        5 => "balloon".into(),
        19 => "vsock".into(),
        n => format!("virtio-{n}"),
    }
}

impl Transport {
    /// The device as an operator may see it.
    pub fn report(&self) -> TransportReport {
        let driver = match self.status {
            s if s & status::FAILED != 0 => DriverState::Failed,
            s if s & status::NEEDS_RESET != 0 => DriverState::NeedsReset,
            _ if self.is_active() => DriverState::Active,
            _ => DriverState::Idle,
        };
        let queue =
            |q: &super::VirtQueue| QueueReport { size: q.size(), ready: q.ready(), depth: q.depth(&self.memory) };
        TransportReport {
            id: self.device.id().to_owned(),
            kind: kind(self.device.kind()),
            driver,
            features: format!("{:#x}", self.driver_features),
            queues: self.queues.iter().map(queue).collect(),
        }
    }
}
