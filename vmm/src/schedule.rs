//! How the host's scheduler treats our threads.
//!
//! Always: threads that serve a guest (vCPUs, I/O, disks) ask for a short slice ([`prompt`]). They wake often and for little, and clients wait
//! for it; with the usual slice they would wait for a whole one of each other thread of a busy host.
//!
//! For the few hundred microseconds of a pause that clients notice ([`Urgent`]) the threads that get the guest running again come before
//! everything else on their processor: without that a host with work to do lets them wait for longer than the whole blackout.
//! Bounded: a thread is urgent only while an [`Urgent`] lives, and nobody polls for longer than a few milliseconds meanwhile.
//! Always true: a thread of the port comes before the vCPUs' ([`Rank`]), so that it can always end their urgency. A guest may
//! compute as long as it likes, for one, while a vCPU waits for another that shares its processor: among equals that would be for ever.
//!
//! Survives: a host that allows neither. Then it is slower.

use std::io;
use std::time::Duration;

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

/// What [`prompt`] asks for. The kernel's own choice is 0.7 ms and, with more processors, a multiple; it gives no less than 0.1 ms.
const SLICE: Duration = Duration::from_micros(300);

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
        set_policy(thread, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, rank as libc::c_int)
            .map_err(|e| log::debug!("real-time priority: {e}"))
            .ok()
            .map(|()| Urgent { thread })
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // The flag stays: taking it off needs a capability, which a confined thread does not have. Niceness and slice are kept by the kernel.
        if let Err(e) = set_policy(self.thread, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, 0) {
            log::debug!("ordinary priority: {e}");
        }
    }
}

fn set_policy(thread: libc::pid_t, policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is valid for the call.
    let rc = unsafe { libc::sched_setscheduler(thread, policy, &param) };
    if rc != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks for a short slice for the calling thread: it is let run sooner, and not more. Linux 6.12 or newer (EEVDF; sched(7), `sched_runtime`); an
/// older one takes no notice. To be called before the thread is confined as one that faces the guest.
pub fn prompt() {
    let slice = SLICE.as_nanos() as u64;
    if let Err(e) = attributes().and_then(|now| set_attributes(&libc::sched_attr { sched_runtime: slice, ..now })) {
        log::debug!("a short slice: {e}");
    }
}

/// Those of the calling thread.
fn attributes() -> io::Result<libc::sched_attr> {
    let mut attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel writes at most the size that is given.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, attributes.size, 0) };
    if rc != 0 { Err(io::Error::last_os_error()) } else { Ok(attributes) }
}

fn set_attributes(attributes: &libc::sched_attr) -> io::Result<()> {
    // SAFETY: the attributes are valid for the call, and say how long they are.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attributes, 0) };
    if rc != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_thread_is_so_again_when_it_is_no_longer_urgent() {
        std::thread::spawn(|| {
            prompt();
            let before = attributes().unwrap();
            let urgent = Urgent::port().expect("root may be urgent");
            // Twice, as where a port begins in what is urgent already: the first end is the end, and none brings it back.
            let again = Urgent::port().expect("root may be urgent");
            let meanwhile = attributes().unwrap();
            assert_eq!(
                (meanwhile.sched_policy, meanwhile.sched_priority),
                (libc::SCHED_FIFO as u32, Rank::Port as u32)
            );
            drop(urgent);
            drop(again);
            let after = attributes().unwrap();
            assert_eq!(after.sched_policy, libc::SCHED_OTHER as u32);
            assert_eq!((after.sched_nice, after.sched_runtime), (before.sched_nice, before.sched_runtime));
        })
        .join()
        .unwrap();
    }
}
