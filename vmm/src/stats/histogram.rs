//! A histogram of latencies with fixed buckets.
//!
//! Always true: recording is two relaxed atomic additions, from any thread, without a lock; what is read is
//! consistent in itself (its count is the sum of its buckets), though additions under way may be missing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets in nanoseconds; one more bucket takes what is longer.
pub const BOUNDS_NS: [u64; 20] = [
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

/// See the module.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_NS.len() + 1],
    sum_ns: AtomicU64,
}

/// What a histogram held when it was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Upper bound in seconds (the last is infinite), and how many were not longer.
    pub cumulative: Vec<(f64, u64)>,
    /// All of them.
    pub count: u64,
    /// All of them together.
    pub sum_seconds: f64,
}

impl Histogram {
    /// Counts one.
    pub fn record(&self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NS.partition_point(|bound| *bound < ns);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).sum()
    }

    /// What it holds.
    pub fn read(&self) -> Reading {
        let mut count = 0;
        let bounds = BOUNDS_NS.iter().map(|ns| *ns as f64 / 1e9).chain([f64::INFINITY]);
        let cumulative = bounds
            .zip(&self.buckets)
            .map(|(bound, bucket)| {
                count += bucket.load(Ordering::Relaxed);
                (bound, count)
            })
            .collect();
        Reading { cumulative, count, sum_seconds: self.sum_ns.load(Ordering::Relaxed) as f64 / 1e9 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let h = Histogram::default();
        h.record(Duration::from_nanos(BOUNDS_NS[0]));
        h.record(Duration::from_nanos(BOUNDS_NS[0] + 1));
        h.record(Duration::MAX);
        let shown = h.read();
        assert_eq!(shown.cumulative[0].1, 1);
        assert_eq!(shown.cumulative[1].1, 2);
        assert_eq!(shown.cumulative[BOUNDS_NS.len()], (f64::INFINITY, 3));
        assert_eq!((shown.count, h.count()), (3, 3));
        assert!(BOUNDS_NS.is_sorted());
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        let h = Histogram::default();
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let h = &h;
                s.spawn(move || (0..10_000).for_each(|i| h.record(Duration::from_nanos((i + t) * 997))));
            }
        });
        assert_eq!(h.read().count, 40_000);
    }
}
