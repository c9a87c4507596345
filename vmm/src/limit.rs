//! Token buckets: how many operations and bytes a second a device may do.
//!
//! Owns the arithmetic ([`Bucket`], [`Limiter`]: no clock, time is passed in) and its edge ([`Throttle`]: a clock and a timer
//! that wakes the device). Always true: in any time t a bucket admits at most burst + rate · t tokens, and one operation more
//! where a single one is larger than the burst (it is let through when the bucket is full, and paid off afterwards); a
//! device that is refused has a timer running that wakes it when it will not be. Without limits no clock is read.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use crate::config::MemorySize;
use crate::error::{Error, FieldError, Result};
use crate::stats::Counter;

/// Largest rate and burst.
pub const AMOUNT_MAX: u64 = 1 << 50;
/// Deepest debt a bucket can be in: one largest operation.
const DEBT_MAX: u64 = 1 << 32;
/// Without a burst given, what comes in 1/10 s can be saved up.
const DEFAULT_BURST_DIVISOR: u64 = 10;
/// A device that had to wait is woken when there is at least what comes in 1/1000 s, so that it is not woken for each token.
const WAKE_DIVISOR: u64 = 1000;
const NANOS: i128 = 1_000_000_000;

/// One limit: `rate` tokens a second, of which `burst` can be saved up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens a second.
    #[serde(deserialize_with = "amount")]
    #[schemars(with = "MemorySize")]
    pub rate: u64,
    /// Tokens that can be saved up; what comes in 1/10 s if not given.
    #[serde(default, deserialize_with = "optional_amount")]
    #[schemars(with = "Option<MemorySize>")]
    pub burst: Option<u64>,
}

impl Rate {
    /// Tokens that can be saved up.
    pub fn burst(&self) -> u64 {
        self.burst.unwrap_or(self.rate / DEFAULT_BURST_DIVISOR).max(1)
    }
}

impl std::str::FromStr for Rate {
    type Err = String;

    /// `RATE` or `RATE:BURST`, each a number with or without K, M, G.
    fn from_str(s: &str) -> std::result::Result<Rate, String> {
        let number = |s: &str| s.parse::<MemorySize>().map(MemorySize::bytes);
        Ok(match s.split_once(':') {
            Some((rate, burst)) => Rate { rate: number(rate)?, burst: Some(number(burst)?) },
            None => Rate { rate: number(s)?, burst: None },
        })
    }
}

/// What a device may do; what is not given is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Operations a second: requests of a disk, frames of a network device.
    #[serde(default)]
    pub ops: Option<Rate>,
    /// Bytes a second.
    #[serde(default)]
    pub bytes: Option<Rate>,
}

impl Limits {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.ops.is_none() && self.bytes.is_none()
    }

    /// What is wrong with them, each by the path of its field below `field`.
    pub fn mistakes(&self, field: &str) -> Vec<FieldError> {
        let mut out = Vec::new();
        for (name, rate) in [("ops", self.ops), ("bytes", self.bytes)] {
            let Some(rate) = rate else { continue };
            for (part, value) in [("rate", Some(rate.rate)), ("burst", rate.burst)] {
                if value.is_some_and(|v| v == 0 || v > AMOUNT_MAX) {
                    out.push(FieldError::new(
                        format!("{field}.{name}.{part}"),
                        format!("must be from 1 to {AMOUNT_MAX}; leave {name} out for no limit"),
                    ));
                }
            }
        }
        out
    }
}

/// One bucket. Time is that of any clock that does not go back.
#[derive(Debug, Clone)]
pub struct Bucket {
    rate: i128,
    burst: i128,
    /// Tokens / 10⁹; negative: paying off.
    level: i128,
    at: Duration,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: &Rate, now: Duration) -> Bucket {
        let burst = i128::from(rate.burst().min(AMOUNT_MAX)) * NANOS;
        Bucket { rate: i128::from(rate.rate.clamp(1, AMOUNT_MAX)), burst, level: burst, at: now }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos().min(u64::MAX.into()) as i128;
        self.level = (self.level + passed * self.rate).min(self.burst);
        self.at = self.at.max(now);
    }

    /// How long until `cost` tokens are to be had (for more than fit: until it is full); zero: now.
    pub fn wait(&mut self, cost: u64, now: Duration) -> Duration {
        self.fill(now);
        let needed = (i128::from(cost) * NANOS).min(self.burst);
        if self.level >= needed {
            return Duration::ZERO;
        }
        let batch = (self.rate * NANOS / i128::from(WAKE_DIVISOR)).min(self.burst);
        let missing = needed.max(batch) - self.level;
        Duration::from_nanos(u64::try_from((missing + self.rate - 1) / self.rate).unwrap_or(u64::MAX))
    }

    /// Takes tokens, into debt if need be.
    pub fn charge(&mut self, cost: u64) {
        self.level = (self.level - i128::from(cost) * NANOS).max(-i128::from(DEBT_MAX) * NANOS);
    }

    /// Whole tokens in it; negative: owed.
    pub fn level(&self) -> i64 {
        i64::try_from(self.level.div_euclid(NANOS)).unwrap_or(i64::MIN)
    }

    fn set_level(&mut self, level: i64) {
        self.level = (i128::from(level) * NANOS).clamp(-i128::from(DEBT_MAX) * NANOS, self.burst);
    }
}

/// What moves with the guest: the limits, as they may have been changed, and the levels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimiterState {
    /// The limits.
    pub limits: Limits,
    /// Tokens in the buckets of operations and of bytes.
    pub levels: [i64; 2],
}

/// Both buckets of a device.
#[derive(Debug, Clone, Default)]
pub struct Limiter {
    limits: Limits,
    ops: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    /// Full buckets.
    pub fn new(limits: Limits, now: Duration) -> Limiter {
        let bucket = |rate: Option<Rate>| rate.map(|r| Bucket::new(&r, now));
        Limiter { limits, ops: bucket(limits.ops), bytes: bucket(limits.bytes) }
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How long until an operation of `bytes` bytes may go ahead; zero: now. Takes nothing.
    pub fn wait(&mut self, bytes: u64, now: Duration) -> Duration {
        let ops = self.ops.as_mut().map_or(Duration::ZERO, |b| b.wait(1, now));
        let bytes = self.bytes.as_mut().map_or(Duration::ZERO, |b| b.wait(bytes, now));
        ops.max(bytes)
    }

    /// Takes what an operation costs.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(b) = &mut self.ops {
            b.charge(1);
        }
        if let Some(b) = &mut self.bytes {
            b.charge(bytes);
        }
    }

    /// The state, with all that has come by `now`.
    pub fn save(&mut self, now: Duration) -> LimiterState {
        let level = |b: &mut Option<Bucket>| {
            b.as_mut().map_or(0, |b| {
                b.fill(now);
                b.level()
            })
        };
        LimiterState { limits: self.limits, levels: [level(&mut self.ops), level(&mut self.bytes)] }
    }

    /// From a state, which may say anything.
    pub fn restore(state: &LimiterState, now: Duration) -> Result<Limiter> {
        if let Some(e) = state.limits.mistakes("limits").first() {
            return Err(Error::State(format!("{}: {}", e.field, e.message)));
        }
        let mut limiter = Limiter::new(state.limits, now);
        for (bucket, level) in [&mut limiter.ops, &mut limiter.bytes].into_iter().zip(state.levels) {
            if let Some(bucket) = bucket {
                bucket.set_level(level);
            }
        }
        Ok(limiter)
    }
}

/// A [`Limiter`] with a clock and a timer. Its descriptor is to be among the device's own: it is ready when what was refused may
/// be tried again.
#[derive(Debug)]
pub struct Throttle {
    limiter: Limiter,
    start: Instant,
    timer: TimerFd,
    /// When the timer goes off, if it runs.
    armed: Option<Duration>,
    /// How often the device had to wait.
    waits: Counter,
}

impl Throttle {
    /// With full buckets.
    pub fn new(limits: Limits) -> Result<Throttle> {
        let timer = TimerFd::new().map_err(|e| Error::Host { what: "timer".into(), source: e.into() })?;
        let limiter = Limiter::new(limits, Duration::ZERO);
        Ok(Throttle { limiter, start: Instant::now(), timer, armed: None, waits: Counter::default() })
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limiter.limits()
    }

    /// How often the device had to wait.
    pub fn waits(&self) -> u64 {
        self.waits.get()
    }

    /// Whether an operation of `bytes` bytes may go ahead; if not, the timer wakes the device. Takes nothing:
    /// [`Throttle::charge`] does. For one whose size is not known yet, `bytes` is 1.
    pub fn is_ready(&mut self, bytes: u64) -> bool {
        if self.limiter.limits.is_none() {
            return true;
        }
        let now = self.start.elapsed();
        let wait = self.limiter.wait(bytes, now);
        if wait.is_zero() {
            return true;
        }
        if self.armed.is_none_or(|at| at <= now) {
            self.waits.inc();
            self.armed = Some(now + wait);
            if let Err(e) = self.timer.reset(wait, None) {
                // Cannot be: no argument of it is wrong. Rather too fast than stuck.
                log::error!("timer of a limit: {e}");
                return true;
            }
        }
        false
    }

    /// Takes what an operation of `bytes` bytes costs.
    pub fn charge(&mut self, bytes: u64) {
        self.limiter.charge(bytes);
    }

    /// [`Throttle::is_ready`] and, if so, [`Throttle::charge`].
    pub fn admit(&mut self, bytes: u64) -> bool {
        let ready = self.is_ready(bytes);
        if ready {
            self.charge(bytes);
        }
        ready
    }

    /// Changes the limits; buckets are full again. The device is to look at its queues afterwards. The limits must be free of
    /// [`Limits::mistakes`].
    pub fn set(&mut self, limits: Limits) {
        self.limiter = Limiter::new(limits, self.start.elapsed());
        self.armed = None;
    }

    /// The state.
    pub fn save(&self) -> LimiterState {
        self.limiter.clone().save(self.start.elapsed())
    }

    /// Takes over a state.
    pub fn restore(&mut self, state: &LimiterState) -> Result<()> {
        self.limiter = Limiter::restore(state, self.start.elapsed())?;
        self.armed = None;
        Ok(())
    }
}

impl AsRawFd for Throttle {
    /// Never read: each setting of the timer makes it not ready, and its going off is an edge.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

fn amount<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<u64, D::Error> {
    MemorySize::deserialize(d).map(MemorySize::bytes)
}

fn optional_amount<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Option<u64>, D::Error> {
    Ok(Option::<MemorySize>::deserialize(d)?.map(MemorySize::bytes))
}

#[cfg(test)]
mod tests;
