use super::*;
use proptest::prelude::*;

fn rate(rate: u64, burst: u64) -> Rate {
    Rate { rate, burst: Some(burst) }
}

/// An offer: time that passes before it, bytes.
fn offers() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..20_000_000u64, 0..10_000u64), 1..200)
}

proptest! {
    /// Over any stretch of time between two admissions no more is admitted than the limits say.
    #[test]
    fn never_more_than_the_limit(
        ops in (1..100_000u64, 1..1000u64),
        bytes in (1..10_000_000u64, 1..50_000u64),
        offers in offers(),
    ) {
        let limits = Limits { ops: Some(rate(ops.0, ops.1)), bytes: Some(rate(bytes.0, bytes.1)) };
        let mut limiter = Limiter::new(limits, Duration::ZERO);
        let mut now = 0;
        let mut admitted: Vec<(u64, u64)> = Vec::new();
        for (pause, size) in offers {
            now += pause;
            if limiter.wait(size, Duration::from_nanos(now)).is_zero() {
                limiter.charge(size);
                admitted.push((now, size));
            }
        }
        for (i, (from, first)) in admitted.iter().enumerate() {
            let (mut count, mut sum) = (0u128, 0u128);
            for (at, size) in &admitted[i..] {
                count += 1;
                sum += u128::from(*size);
                let t = u128::from(at - from);
                prop_assert!(count * 1_000_000_000 <= u128::from(ops.1) * 1_000_000_000 + u128::from(ops.0) * t);
                // One that is larger than the burst is paid off afterwards.
                let burst = bytes.1.max(*first).max(*size);
                let over = u128::from(burst) + u128::from(burst.saturating_sub(bytes.1));
                prop_assert!(sum * 1_000_000_000 <= over * 1_000_000_000 + u128::from(bytes.0) * t);
            }
        }
    }

    /// Who waits as long as told may go ahead, and a steady demand gets the whole rate.
    #[test]
    fn waiting_helps_and_nothing_is_lost(r in 1..1_000_000u64, burst in 1..10_000u64, cost in 1..20_000u64) {
        let mut bucket = Bucket::new(&rate(r, burst), Duration::ZERO);
        let mut now = Duration::ZERO;
        let mut total = 0u128;
        for _ in 0..500 {
            let wait = bucket.wait(cost, now);
            if !wait.is_zero() {
                now += wait;
                prop_assert_eq!(bucket.wait(cost, now), Duration::ZERO);
            }
            bucket.charge(cost);
            total += u128::from(cost);
        }
        // All that has come by now has been used, but for a burst and what one rounding up of each wait makes.
        let come = u128::from(r) * now.as_nanos() / 1_000_000_000;
        prop_assert!(come <= total + u128::from(burst) + 500, "{} came, {} used", come, total);
    }

    /// Whatever a state says, the limiter works and the debt is paid in the end.
    #[test]
    fn any_state_is_refused_or_works(
        r in any::<u64>(), b in any::<Option<u64>>(), levels in any::<[i64; 2]>(), now in any::<u64>(),
    ) {
        let limit = Some(Rate { rate: r, burst: b });
        let state = LimiterState { limits: Limits { ops: limit, bytes: limit }, levels };
        let now = Duration::from_nanos(now);
        match Limiter::restore(&state, now) {
            Err(_) => prop_assert!(r == 0 || r > AMOUNT_MAX || b.is_some_and(|b| b == 0 || b > AMOUNT_MAX)),
            Ok(mut limiter) => {
                let wait = limiter.wait(1, now);
                prop_assert!(wait <= Duration::from_secs(DEBT_MAX * 2));
                prop_assert_eq!(limiter.wait(1, now + wait), Duration::ZERO);
                let saved = limiter.save(now + wait);
                let mut again = Limiter::restore(&saved, now + wait).unwrap();
                prop_assert_eq!(again.save(now + wait), saved);
            }
        }
    }
}

#[test]
fn a_clock_that_goes_back_gives_nothing() {
    let mut bucket = Bucket::new(&rate(1, 1), Duration::from_secs(100));
    bucket.charge(1);
    assert_eq!(bucket.wait(1, Duration::from_secs(50)), Duration::from_secs(1));
    assert_eq!(bucket.wait(1, Duration::from_secs(101)), Duration::ZERO);
}

#[test]
fn json_and_flags() {
    let limits: Limits = serde_json::from_str(r#"{"bytes":{"rate":"10M","burst":4096},"ops":{"rate":500}}"#).unwrap();
    assert_eq!(limits.bytes, Some(rate(10 << 20, 4096)));
    assert_eq!(limits.ops.unwrap().burst(), 50);
    assert_eq!("10M:4K".parse::<Rate>().unwrap(), rate(10 << 20, 4096));
    assert!("x".parse::<Rate>().is_err() && "1:".parse::<Rate>().is_err());
    let again: Limits = serde_json::from_str(&serde_json::to_string(&limits).unwrap()).unwrap();
    assert_eq!(again, limits);
    let bytes = postcard::to_allocvec(&limits).unwrap();
    assert_eq!(postcard::from_bytes::<Limits>(&bytes).unwrap(), limits);
    let zero = Limits { ops: Some(rate(0, 0)), bytes: None };
    let fields: Vec<_> = zero.mistakes("disks[1].limits").into_iter().map(|e| e.field).collect();
    assert_eq!(fields, ["disks[1].limits.ops.rate", "disks[1].limits.ops.burst"]);
}

#[test]
fn the_timer_wakes_and_a_change_counts_at_once() {
    let events = crate::event::Events::new().unwrap();
    let mut throttle = Throttle::new(Limits { ops: Some(rate(100, 2)), bytes: None }).unwrap();
    events.add_device(throttle.as_raw_fd(), 1).unwrap();
    for _ in 0..20 {
        while throttle.admit(512) {}
        assert!(!events.io.wait(None).is_empty());
        assert!(throttle.is_ready(512));
    }
    assert!(throttle.waits() >= 20);
    while throttle.admit(1) {}
    throttle.set(Limits::default());
    assert!(throttle.admit(1 << 40));
}
