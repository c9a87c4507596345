use super::*;
use proptest::prelude::*;

fn stats(round: u32, dirty_pages: u64, dirty_before: u64) -> RoundStats {
    // 1 GiB/s: a page is about 3.8 µs.
    RoundStats { round, sent_bytes: 1 << 30, elapsed_ns: 1_000_000_000, dirty_pages, dirty_before, fixed_ns: 500_000 }
}

#[test]
fn an_idle_guest_is_paused_after_the_first_round() {
    assert_eq!(decide(&Policy::default(), &stats(0, 3, u64::MAX)), Decision::Pause);
}

#[test]
fn goes_on_while_it_helps_and_pauses_when_it_does_not() {
    let policy = Policy::default();
    assert_eq!(decide(&policy, &stats(0, 20_000, u64::MAX)), Decision::Round);
    assert_eq!(decide(&policy, &stats(1, 5_000, 20_000)), Decision::Round);
    assert_eq!(decide(&policy, &stats(2, 4_900, 5_000)), Decision::Pause);
}

#[test]
fn gives_up_when_the_blackout_would_be_too_long() {
    let policy = Policy { limit_ns: 10_000_000, max_rounds: 3, ..Policy::default() };
    assert_eq!(decide(&policy, &stats(1, 100_000, 100_000)), Decision::Round);
    assert!(matches!(decide(&policy, &stats(2, 100_000, 100_000)), Decision::GiveUp(ns) if ns > 300_000_000));
}

#[test]
fn a_short_round_does_not_measure_the_bandwidth() {
    // 4 KiB in 1 ms would be 4 MiB/s; it is latency.
    let short = RoundStats { sent_bytes: 4096, elapsed_ns: 1_000_000, dirty_pages: 50, ..stats(1, 0, 0) };
    assert!(estimate_ns(&short) < 1_000_000);
}

proptest! {
    /// Whatever is measured, rounds end, and a pause never exceeds the limit unless it fits the target.
    #[test]
    fn always_ends(n in any::<[u64; 6]>(), target in any::<u64>(), limit in any::<u64>(), max_rounds in 0u32..40, round in 0u32..40) {
        let policy = Policy { target_ns: target, limit_ns: limit, max_rounds };
        let s = RoundStats { round, sent_bytes: n[0], elapsed_ns: n[1], dirty_pages: n[2], dirty_before: n[3], fixed_ns: n[4] };
        match decide(&policy, &s) {
            Decision::Round => prop_assert!(round + 1 < max_rounds),
            Decision::Pause => prop_assert!(estimate_ns(&s) <= target.max(limit)),
            Decision::GiveUp(ns) => prop_assert!(ns > limit && round + 1 >= max_rounds),
        }
    }
}
