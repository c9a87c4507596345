//! A guest that is slowed down, so that a port's copy of its memory catches up.
//!
//! Owns the thread that holds the vCPUs for a share of every period. Always true: the vCPUs are held only while a
//! [`Throttle`] lives; one that is dropped has let go of them. Pause, resume and end of the VM work as ever meanwhile.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Vm;
use super::life::{Life, spawn};
use crate::error::Result;

/// Shortest period. Clients of the guest notice no more than a slower answer.
const PERIOD_MIN: Duration = Duration::from_millis(10);
/// The guest gets at least so long at a time: less would go for stopping and starting it.
const RUN_MIN: Duration = Duration::from_millis(1);
/// Most the guest is held, in percent.
const PERCENT_MAX: u8 = 99;

/// How long the vCPUs run and are held in turn, when they are to be held for `percent` of the time.
fn shares(percent: u8) -> (Duration, Duration) {
    let held = u32::from(percent.min(PERCENT_MAX));
    let free = 100 - held;
    let period = PERIOD_MIN.max(RUN_MIN * 100 / free);
    (period * free / 100, period * held / 100)
}

#[derive(Default)]
struct Wanted {
    percent: u8,
    over: bool,
}

/// While it lives, the VM is slowed down.
pub struct Throttle {
    wanted: Arc<(Mutex<Wanted>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Holds the vCPUs for `percent` of the time.
    pub fn begin(vm: &Vm, percent: u8) -> Result<Throttle> {
        let wanted = Arc::new((Mutex::new(Wanted { percent, over: false }), Condvar::new()));
        let (shared, life) = (wanted.clone(), vm.life.clone());
        let thread = spawn("throttle", move || hold_and_release(&shared, &life))?;
        Ok(Throttle { wanted, thread: Some(thread) })
    }

    /// From the next period on, for `percent` of the time.
    pub fn set(&self, percent: u8) {
        self.wanted.0.lock().unwrap_or_else(PoisonError::into_inner).percent = percent;
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.wanted.0.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.wanted.1.notify_all();
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            log::error!("the thread that slows the guest down had panicked");
        }
    }
}

/// The thread. It was made by one that is confined, and is so as well.
fn hold_and_release((wanted, changed): &(Mutex<Wanted>, Condvar), life: &Life) {
    let mut state = wanted.lock().unwrap_or_else(PoisonError::into_inner);
    while !state.over {
        let (run, held) = shares(state.percent);
        for (hold, duration) in [(true, held), (false, run)] {
            life.hold(hold);
            let (next, _) = changed
                .wait_timeout_while(state, duration, |state| !state.over)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
    }
    life.hold(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_period_and_leave_some_for_the_guest() {
        assert_eq!(shares(30), (Duration::from_millis(7), Duration::from_millis(3)));
        assert_eq!(shares(98), (Duration::from_millis(1), Duration::from_millis(49)));
        for percent in 0..=u8::MAX {
            let (run, held) = shares(percent);
            // But for what rounding takes.
            let enough = RUN_MIN - Duration::from_nanos(100);
            assert!(run >= enough && held < Duration::from_millis(100), "{percent} %: {run:?}, {held:?}");
        }
    }
}
