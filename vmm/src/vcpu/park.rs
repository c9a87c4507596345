//! A park: a guest on `guest-rt` has nothing to do and waits.
//!
//! Always true: before the thread sleeps every queue has been looked at, and what comes afterwards wakes it; a guest that goes on
//! before that has something to do, and the look that is owed to it is the I/O thread's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use guest_abi::platform::PARK_FOREVER;

use super::Context;
use crate::devices::Devices;
use crate::event::Token;
use crate::polling::{Offers, Polling};
use crate::virtio::Progress;

/// Longest park: then the guest looks for itself.
const DEADLINE_MAX: Duration = Duration::from_secs(3600);
/// Attempts to get the devices before their lock is waited for: somewhat longer than a long frame takes.
const TRIES_MAX: usize = 4096;
/// Looks at the gate for each look at the clock.
const GLANCES: usize = 32;

/// A guest that parks wants all queues looked at, and may go on before that when the I/O thread, which is at the devices already,
/// has found something for it: then the look is owed to it.
///
/// Always true: of a debt that [`Looks::leave`] has made the I/O thread learns at its next [`Looks::end`]. Each side writes its own
/// flag before it reads the other's.
#[derive(Debug, Default)]
pub struct Looks {
    serving: AtomicBool,
    owed: AtomicBool,
}

impl Looks {
    /// The I/O thread goes to the devices.
    pub fn begin(&self) {
        self.serving.store(true, Ordering::SeqCst);
    }

    /// It comes from them: true if all queues are to be looked at once more.
    #[must_use]
    pub fn end(&self) -> bool {
        self.serving.store(false, Ordering::SeqCst);
        self.owed.swap(false, Ordering::SeqCst)
    }

    /// Leaves a look at all queues to the I/O thread; false if it is not at the devices.
    #[must_use]
    fn leave(&self) -> bool {
        self.owed.store(true, Ordering::SeqCst);
        self.serving.load(Ordering::SeqCst)
    }
}

/// How a vCPU thread waits at a park before it sleeps.
pub(super) struct Patience {
    polling: Polling,
    offers: Offers,
}

impl Patience {
    pub(super) fn new(processors: usize) -> Patience {
        Patience { polling: Polling::new(processors), offers: Offers::new() }
    }
}

impl Context {
    /// The devices; nothing if the I/O thread, which has them, finds something for the guest meanwhile: it looks at all queues
    /// then, and the guest need not wait until it is through.
    fn devices_unless_open(&self) -> Option<MutexGuard<'_, Devices>> {
        for _ in 0..TRIES_MAX {
            match self.devices.try_lock() {
                Ok(devices) => return Some(devices),
                Err(TryLockError::Poisoned(e)) => return Some(e.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
            if self.gate.is_open() && !self.gate.kicked() && self.looks.leave() {
                return None;
            }
            std::hint::spin_loop();
        }
        Some(self.devices())
    }

    /// Waits until a device has something for the guest, a kick, or the deadline; serves the devices meanwhile.
    pub(super) fn park(&self, ns: u64, patience: &mut Patience) {
        let stats = &self.stats.vcpu;
        stats.parks.inc();
        match self.devices_unless_open() {
            Some(mut devices) => {
                if devices.park() == Progress::More {
                    self.gate.signal();
                }
            }
            None => {
                self.gate.pass();
                return;
            }
        }
        let deadline = (ns != PARK_FOREVER).then(|| Instant::now() + Duration::from_nanos(ns).min(DEADLINE_MAX));
        if !self.gate.is_open() && !self.opens_soon(deadline, patience) {
            stats.slept.inc();
            let begin = Instant::now();
            loop {
                let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
                if left == Some(Duration::ZERO) {
                    break;
                }
                if self.gate.may_sleep() {
                    let ready = self.events.vcpu.wait(left);
                    self.gate.awake();
                    self.serve(&ready);
                }
                if self.gate.is_open() {
                    break;
                }
            }
            patience.polling.slept(patience.polling.budget(false), begin.elapsed());
        }
        if self.gate.kicked() {
            self.collect();
        }
        self.gate.pass();
    }

    /// Looks at the gate for as long as that has paid lately; the I/O thread serves the devices meanwhile. True if it has opened,
    /// or the deadline has come.
    fn opens_soon(&self, deadline: Option<Instant>, patience: &mut Patience) -> bool {
        // The guest has looked by itself before it parked.
        let budget = patience.polling.budget(false);
        if budget.is_zero() {
            return false;
        }
        let begin = Instant::now();
        patience.offers.came();
        loop {
            for _ in 0..GLANCES {
                if self.gate.is_open() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if deadline.is_some_and(|d| now >= d) {
                return true;
            }
            if now.duration_since(begin) >= budget {
                return false;
            }
            if patience.offers.is_due() {
                patience.offers.offer();
            }
        }
    }

    /// Serves what this thread alone was told of, without waiting: see [`crate::event`].
    fn collect(&self) {
        loop {
            let ready = self.events.vcpu.wait(Some(Duration::ZERO));
            self.serve(&ready);
            if !ready.is_full() {
                break;
            }
        }
    }

    fn serve(&self, ready: &crate::event::Ready) {
        if ready.is_empty() {
            return;
        }
        let mut devices = self.devices();
        for token in ready.iter() {
            match token {
                Token::Wake => self.gate.drain(),
                token => {
                    // More to do means that something was given to the guest: it is let run, and parks again.
                    if devices.handle(token) == Progress::More {
                        self.gate.signal();
                    }
                }
            }
        }
    }
}
