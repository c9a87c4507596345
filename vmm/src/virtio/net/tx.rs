//! From the guest's transmit queue to the tap.
//!
//! The kernel takes a frame where it lies in guest memory, with its header: checksums and segments are for the other side to
//! fill in and cut. Always true: every chain taken is given back, whether its frame was sent or not.

use super::tap::Tap;
use super::{BUDGET, BUDGET_BYTES, FRAME_MAX, HEADER_SIZE, NetStats};
use crate::limit::Throttle;
use crate::memory::{IoVec, Memory};
use crate::virtio::Progress;
use crate::virtio::queue::{QueueError, VirtQueue, total};

/// The sending half of a queue pair.
#[derive(Debug, Default)]
pub(super) struct Sender {
    /// For the pieces of one frame.
    scratch: Vec<IoVec>,
    sent: bool,
}

/// How far sending came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// All there was, or as much as is served in one go.
    Until(Progress),
    /// The interface has vanished.
    Gone,
}

impl Sender {
    /// Whether the last call of [`Sender::send`] has sent a frame.
    pub fn has_sent(&self) -> bool {
        self.sent
    }

    /// Sends what there is.
    pub fn send(
        &mut self,
        tap: &Tap,
        queue: &mut VirtQueue,
        memory: &Memory,
        limit: &mut Throttle,
        stats: &NetStats,
    ) -> Result<Sent, QueueError> {
        let (mut frames, mut bytes) = (BUDGET, BUDGET_BYTES);
        let mut gone = false;
        self.sent = false;
        loop {
            while let Some(chain) = queue.pop(memory)? {
                let len = total(&chain.readable);
                if !limit.admit(len) {
                    // The timer brings us back.
                    queue.unpop(1);
                    return Ok(if gone { Sent::Gone } else { Sent::Until(Progress::Done) });
                }
                self.scratch.clear();
                self.scratch.extend(chain.readable.iter().filter(|r| !r.is_empty()).map(|r| memory.iovec(*r)));
                // A frame that is too short or long is the guest's mistake: given back, not sent.
                let result = match usize::try_from(len) {
                    Ok(HEADER_SIZE..=FRAME_MAX) => tap.write(&self.scratch),
                    _ => Err(std::io::Error::from_raw_os_error(libc::EINVAL)),
                };
                match result {
                    Ok(()) => {
                        self.sent = true;
                        stats.tx_frames.inc();
                        stats.tx_bytes.add(len - HEADER_SIZE as u64);
                    }
                    Err(e) => {
                        stats.tx_errors.inc();
                        gone |= super::tap::is_gone(&e);
                        log::debug!("{}: frame of {len} bytes not sent: {e}", tap.name());
                    }
                }
                queue.push(memory, chain.head, 0)?;
                frames -= 1;
                bytes = bytes.saturating_sub(len);
                if frames == 0 || bytes == 0 {
                    return Ok(if gone { Sent::Gone } else { Sent::Until(Progress::More) });
                }
            }
            if !queue.arm(memory)? {
                return Ok(if gone { Sent::Gone } else { Sent::Until(Progress::Done) });
            }
        }
    }

    /// Gives all chains back unsent.
    pub fn discard(queue: &mut VirtQueue, memory: &Memory, stats: &NetStats) -> Result<Progress, QueueError> {
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(if queue.arm(memory)? { Progress::More } else { Progress::Done });
            };
            stats.tx_errors.inc();
            queue.push(memory, chain.head, 0)?;
        }
        Ok(Progress::More)
    }
}
