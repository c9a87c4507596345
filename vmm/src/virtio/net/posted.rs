//! The receive buffers the guest has posted: what is in them nobody needs.

use super::Net;
use crate::memory::GuestRange;
use crate::virtio::Work;

/// Pieces told of, at most: four for each buffer of a queue of the usual size. What is beyond counts as memory like any other.
const POSTED_MAX: usize = 1024;

impl Net {
    /// Those in the rings, and those taken from there for the next frame. None while the kernel works the rings: it may be writing
    /// to any of them.
    pub(super) fn posted_buffers(&self, work: &mut Work<'_>, out: &mut Vec<GuestRange>) {
        if self.kernel.as_ref().is_some_and(|kernel| kernel.running() > 0) {
            return;
        }
        let memory = work.memory;
        for (pair, queue) in self.pairs.iter().take(self.active).zip(work.queues.iter_mut().step_by(2)) {
            let max = out.len() + POSTED_MAX;
            pair.receiver.collected(out);
            queue.posted(memory, max, out);
        }
    }
}
