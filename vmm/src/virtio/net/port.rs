//! What a port needs of a network device: frames put in and taken out past the guest's queues, and its announcement.

use std::os::fd::{AsRawFd, RawFd};

use super::{FRAME_MAX, Frame, HEADER_SIZE, Net, PENDING_MAX};
use crate::config::MacAddress;
use crate::error::{Error, Result};

impl Net {
    /// MAC of the guest's side.
    pub fn mac(&self) -> MacAddress {
        self.mac
    }

    /// Delivers frames (each with its header) to the guest before anything from the tap, in order. Fails, with nothing
    /// taken, when more than [`PENDING_MAX`] would wait or a frame is longer than [`FRAME_MAX`].
    pub fn inject_frames(&mut self, frames: Vec<Frame>) -> Result<()> {
        if frames.len() > self.room() {
            return Err(Error::Conflict(format!("{}: more than {PENDING_MAX} frames wait", self.id)));
        }
        if frames.iter().any(|f| f.len() < HEADER_SIZE || f.len() > FRAME_MAX) {
            return Err(Error::State(format!("{}: a frame of a length that cannot be", self.id)));
        }
        self.stats.injected.add(frames.len() as u64);
        self.put_first(frames);
        Ok(())
    }

    /// Lets the guest have these before anything from any queue of the tap.
    pub(super) fn put_first(&mut self, frames: Vec<Frame>) {
        if let Some(first) = self.pairs.first_mut() {
            first.receiver.pending.extend(frames);
            first.receiver.injected = first.receiver.pending.len();
        }
    }

    /// Takes up to `max` frames (each with its header) that wait in the tap, while the device takes none itself.
    ///
    /// Of a tap with several queues each is in order by itself. So that an announcement still parts what came before it
    /// from what came after, it is taken only when all other queues have been found empty.
    pub fn take_frames(&mut self, max: usize) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        if self.gone {
            return Ok(frames);
        }
        let queues = self.pairs.iter().take_while(|p| p.tap.is_attached()).count();
        let mut queue = 0;
        let mut empty = 0;
        while frames.len() < max && empty < queues {
            if self.parting.as_ref().is_some_and(|(of, _)| *of == queue) {
                if empty + 1 == queues {
                    frames.extend(self.parting.take().map(|(_, frame)| frame));
                } else {
                    queue = (queue + 1) % queues;
                    empty += 1;
                }
                continue;
            }
            match self.pairs[queue].tap.read_frame(FRAME_MAX, &mut self.aside) {
                Ok(Some(frame))
                    if queues > 1 && super::is_announcement(&frame, self.mac.0) && self.parting.is_none() =>
                {
                    self.parting = Some((queue, frame));
                    empty = 0;
                }
                Ok(Some(frame)) => {
                    frames.push(frame);
                    empty = 0;
                }
                Ok(None) => {
                    queue = (queue + 1) % queues;
                    empty += 1;
                }
                Err(e) if super::tap::is_gone(&e) => {
                    self.lose();
                    break;
                }
                Err(e) => return Err(Error::Host { what: format!("{}: read tap", self.id), source: e }),
            }
        }
        Ok(frames)
    }

    /// The descriptors of the tap's queues, readable when a frame waits.
    pub fn tap_fds(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.pairs.iter().filter(|p| p.tap.is_attached()).map(|p| p.tap.as_raw_fd())
    }

    /// While `held`, the guest gets injected frames only; those in the tap wait there.
    pub fn hold_tap(&mut self, held: bool) {
        for pair in &mut self.pairs {
            pair.receiver.held = held;
            pair.receiver.tap_may_have_frames();
        }
    }

    /// How many frames [`Net::inject_frames`] takes at present.
    pub fn room(&self) -> usize {
        self.pairs.first().map_or(0, |p| PENDING_MAX.saturating_sub(p.receiver.pending.len()))
    }

    /// Whether it takes frames from the network: not from when the VM is told to stop until it goes on.
    pub fn takes_input(&self) -> bool {
        self.pairs.iter().all(|pair| !pair.receiver.stopped)
    }

    /// Tells the network where the guest's MAC is now: sends a RARP request from it (broadcast), as QEMU and Linux do.
    pub fn announce(&self) -> Result<()> {
        let Some(pair) = self.pairs.first() else { return Ok(()) };
        pair.tap
            .write_frame(&announcement(self.mac.0))
            .map_err(|e| Error::Host { what: format!("{}: announce {}", self.id, self.mac), source: e })
    }
}

/// A RARP request of this MAC, with its virtio-net header.
pub(super) fn announcement(mac: [u8; 6]) -> [u8; HEADER_SIZE + 60] {
    let mut frame = [0u8; HEADER_SIZE + 60];
    let f = &mut frame[HEADER_SIZE..];
    f[..6].fill(0xff);
    f[6..12].copy_from_slice(&mac);
    f[12..14].copy_from_slice(&[0x80, 0x35]); // RARP
    f[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]); // Ethernet, IPv4, request reverse
    f[22..28].copy_from_slice(&mac);
    f[32..38].copy_from_slice(&mac);
    frame
}

/// Whether a frame, with its virtio-net header, is what [`Net::announce`] sends for this MAC.
pub fn is_announcement(frame: &[u8], mac: [u8; 6]) -> bool {
    // Up to the end of the RARP packet: what pads it may change on the way.
    const END: usize = HEADER_SIZE + 42;
    frame.get(HEADER_SIZE..END) == announcement(mac).get(HEADER_SIZE..END)
}
