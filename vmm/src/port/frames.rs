//! Network frames that reach the source although the VM is leaving, on their way to the destination.
//!
//! Owns the copies of forwarded frames until it is decided who runs: if it is the source after all, they are its guest's.
//! Always true: frames are forwarded in the order they came, with SWITCHED between those before and after the
//! destination's announcement; while undecided at most [`KEPT_MAX`] are taken from the taps, the rest waits there.

use migration::message::{Frames, Message, NET_FRAME_MAX, NET_FRAMES_MAX};
use migration::wire::{FRAMES_MAX, FrameType};

use super::connection::{Connection, ConnectionError};
use super::guest;
use super::order::{Kind, Switch};
use crate::vm::Vm;

/// Most frames kept while it is not decided who runs: as many as a device takes back.
pub const KEPT_MAX: usize = crate::virtio::net::PENDING_MAX;
/// Most frames taken at once.
const BATCH: usize = 64;

/// A frame with its virtio-net header, and the network device it came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetFrame {
    /// Index of the device.
    pub device: u32,
    /// Header and frame.
    pub bytes: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Forwarder {
    kept: Vec<NetFrame>,
    forwarded: u64,
    stragglers: u64,
    /// One for each device.
    switches: Vec<Switch>,
    /// The destination understands SWITCHED.
    pub ordered: bool,
}

impl Default for Forwarder {
    fn default() -> Self {
        Forwarder::new(&[])
    }
}

impl Forwarder {
    /// Nothing forwarded yet; the guest has these MACs.
    pub fn new(macs: &[[u8; 6]]) -> Forwarder {
        let switches = macs.iter().copied().map(Switch::new).collect();
        Forwarder { kept: Vec::new(), forwarded: 0, stragglers: 0, switches, ordered: false }
    }

    /// Frames forwarded so far.
    pub fn forwarded(&self) -> u64 {
        self.forwarded
    }

    /// Frames forwarded so far that came after the announcement.
    pub fn stragglers(&self) -> u64 {
        self.stragglers
    }

    /// Whether there is room for more.
    pub fn wants_frames(&self) -> bool {
        self.kept.len() < KEPT_MAX
    }

    /// The frames forwarded while undecided: the guest's, if it goes on here.
    pub fn take_kept(&mut self) -> Vec<NetFrame> {
        std::mem::take(&mut self.kept)
    }

    /// Takes what is in the taps and sends it; keeps copies if `keep`. Without a connection it only keeps.
    pub fn turn(
        &mut self,
        vm: &Vm,
        mut connection: Option<&mut Connection>,
        keep: bool,
    ) -> Result<(), ConnectionError> {
        if !keep {
            self.kept.clear();
        }
        if connection.is_none() && !keep {
            return Ok(());
        }
        for device in 0..guest::nets(vm) {
            let room = if keep { KEPT_MAX.saturating_sub(self.kept.len()) } else { BATCH };
            let frames = guest::take_frames(vm, device, room.min(BATCH));
            let sent = self.forward(device, &frames, connection.as_deref_mut());
            if keep {
                self.kept.extend(frames.into_iter().map(|bytes| NetFrame { device, bytes }));
            }
            sent?;
        }
        Ok(())
    }

    /// Sends what of these frames is the destination's.
    fn forward(
        &mut self,
        device: u32,
        frames: &[Vec<u8>],
        mut connection: Option<&mut Connection>,
    ) -> Result<(), ConnectionError> {
        let Some(switch) = self.switches.get_mut(device as usize).filter(|_| self.ordered) else {
            self.forwarded += frames.len() as u64;
            return send_all(connection, device, &frames.iter().map(|f| &f[..]).collect::<Vec<_>>());
        };
        let mut batch: Vec<&[u8]> = Vec::new();
        for frame in frames {
            match switch.frame(frame) {
                Kind::Forward => {
                    self.forwarded += 1;
                    self.stragglers += u64::from(switch.switched());
                    batch.push(frame);
                }
                Kind::Skip => {}
                Kind::Announcement => {
                    send_all(connection.as_deref_mut(), device, &batch)?;
                    batch.clear();
                    if let Some(connection) = connection.as_deref_mut() {
                        connection.send(&Message::Switched { device })?;
                    }
                }
            }
        }
        send_all(connection, device, &batch)
    }
}

fn send_all(connection: Option<&mut Connection>, device: u32, frames: &[&[u8]]) -> Result<(), ConnectionError> {
    let Some(connection) = connection else { return Ok(()) };
    let mut rest = frames;
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(fitting(rest));
        send(connection, device, batch)?;
        rest = later;
    }
    Ok(())
}

/// How many of the first frames fit in one FRAMES frame: at least one, a single frame always does.
fn fitting(frames: &[&[u8]]) -> usize {
    const _: () = assert!(NET_FRAME_MAX + 16 <= FRAMES_MAX);
    let mut bytes = 8;
    let fit = frames.iter().take(NET_FRAMES_MAX).take_while(|f| {
        bytes += 4 + f.len();
        bytes <= FRAMES_MAX
    });
    fit.count().max(1)
}

fn send(connection: &mut Connection, device: u32, batch: &[&[u8]]) -> Result<(), ConnectionError> {
    let mut payload = Vec::new();
    Frames { device, frames: batch.to_vec() }.encode(&mut payload);
    let header = connection.seal(FrameType::Frames, &[&payload]);
    connection.write(&[&header, &payload], &|| false)
}
