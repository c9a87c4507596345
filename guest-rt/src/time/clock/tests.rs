use super::*;
use proptest::prelude::*;
use std::cell::Cell;

fn page(khz: u64) -> ClockPage {
    let (mult, shift) = scale(khz);
    ClockPage { tsc_base: 1000, mono_ns_base: 5, real_ns_base: 7_000, mult, shift, ..ClockPage::default() }
}

#[test]
fn a_second_is_a_second() {
    for khz in [1_000, 999_999, 2_595_124, 4_000_000, 12_345_678] {
        let (mono, real) = at(&page(khz), 1000 + khz * 1000);
        assert!(mono.abs_diff(1_000_000_005) <= 1, "{khz} kHz: {mono}");
        assert_eq!(real - mono, 6_995);
    }
}

#[test]
fn before_the_base_is_the_base() {
    assert_eq!(at(&page(1_000_000), 3), (5, 7_000));
}

#[test]
fn a_century_does_not_overflow() {
    let khz = 3_000_000;
    let ticks = khz * 1000 * 86_400 * 365 * 100;
    let (mono, _) = at(&page(khz), 1000 + ticks);
    let exact = 86_400 * 365 * 100 * 1_000_000_000u64;
    assert!(mono.abs_diff(exact) < exact / 1_000_000_000, "{mono} {exact}");
}

#[test]
fn dates() {
    assert_eq!(unix_seconds(1970, 1, 1, 0, 0, 0), 0);
    assert_eq!(unix_seconds(2000, 3, 1, 0, 0, 0), 951_868_800);
    assert_eq!(unix_seconds(2024, 2, 29, 23, 59, 59), 1_709_251_199);
    assert_eq!(unix_seconds(2026, 11, 22, 10, 30, 52), 1_795_343_452);
}

/// A writer changes the page between the reader's looks: the reader never sees half of it.
#[test]
fn a_torn_copy_is_read_again() {
    let mut shared = page(1_000_000);
    shared.seq = 4;
    let p = &raw mut shared;
    let reads = Cell::new(0);
    // SAFETY: one thread; volatile, as the reader's own accesses.
    let (copy, tsc) = unsafe {
        read(p, || {
            reads.set(reads.get() + 1);
            if reads.get() == 1 {
                // After the copy was made: a whole update.
                (&raw mut (*p).seq).write_volatile(6);
                (&raw mut (*p).mono_ns_base).write_volatile(99);
            }
            reads.get()
        })
    };
    assert_eq!((copy.seq, copy.mono_ns_base, tsc, reads.get()), (6, 99, 2, 2));
}

proptest! {
    #[test]
    fn time_never_goes_back(khz in 100_000u64..10_000_000, a in any::<u64>(), b in any::<u64>()) {
        let page = page(khz);
        let (early, late) = (a.min(b), a.max(b));
        prop_assert!(at(&page, early).0 <= at(&page, late).0);
    }

    /// Any page, however hostile, gives an answer.
    #[test]
    fn any_page_is_taken(mult in any::<u32>(), shift in any::<u32>(), base in any::<u64>(), mono in any::<u64>(), tsc in any::<u64>()) {
        let page = ClockPage { tsc_base: base, mono_ns_base: mono, mult, shift, ..ClockPage::default() };
        prop_assert!(at(&page, tsc).0 >= mono);
    }

    #[test]
    fn days_count_up(days in 0u64..60_000) {
        // Walk the calendar the plain way.
        let (mut y, mut left) = (1970, days);
        let leap = |y: u64| (y.is_multiple_of(4) && !y.is_multiple_of(100)) || y.is_multiple_of(400);
        while left >= 365 + u64::from(leap(y)) {
            left -= 365 + u64::from(leap(y));
            y += 1;
        }
        let mut m = 1;
        for length in [31, 28 + u64::from(leap(y)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if left < length {
                break;
            }
            left -= length;
            m += 1;
        }
        prop_assert_eq!(unix_seconds(y, m, left + 1, 0, 0, 0), days * 86_400);
    }
}
