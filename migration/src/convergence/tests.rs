use super::*;
use proptest::prelude::*;

fn stats(round: u32, dirty_pages: u64, stuck: u32) -> RoundStats {
    // 1 GiB/s: a page is about 3.8 µs.
    RoundStats {
        round,
        sent_bytes: 1 << 30,
        elapsed_ns: 1_000_000_000,
        dirty_pages,
        stuck,
        fixed_ns: 500_000,
        throttle: 0,
    }
}

#[test]
fn an_idle_guest_is_paused_after_the_first_round() {
    assert_eq!(decide(&Policy::default(), &stats(0, 3, 0)), Decision::Pause);
}

#[test]
fn goes_on_while_it_helps_and_pauses_when_it_does_not() {
    let policy = Policy::default();
    assert_eq!(decide(&policy, &stats(0, 20_000, 0)), Decision::Round);
    assert_eq!(decide(&policy, &stats(1, 5_000, 0)), Decision::Round);
    assert_eq!(decide(&policy, &stats(3, 2_100, 2)), Decision::Round);
    assert_eq!(decide(&policy, &stats(4, 1_900, 3)), Decision::Pause, "8 ms are not worth slowing the guest down");
    assert!(helped(4_000, 5_000) && helped(20_000, u64::MAX) && helped(0, 0) && !helped(4_900, 5_000));
}

#[test]
fn slows_the_guest_down_step_by_step_when_rounds_do_not_help() {
    let policy = Policy { limit_ns: 100_000_000, ..Policy::default() };
    let at = |throttle, stuck| RoundStats { throttle, ..stats(9, 40_000, stuck) };
    assert_eq!(decide(&policy, &at(0, 2)), Decision::Round);
    assert_eq!(decide(&policy, &at(0, 3)), Decision::Throttle(30));
    assert_eq!(decide(&policy, &at(30, 0)), Decision::Round, "a step is given time");
    assert_eq!(decide(&policy, &at(30, 3)), Decision::Throttle(50));
    assert_eq!(decide(&policy, &at(80, 3)), Decision::Throttle(90));
    assert_eq!(decide(&policy, &at(90, 3)), Decision::Round, "no further than the policy allows");
    assert!(matches!(decide(&policy, &at(90, 8)), Decision::GiveUp(_)));
    let never = Policy { throttle_max: 0, ..policy };
    assert_eq!(decide(&never, &at(0, 3)), Decision::Round);
    assert!(matches!(decide(&never, &at(0, 8)), Decision::GiveUp(_)));
    // What is bearable is not put off for ever.
    let patient = Policy { throttle_max: 30, ..Policy::default() };
    assert_eq!(decide(&patient, &at(0, 3)), Decision::Throttle(30));
    assert_eq!(decide(&patient, &at(30, 3)), Decision::Pause);
}

#[test]
fn gives_up_when_the_blackout_would_be_too_long() {
    let policy = Policy { limit_ns: 10_000_000, max_rounds: 3, throttle_max: 0, ..Policy::default() };
    assert_eq!(decide(&policy, &stats(1, 100_000, 3)), Decision::Round);
    assert!(matches!(decide(&policy, &stats(2, 100_000, 3)), Decision::GiveUp(ns) if ns > 300_000_000));
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
    fn always_ends(n in any::<[u64; 6]>(), target in any::<u64>(), limit in any::<u64>(), max_rounds in 0u32..40, round in 0u32..40, throttle_max in any::<u8>(), throttle in any::<u8>()) {
        let policy = Policy { target_ns: target, limit_ns: limit, max_rounds, throttle_max };
        let s = RoundStats { round, sent_bytes: n[0], elapsed_ns: n[1], dirty_pages: n[2], stuck: n[3] as u32, fixed_ns: n[4], throttle };
        match decide(&policy, &s) {
            Decision::Round => prop_assert!(round + 1 < max_rounds),
            Decision::Pause => prop_assert!(estimate_ns(&s) <= target.max(limit)),
            Decision::Throttle(step) => {
                prop_assert!(round + 1 < max_rounds && step > throttle && step <= throttle_max && step < 100);
            }
            Decision::GiveUp(ns) => prop_assert!(ns > limit && (round + 1 >= max_rounds || s.stuck >= HOPELESS)),
        }
    }
}
