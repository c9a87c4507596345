//! The gate between the devices and a parked vCPU.
//!
//! Owns the flags that decide whether the vCPU may sleep. Always true: whatever is signalled or kicked before, while or
//! after the vCPU decides to sleep is seen by it before it sleeps or wakes it. Signalling a vCPU that is not asleep is one
//! atomic operation and no system call.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::{Result, host};

/// A device has put something in a used ring since the guest last looked.
const SIGNALLED: u32 = 1;
/// The vCPU thread is about to sleep, or sleeps, on the wake descriptor.
const ASLEEP: u32 = 2;
/// Somebody wants the vCPU thread out of the guest (pause, end).
const KICKED: u32 = 4;

/// See the module.
#[derive(Debug)]
pub struct Gate {
    state: AtomicU32,
    wake: EventFd,
    at_rest: AtomicBool,
}

impl Gate {
    /// An open gate with nothing signalled.
    pub fn new() -> Result<Gate> {
        let wake = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
        Ok(Gate { state: AtomicU32::new(0), wake, at_rest: AtomicBool::new(false) })
    }

    /// A device has something for the guest.
    pub fn signal(&self) {
        let old = self.state.fetch_or(SIGNALLED, Ordering::AcqRel);
        if old & (SIGNALLED | ASLEEP) == ASLEEP {
            self.wake_up();
        }
    }

    /// Demands that the vCPU thread leave the guest; holds until [`Gate::clear_kick`].
    pub fn kick(&self) {
        if self.state.fetch_or(KICKED, Ordering::AcqRel) & ASLEEP != 0 {
            self.wake_up();
        }
    }

    /// Ends a kick.
    pub fn clear_kick(&self) {
        self.state.fetch_and(!KICKED, Ordering::AcqRel);
    }

    /// Whether a kick stands.
    pub fn kicked(&self) -> bool {
        self.state.load(Ordering::Acquire) & KICKED != 0
    }

    /// The vCPU thread wants to sleep: true if it may. It must call [`Gate::awake`] afterwards.
    #[must_use]
    pub fn may_sleep(&self) -> bool {
        let old = self.state.fetch_or(ASLEEP, Ordering::AcqRel);
        if old & (SIGNALLED | KICKED) == 0 {
            return true;
        }
        self.awake();
        false
    }

    /// The vCPU thread sleeps no more.
    pub fn awake(&self) {
        self.state.fetch_and(!ASLEEP, Ordering::AcqRel);
    }

    /// Whether the vCPU thread sleeps, or is about to.
    pub fn is_asleep(&self) -> bool {
        self.state.load(Ordering::Acquire) & ASLEEP != 0
    }

    /// Whether the guest has something to look at, or the vCPU must leave it.
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) & (SIGNALLED | KICKED) != 0
    }

    /// The guest goes on and looks at its rings: forgets what was signalled so far.
    pub fn pass(&self) {
        self.state.fetch_and(!SIGNALLED, Ordering::AcqRel);
    }

    /// The vCPU thread leaves the guest for a kick; `at_rest`: straight from a park, no instruction after it.
    pub fn set_at_rest(&self, at_rest: bool) {
        self.at_rest.store(at_rest, Ordering::Release);
    }

    /// While the vCPU is stopped: whether the guest stands at the end of a park.
    pub fn is_at_rest(&self) -> bool {
        self.at_rest.load(Ordering::Acquire)
    }

    /// Empties the wake descriptor.
    pub fn drain(&self) {
        let _ = self.wake.read();
    }

    fn wake_up(&self) {
        // Fails only when the counter is full, and then the descriptor is readable as it should be.
        let _ = self.wake.write(1);
    }
}

impl AsRawFd for Gate {
    /// The wake descriptor: readable when the sleeper must wake.
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
