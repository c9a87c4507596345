//! Clock arithmetic: from a TSC value to nanoseconds by the figures of a [`ClockPage`].
use core::sync::atomic::{Ordering, fence};
use guest_abi::ClockPage;

/// Nanoseconds of both clocks at a TSC value. A TSC value before the base counts as the base.
pub fn at(page: &ClockPage, tsc: u64) -> (u64, u64) {
    let ticks = tsc.saturating_sub(page.tsc_base);
    let ns = (u128::from(ticks) * u128::from(page.mult)) >> page.shift.min(127);
    let ns = u64::try_from(ns).unwrap_or(u64::MAX);
    (page.mono_ns_base.saturating_add(ns), page.real_ns_base.saturating_add(ns))
}

/// Multiplier and shift for a TSC of so many kHz: as precise as a 32-bit multiplier can be.
pub fn scale(khz: u64) -> (u32, u32) {
    let khz = khz.max(1);
    let mut shift = 40;
    loop {
        // ns = ticks * 10^6 / kHz
        let mult = (1_000_000u128 << shift) / u128::from(khz);
        if let Ok(mult) = u32::try_from(mult) {
            return (mult, shift);
        }
        shift -= 1;
    }
}

/// Seconds since 1970 of a civil date (proleptic Gregorian), after Howard Hinnant's `days_from_civil`.
pub fn unix_seconds(year: u64, month: u64, day: u64, hour: u64, minute: u64, second: u64) -> u64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y / 400;
    let year_of_era = y - era * 400;
    let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).saturating_sub(719_468);
    ((days * 24 + hour) * 60 + minute) * 60 + second
}

/// A consistent copy of the page and a TSC value taken while it held.
///
/// # Safety
/// `page` must be valid for reads.
pub unsafe fn read(page: *const ClockPage, tsc: impl Fn() -> u64) -> (ClockPage, u64) {
    // The VMM writes the page while the vCPU is stopped, so this loop goes round at most twice.
    loop {
        // SAFETY: of the caller.
        let before = unsafe { (&raw const (*page).seq).read_volatile() };
        fence(Ordering::Acquire);
        // SAFETY: of the caller. A torn copy is thrown away below.
        let copy = unsafe { page.read_volatile() };
        let now = tsc();
        fence(Ordering::Acquire);
        // SAFETY: of the caller.
        let after = unsafe { (&raw const (*page).seq).read_volatile() };
        if before == after && before & 1 == 0 {
            return (copy, now);
        }
        core::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests;
