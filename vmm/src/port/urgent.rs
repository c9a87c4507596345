//! The few hundred microseconds that clients notice.
//!
//! While the guest stands still, the threads that get it running again come before everything else on their processor:
//! without that a host with work to do lets them wait for a time slice, which is longer than the whole blackout.
//! Bounded: a thread is urgent only while an [`Urgent`] lives, and nobody polls for longer than a few milliseconds meanwhile.
//! Always true: a thread of the port comes before the vCPUs' ([`Rank`]), so that it can always end their urgency. A guest may
//! compute as long as it likes, for one, while a vCPU waits for another that shares its processor: among equals that would be for ever.

use std::io;

/// Which urgent thread comes first. The lowest of the real-time priorities: above all ordinary threads, below whatever the host
/// runs as real-time itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// A vCPU's thread: it is stopped, on its way into the guest or out of it, or in a lull.
    Vcpu = 1,
    /// A thread that ports, which waits or polls for a bounded time.
    Port = 2,
}

/// The highest of them, for the limit of a confined process.
pub const RANK_MAX: Rank = Rank::Port;

/// While it lives, a thread is urgent.
#[derive(Debug)]
pub struct Urgent {
    thread: libc::pid_t,
}

impl Urgent {
    /// Makes the calling thread, one of the port's, urgent. `None` where the host does not allow it.
    pub fn port() -> Option<Urgent> {
        Urgent::begin(0, Rank::Port)
    }

    /// Makes a vCPU's thread of this process urgent. It must be stopped, have been told to stop, or be let go of after some
    /// milliseconds.
    pub fn vcpu(thread: libc::pid_t) -> Option<Urgent> {
        Urgent::begin(thread, Rank::Vcpu)
    }

    fn begin(thread: libc::pid_t, rank: Rank) -> Option<Urgent> {
        set(thread, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, rank as libc::c_int)
            .map_err(|e| log::debug!("real-time priority: {e}"))
            .ok()
            .map(|()| Urgent { thread })
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // The flag stays: taking it off needs a capability, which a confined thread does not have.
        if let Err(e) = set(self.thread, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, 0) {
            log::debug!("ordinary priority: {e}");
        }
    }
}

fn set(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is valid for the call.
    let rc = unsafe { libc::sched_setscheduler(thread, policy, &param) };
    if rc != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
