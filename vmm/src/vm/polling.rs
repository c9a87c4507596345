//! How long a thread looks for events before it sleeps: as long as that has paid lately, as KVM does with halts.
//!
//! A sleep that is over soon costs more than the wait (being woken on another processor takes tens of microseconds); a long one
//! costs nothing. Always true: the time is at most [`POLL_MAX`], and nothing once sleeps have been long.

use std::time::Duration;

/// Longest time of looking for events in vain: somewhat more than a request to a fast disk takes.
pub(super) const POLL_MAX: Duration = Duration::from_micros(100);
/// Where it begins to grow.
const POLL_START: Duration = Duration::from_micros(25);

/// The policy's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Polling {
    allowed: bool,
    budget: Duration,
}

impl Polling {
    /// Sleeps at once until it is shown that polling pays. `processors` is how many there are: with one, whoever is to be waited
    /// for could not run.
    pub fn new(processors: usize) -> Polling {
        Polling { allowed: processors > 1, budget: Duration::ZERO }
    }

    /// How long to look before the next sleep.
    pub fn budget(&self) -> Duration {
        self.budget
    }

    /// A sleep has ended after `slept`, having been preceded by [`Polling::budget`] in vain.
    pub fn slept(&mut self, slept: Duration) {
        let missed = self.budget + slept;
        self.budget = match () {
            () if !self.allowed => Duration::ZERO,
            () if missed <= POLL_MAX => (self.budget * 2).clamp(POLL_START, POLL_MAX),
            () if self.budget <= POLL_START => Duration::ZERO,
            () => self.budget / 2,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(10);
    const LONG: Duration = Duration::from_millis(5);

    #[test]
    fn it_grows_while_sleeps_are_short_and_ends_when_they_are_long() {
        let mut polling = Polling::new(2);
        assert_eq!(polling.budget(), Duration::ZERO);
        polling.slept(SHORT);
        assert_eq!(polling.budget(), POLL_START);
        for _ in 0..10 {
            polling.slept(SHORT);
            assert!(polling.budget() <= POLL_MAX);
        }
        let mut sleeps = 0;
        while polling.budget() > Duration::ZERO {
            polling.slept(LONG);
            sleeps += 1;
        }
        assert!(sleeps <= 4, "{sleeps}");
        polling.slept(LONG);
        assert_eq!(polling.budget(), Duration::ZERO);
    }

    #[test]
    fn a_single_processor_never_polls() {
        let mut polling = Polling::new(1);
        polling.slept(SHORT);
        assert_eq!(polling.budget(), Duration::ZERO);
    }
}
