//! How many bytes a host sends and receives over time.
use crate::lab::{BRIDGE, Host};
use anyhow::{Context, Result, anyhow, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two looks.
pub const PERIOD: Duration = Duration::from_millis(50);
/// Most samples of a run: an hour's worth.
const MAX_SAMPLES: usize = 72_000;

/// Counters of the host's own interface (what its programs send and receive, not what passes its bridge) at one time.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// Bytes received so far.
    pub received: u64,
    /// Bytes sent so far.
    pub sent: u64,
}

impl Sample {
    fn total(&self) -> u64 {
        self.received + self.sent
    }
}

/// Looks at a host's counters until it is told to stop.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Sample>>>,
}

impl Sampler {
    /// Begins.
    pub fn start(host: &Host) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = host.thread(move || {
            let mut samples = Vec::new();
            while !seen.load(Ordering::Relaxed) && samples.len() < MAX_SAMPLES {
                samples.push(sample()?);
                std::thread::sleep(PERIOD);
            }
            samples.push(sample()?);
            Ok(samples)
        });
        Sampler { stop, thread }
    }

    /// Ends and gives the series.
    pub fn finish(self) -> Result<Series> {
        self.stop.store(true, Ordering::Relaxed);
        let samples = self.thread.join().map_err(|_| anyhow!("the sampler panicked"))??;
        Ok(Series { samples })
    }
}

fn sample() -> Result<Sample> {
    let dev = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let at = Instant::now();
    let (received, sent) = counters(&dev, BRIDGE).with_context(|| format!("no interface {BRIDGE}"))?;
    Ok(Sample { at, received, sent })
}

pub(crate) fn counters(dev: &str, interface: &str) -> Option<(u64, u64)> {
    let line = dev.lines().find_map(|l| l.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    Some((fields.first()?.parse().ok()?, fields.get(8)?.parse().ok()?))
}

/// Samples in the order of time.
#[derive(Clone, Debug, Default)]
pub struct Series {
    samples: Vec<Sample>,
}

impl Series {
    /// Megabytes (10^6) a second, both directions together, between two times; an error if too little was seen of them.
    pub fn mb_s(&self, from: Instant, to: Instant) -> Result<f64> {
        let inside: Vec<&Sample> = self.samples.iter().filter(|s| s.at >= from && s.at <= to).collect();
        match (inside.first(), inside.last()) {
            (Some(a), Some(b)) if b.at > a.at => Ok((b.total() - a.total()) as f64 / 1e6 / (b.at - a.at).as_secs_f64()),
            _ => bail!("the copy was too short to measure its throughput: ask for more with --size"),
        }
    }

    /// (seconds since `zero`, megabytes a second) for each pair of neighbours.
    pub fn points(&self, zero: Instant) -> Vec<(f64, f64)> {
        let mut points = Vec::new();
        for pair in self.samples.windows(2) {
            let seconds = (pair[1].at - pair[0].at).as_secs_f64();
            if seconds > 0.0 {
                let middle = pair[0].at + (pair[1].at - pair[0].at) / 2;
                let x = middle.saturating_duration_since(zero).as_secs_f64();
                points.push((x, (pair[1].total() - pair[0].total()) as f64 / 1e6 / seconds));
            }
        }
        points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_proc() {
        let dev = "Inter-|   Receive\n face |bytes\n    lo:       0 0 0 0 0 0 0 0 0 0\n   br0: 123 4 0 0 0 0 0 0 567 8 0 0 0 0 0 0\n";
        assert_eq!(counters(dev, "br0"), Some((123, 567)));
        assert_eq!(counters(dev, "br1"), None);
    }

    #[test]
    fn rates_are_bytes_over_time() {
        let zero = Instant::now();
        let at = |ms, received| Sample { at: zero + Duration::from_millis(ms), received, sent: 0 };
        let series = Series { samples: vec![at(0, 0), at(100, 10_000_000), at(200, 10_000_000)] };
        assert_eq!(series.mb_s(zero, zero + Duration::from_secs(1)).unwrap(), 50.0);
        assert_eq!(series.points(zero), [(0.05, 100.0), (0.15, 0.0)]);
        assert!(series.mb_s(zero + Duration::from_secs(1), zero + Duration::from_secs(2)).is_err());
    }
}
