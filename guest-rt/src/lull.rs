//! Lulls: what a guest does before its VMM stops it for a moment, to hand it over to another host.
//!
//! The VMM asks ([`guest_abi::BootInfo::lull`]); the devices see to it that little is under way to this guest
//! ([`crate::exec::Device::lull`]); when they have, the guest says so and goes on as usual, without parking, until the VMM asks no more. Whether
//! it was ported meanwhile makes no difference. Always true: a lull ends, after [`LULL_MAX`] by itself.
use crate::time::{Duration, Instant};

/// How long a guest keeps its peers waiting for a stop that does not come.
pub const LULL_MAX: Duration = Duration::from_millis(10);

/// Where this guest is with what the VMM asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lull {
    /// The question that is being dealt with, and since when; or that was, if it is not on.
    number: u32,
    since: Instant,
    on: bool,
    answered: bool,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Tell the devices.
    Begin,
    /// Tell the VMM.
    Answer(u32),
    /// Tell the devices that it is over.
    End,
}

impl Lull {
    /// Whether the devices have been told.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Whether the VMM asks something else than when [`Lull::step`] was last called.
    pub(crate) fn is_news(&self, asked: u32) -> bool {
        // A question that was taken back is forgotten: the same number is another then.
        asked != self.number
    }

    /// What is to be done now that the VMM asks `asked`; `ready`: whether all devices have come to a lull.
    pub(crate) fn step(&mut self, asked: u32, now: Instant, ready: impl FnOnce() -> bool) -> Option<Step> {
        if self.on && (asked != self.number || now.since(self.since) >= LULL_MAX) {
            self.on = false;
            return Some(Step::End);
        }
        if self.is_news(asked) {
            *self = Lull { number: asked, since: now, on: asked != 0, answered: false };
            return self.on.then_some(Step::Begin);
        }
        if self.on && !self.answered && ready() {
            self.answered = true;
            return Some(Step::Answer(asked));
        }
        None
    }
}

/// What the VMM asks, and how it is answered: in the boot-info page, if there is one.
#[cfg(not(test))]
pub(crate) use crate::boot::{answer_lull as answer, lull_asked as asked};

/// In host tests a number that the tests set, and one that they read.
#[cfg(test)]
pub(crate) mod page {
    use core::cell::Cell;
    std::thread_local! {
        pub(crate) static ASKED: Cell<u32> = const { Cell::new(0) };
        pub(crate) static ANSWER: Cell<u32> = const { Cell::new(0) };
    }
}
#[cfg(test)]
pub(crate) fn asked() -> u32 {
    page::ASKED.get()
}
#[cfg(test)]
pub(crate) fn answer(number: u32) {
    page::ANSWER.set(number);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_answered_once_and_ends_when_it_is_withdrawn() {
        let (mut lull, now) = (Lull::default(), Instant::from_nanos(5));
        assert_eq!(lull.step(0, now, || true), None);
        assert_eq!(lull.step(7, now, || true), Some(Step::Begin));
        assert!(lull.is_on());
        assert_eq!(lull.step(7, now, || false), None, "not ready");
        assert_eq!(lull.step(7, now, || true), Some(Step::Answer(7)));
        assert_eq!(lull.step(7, now, || true), None, "said already");
        assert_eq!(lull.step(0, now, || true), Some(Step::End));
        assert_eq!(lull.step(0, now, || true), None);
        assert!(!lull.is_on());
    }

    #[test]
    fn a_lull_that_nobody_ends_ends_by_itself_and_the_same_question_begins_no_other() {
        let (mut lull, now) = (Lull::default(), Instant::from_nanos(5));
        assert_eq!(lull.step(7, now, || false), Some(Step::Begin));
        let late = now + LULL_MAX;
        assert_eq!(lull.step(7, late, || true), Some(Step::End), "also if it was never answered");
        assert_eq!(lull.step(7, late, || true), None);
        assert!(!lull.is_news(7) && lull.is_news(8));
        assert_eq!(lull.step(8, late, || true), Some(Step::Begin));
        assert_eq!(lull.step(9, late, || true), Some(Step::End), "another question: the first is over");
        assert_eq!(lull.step(9, late, || false), Some(Step::Begin));
        assert_eq!(lull.step(0, late, || false), Some(Step::End), "never answered");
        assert_eq!(lull.step(0, late, || true), None);
        assert_eq!(
            lull.step(9, late, || true),
            Some(Step::Begin),
            "the next process that asks may begin with the same number"
        );
    }
}
