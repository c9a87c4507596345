//! Time: the monotonic and the real clock, sleeping, time-outs.
//!
//! Owns the clock's source (the boot-info page's [`ClockPage`](guest_abi::ClockPage), or one measured at boot under a foreign VMM) and the
//! heap of timers. Always true: [`Instant::now`] never goes back, also over a restore or a port; no TSC value is
//! kept from one reading to the next.
mod clock;
#[cfg(not(test))]
mod legacy;
pub(crate) mod timer;

pub use timer::{Elapsed, Sleep, Timeout, sleep, sleep_until, timeout};

use core::ops::{Add, AddAssign, Sub};
pub use core::time::Duration;

/// A point of the monotonic clock, in nanoseconds since some instant before the image started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(u64);

impl Instant {
    /// Later than any deadline.
    pub const FAR_FUTURE: Instant = Instant(u64::MAX);

    /// Now.
    pub fn now() -> Instant {
        Instant(source::mono_ns())
    }

    /// From nanoseconds of the monotonic clock.
    pub const fn from_nanos(ns: u64) -> Instant {
        Instant(ns)
    }

    /// Nanoseconds of the monotonic clock.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero if that is later.
    pub const fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Time from this instant until now.
    pub fn elapsed(self) -> Duration {
        Instant::now().since(self)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, d: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, d: Duration) {
        *self = *self + d;
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.since(earlier)
    }
}

/// Nanoseconds since 1970 (CLOCK_REALTIME of the host; under a foreign VMM without an RTC, since boot).
pub fn realtime_ns() -> u64 {
    source::real_ns()
}

#[cfg(not(test))]
#[allow(unused_imports, reason = "a hosted build does not start")]
pub(crate) use source::{generation, init, tsc, use_page};

#[cfg(not(test))]
mod source {
    use super::{clock, legacy};
    use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};
    use guest_abi::{BootInfo, ClockPage};

    /// The page in use: null until there is one.
    static PAGE: AtomicPtr<ClockPage> = AtomicPtr::new(core::ptr::null_mut());
    /// Latest monotonic time handed out.
    static LAST: AtomicU64 = AtomicU64::new(0);

    pub(crate) fn tsc() -> u64 {
        // SAFETY: every x86-64 has it, and CR4.TSD is clear.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    /// Takes the clock from the boot-info page, if there is one.
    pub(crate) fn use_page(info: Option<*mut BootInfo>) {
        if let Some(info) = info {
            // SAFETY: the page is mapped for the life of the image; only an address is taken.
            PAGE.store(unsafe { &raw mut (*info).clock }, Relaxed);
        }
    }

    /// Measures the clock, if no page was given.
    pub(crate) fn init() {
        if PAGE.load(Relaxed).is_null() {
            let page = alloc::boxed::Box::leak(alloc::boxed::Box::new(legacy::calibrate()));
            PAGE.store(page, Relaxed);
        }
    }

    fn read() -> (ClockPage, u64) {
        let page = PAGE.load(Relaxed);
        if page.is_null() {
            return (ClockPage::default(), 0);
        }
        // SAFETY: not null, so one of the two above, both valid for the life of the image.
        unsafe { clock::read(page, tsc) }
    }

    pub(super) fn mono_ns() -> u64 {
        let (page, tsc) = read();
        let now = clock::at(&page, tsc).0;
        LAST.fetch_max(now, Relaxed).max(now)
    }

    pub(super) fn real_ns() -> u64 {
        let (page, tsc) = read();
        clock::at(&page, tsc).1
    }

    /// Grows by one with every restore or port.
    pub(crate) fn generation() -> u32 {
        read().0.generation
    }
}

#[cfg(test)]
pub(crate) use source::generation;

/// In host tests time is a number that the tests and [`crate::exec`]'s park move.
#[cfg(test)]
pub(crate) mod source {
    use core::cell::Cell;
    std::thread_local! {
        static NOW: Cell<u64> = const { Cell::new(1_000_000) };
        pub(crate) static GENERATION: Cell<u32> = const { Cell::new(1) };
    }
    pub(super) fn mono_ns() -> u64 {
        NOW.get()
    }
    pub(super) fn real_ns() -> u64 {
        NOW.get()
    }
    pub(crate) fn advance(ns: u64) {
        NOW.set(NOW.get() + ns);
    }
    pub(crate) fn generation() -> u32 {
        GENERATION.get()
    }
}
