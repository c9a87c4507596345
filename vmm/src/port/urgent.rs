//! The few hundred microseconds that clients notice.
//!
//! While the guest stands still, the threads that get it running again come before everything else on their processor:
//! without that a host with work to do lets them wait for a time slice, which is longer than the whole blackout.
//! Bounded: a thread is urgent only while an [`Urgent`] lives, and nobody polls for longer than a few milliseconds meanwhile.

use std::io;

/// Lowest of the real-time priorities: above all ordinary threads, below whatever the host runs as real-time itself.
const PRIORITY: libc::c_int = 1;

/// While it lives, a thread is urgent.
#[derive(Debug)]
pub struct Urgent {
    thread: libc::pid_t,
}

impl Urgent {
    /// Makes a thread of this process urgent; 0 is the calling one. `None` where the host does not allow it.
    pub fn begin(thread: libc::pid_t) -> Option<Urgent> {
        set(thread, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, PRIORITY)
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
