//! The order of a guest's frames while they change from one tap to another.
//!
//! In a tree of bridges, frames for the guest go to the source's tap until the destination's announcement has passed the
//! bridge where the two ways part; what went to the source arrives there before the announcement does. So the source
//! forwards what comes before the announcement, then says SWITCHED, and the destination holds its own tap back until then.
//!
//! Owns both halves of that as values without I/O: [`Switch`] says what a frame in the source's tap is, [`Gate`] when a tap of
//! the destination is opened and which of its frames the source has forwarded already (broadcasts and floods reach both
//! taps). Always true: a device is opened once; frames are told apart by device and content, and each forwarded one stands
//! for one that is dropped. Survives an announcement that never comes: [`OPEN_MAX`] ends the waiting, and from then on frames
//! may come twice or out of order, as on any network.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::virtio::net::{HEADER_SIZE, is_announcement};

/// Longest time the destination's tap is held back after the announcement.
pub const OPEN_MAX: Duration = Duration::from_millis(3);
/// Longest time it is held back while forwarded frames keep coming.
const BUSY_MAX: Duration = Duration::from_millis(20);
/// Most forwarded frames remembered while a tap is held back; of what comes beyond, copies may be delivered.
const SEEN_MAX: usize = 4096;

/// What a frame in the source's tap is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Older than the switch, or for the guest alone: to be forwarded.
    Forward,
    /// The first announcement of the guest's MAC by somebody else: SWITCHED goes here.
    Announcement,
    /// Nothing for the destination: it has this frame from its own tap, or it is an announcement.
    Skip,
}

/// The source's half, for one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch {
    mac: [u8; 6],
    switched: bool,
}

impl Switch {
    /// Frames for the guest with this MAC still come here.
    pub fn new(mac: [u8; 6]) -> Switch {
        Switch { mac, switched: false }
    }

    /// Whether the announcement has come.
    pub fn switched(&self) -> bool {
        self.switched
    }

    /// Takes the next frame of the tap, with its virtio-net header.
    pub fn frame(&mut self, frame: &[u8]) -> Kind {
        if is_announcement(frame, self.mac) {
            return if std::mem::replace(&mut self.switched, true) { Kind::Skip } else { Kind::Announcement };
        }
        let to = frame.get(HEADER_SIZE..HEADER_SIZE + 6);
        // Broadcasts and floods reach the destination by itself from now on.
        if self.switched && to != Some(&self.mac) { Kind::Skip } else { Kind::Forward }
    }
}

/// How the waiting ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Opened {
    /// Devices opened because SWITCHED came.
    pub switched: u32,
    /// Devices opened because it did not come in time.
    pub late: u32,
    /// From the announcement until the last was opened.
    pub waited: Duration,
}

/// The destination's half, for all devices.
#[derive(Debug)]
pub struct Gate {
    since: Instant,
    held: Vec<bool>,
    seen: HashMap<(u32, u64), u32>,
    opened: Opened,
}

impl Gate {
    /// All devices held back, from the announcement at `since`; none if the source says no SWITCHED.
    pub fn new(devices: u32, since: Instant, ordered: bool) -> Gate {
        let held = if ordered { vec![true; devices as usize] } else { Vec::new() };
        Gate { since, held, seen: HashMap::new(), opened: Opened::default() }
    }

    /// Whether this device's tap is held back.
    pub fn holds(&self, device: u32) -> bool {
        self.held.get(device as usize).copied().unwrap_or(false)
    }

    /// The source has forwarded a frame of this device.
    pub fn forwarded(&mut self, device: u32, frame: &[u8]) {
        if self.holds(device) && self.seen.len() < SEEN_MAX {
            *self.seen.entry((device, content(frame))).or_default() += 1;
        }
    }

    /// SWITCHED came; whether the device is to be opened now.
    pub fn switch(&mut self, device: u32, now: Instant) -> bool {
        let opens = self.holds(device);
        if opens {
            self.open(device, now);
            self.opened.switched += 1;
        }
        opens
    }

    /// The devices to be opened because time is over, or because nothing more can come (`alone`). Call it when all that
    /// has come from the source has been dealt with (`quiet`): a thread that got no processor has not waited in vain.
    pub fn overdue(&mut self, now: Instant, alone: bool, quiet: bool) -> Vec<u32> {
        let limit = if quiet { OPEN_MAX } else { BUSY_MAX };
        if !alone && now.saturating_duration_since(self.since) < limit {
            return Vec::new();
        }
        let overdue: Vec<u32> = (0..self.held.len() as u32).filter(|d| self.holds(*d)).collect();
        for device in &overdue {
            self.open(*device, now);
            self.opened.late += 1;
        }
        overdue
    }

    /// Time until the waiting ends; `None` if nothing is held back.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        self.held.contains(&true).then(|| OPEN_MAX.saturating_sub(now.saturating_duration_since(self.since)))
    }

    /// Whether a frame found in a tap that is being opened is the guest's: the source has not forwarded it.
    pub fn is_new(&mut self, device: u32, frame: &[u8]) -> bool {
        let Some(count) = self.seen.get_mut(&(device, content(frame))) else { return true };
        let known = *count > 0;
        *count = count.saturating_sub(1);
        !known
    }

    /// How it ended, once all are open.
    pub fn result(&self) -> Option<Opened> {
        (!self.held.is_empty() && !self.held.contains(&true)).then_some(self.opened)
    }

    fn open(&mut self, device: u32, now: Instant) {
        if let Some(held) = self.held.get_mut(device as usize) {
            *held = false;
        }
        self.opened.waited = now.saturating_duration_since(self.since);
    }
}

/// What a frame is told by: not its virtio-net header, which the two hosts may have filled in differently.
fn content(frame: &[u8]) -> u64 {
    let mut digest = migration::wire::Digest::default();
    digest.update(frame.get(HEADER_SIZE..).unwrap_or_default());
    digest.finish()
}

#[cfg(test)]
mod tests;
