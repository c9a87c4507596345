//! How long a thread of a VM looks for events before it sleeps: as long as that has paid lately, as KVM does with halts; and how
//! often it offers its processor meanwhile: as often as that was taken lately.
//!
//! A sleep that is over soon costs more than the wait (being woken on another processor takes tens of microseconds); a long one
//! costs nothing. Always true: the time is at most [`POLL_MAX`], or [`POLL_IDLE`], and nothing once sleeps have been long; the processor is
//! offered at least once in [`LOOKS_MAX`] looks in vain.

use std::time::{Duration, Instant};

/// Longest time of looking for events in vain: somewhat more than a request to a fast disk takes.
pub(crate) const POLL_MAX: Duration = Duration::from_micros(100);
/// The same where nothing is under way: what comes then may need the processor that this would take.
pub(crate) const POLL_IDLE: Duration = Duration::from_micros(25);

/// The policy's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Polling {
    allowed: bool,
    budget: Duration,
}

impl Polling {
    /// Sleeps at once until it is shown that polling pays. `processors` is how many there are: with one, whoever is to be waited
    /// for could not run.
    pub fn new(processors: usize) -> Polling {
        Polling { allowed: processors > 1, budget: Duration::ZERO }
    }

    /// How long to look before the next sleep; `near`: something is under way whose end will be seen.
    pub fn budget(&self, near: bool) -> Duration {
        if near { self.budget } else { self.budget.min(POLL_IDLE) }
    }

    /// A sleep has ended after `slept`, and before it was looked for `looked` in vain.
    pub fn slept(&mut self, looked: Duration, slept: Duration) {
        let missed = looked + slept;
        self.budget = match () {
            () if !self.allowed => Duration::ZERO,
            () if missed <= POLL_MAX => (self.budget * 2).clamp(POLL_IDLE, POLL_MAX),
            () if self.budget <= POLL_IDLE => Duration::ZERO,
            () => self.budget / 2,
        };
    }
}

/// Most looks in vain between two offers of the processor to somebody else. An offer costs up to 1 µs, which a request to a disk
/// at depth 1 feels; with none a program on the same processor, which may be the one that is waited for, would wait out the
/// whole time.
pub(crate) const LOOKS_MAX: u32 = 32;
/// An offer that took so long was taken: two switches and something done between them.
const TAKEN: Duration = Duration::from_micros(4);

/// Offers of the processor while looking in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offers {
    /// Looks from one offer to the next.
    every: u32,
    looks: u32,
}

impl Offers {
    /// As if the last offer had not been taken.
    pub fn new() -> Offers {
        Offers { every: LOOKS_MAX, looks: 0 }
    }

    /// Something came: the count of looks in vain begins anew.
    pub fn came(&mut self) {
        self.looks = 0;
    }

    /// Another look was in vain: whether to offer the processor now.
    pub fn is_due(&mut self) -> bool {
        self.looks += 1;
        self.looks >= self.every
    }

    /// Makes an offer.
    pub fn offer(&mut self) {
        let begin = Instant::now();
        std::thread::yield_now();
        self.offered(begin.elapsed());
    }

    /// An offer was made, and the processor was back after `took`. One that is taken is repeated at the next look: who took it
    /// wants it again as soon as it has its answer.
    fn offered(&mut self, took: Duration) {
        self.looks = 0;
        self.every = if took >= TAKEN { 1 } else { (self.every * 2).min(LOOKS_MAX) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_offered_at_each_look_while_somebody_takes_it() {
        let looks = |offers: &mut Offers| (1..).take_while(|_| !offers.is_due()).count() as u32 + 1;
        let mut offers = Offers::new();
        assert_eq!(looks(&mut offers), LOOKS_MAX);
        offers.offered(TAKEN);
        assert_eq!(looks(&mut offers), 1);
        // Nobody is there any more.
        for expected in [2, 4, 8, 16, LOOKS_MAX, LOOKS_MAX] {
            offers.offered(Duration::from_nanos(500));
            offers.is_due();
            offers.came();
            assert_eq!(looks(&mut offers), expected);
        }
    }

    const SHORT: Duration = Duration::from_micros(10);
    const LONG: Duration = Duration::from_millis(5);

    #[test]
    fn it_grows_while_sleeps_are_short_and_ends_when_they_are_long() {
        let mut polling = Polling::new(2);
        assert_eq!(polling.budget(true), Duration::ZERO);
        polling.slept(polling.budget(true), SHORT);
        assert_eq!(polling.budget(true), POLL_IDLE);
        for _ in 0..10 {
            polling.slept(polling.budget(true), SHORT);
            assert!(polling.budget(true) <= POLL_MAX && polling.budget(false) <= POLL_IDLE);
        }
        let mut sleeps = 0;
        while polling.budget(true) > Duration::ZERO {
            polling.slept(polling.budget(true), LONG);
            sleeps += 1;
        }
        assert!(sleeps <= 4, "{sleeps}");
        polling.slept(polling.budget(true), LONG);
        assert_eq!(polling.budget(true), Duration::ZERO);
    }

    #[test]
    fn what_counts_is_how_long_was_looked() {
        let mut polling = Polling::new(2);
        while polling.budget(true) < POLL_MAX {
            polling.slept(polling.budget(true), SHORT);
        }
        // Nothing was under way: it would have come while looking for long.
        polling.slept(polling.budget(false), POLL_MAX - POLL_IDLE);
        assert_eq!(polling.budget(true), POLL_MAX);
        polling.slept(polling.budget(false), POLL_MAX);
        assert_eq!(polling.budget(true), POLL_MAX / 2);
    }

    #[test]
    fn a_single_processor_never_polls() {
        let mut polling = Polling::new(1);
        polling.slept(polling.budget(true), SHORT);
        assert_eq!(polling.budget(true), Duration::ZERO);
    }
}
