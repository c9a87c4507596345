//! When to stop copying and pause.
//!
//! A pure function of what the last rounds measured: pause as soon as the estimated blackout fits the target, go on while
//! rounds still shrink the residue, then slow the guest down step by step, and in the end pause anyway or give up, as the
//! policy says.

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Blackout to aim at, in nanoseconds.
    pub target_ns: u64,
    /// Longest blackout that is accepted once [`Policy::max_rounds`] are over, in nanoseconds.
    pub limit_ns: u64,
    /// Most pre-copy rounds.
    pub max_rounds: u32,
    /// Most the guest may be slowed down, in percent of its time; 0: it may not.
    pub throttle_max: u8,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { target_ns: 1_500_000, limit_ns: 300_000_000, max_rounds: 40, throttle_max: 90 }
    }
}

/// What one round measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RoundStats {
    /// Number of the round, from 0.
    pub round: u32,
    /// Bytes sent in it.
    pub sent_bytes: u64,
    /// From its first byte to the destination's confirmation, in nanoseconds.
    pub elapsed_ns: u64,
    /// Pages that are dirty now.
    pub dirty_pages: u64,
    /// Rounds in a row, up to this one, that left hardly less than the best before them.
    pub stuck: u32,
    /// Part of a blackout that does not depend on the residue, in nanoseconds (estimate).
    pub fixed_ns: u64,
    /// How much the guest was slowed down meanwhile, in percent of its time.
    pub throttle: u8,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Another pre-copy round.
    Round,
    /// Let the guest stand still for so many percent of its time, then another round.
    Throttle(u8),
    /// Pause now.
    Pause,
    /// The blackout would exceed the limit (the estimate in nanoseconds).
    GiveUp(u64),
}

/// Least bandwidth assumed, so that a stalled link does not divide by zero (bytes per second).
const BANDWIDTH_FLOOR: u64 = 1 << 20;
/// A round that leaves more than this share of the least before it has not helped.
const SHRINK_PERCENT: u64 = 85;
/// So many rounds in a row that do not help, and there is no point in more of the kind.
const STUCK_MAX: u32 = 3;
/// So many when nothing is left to try: the load may have had a peak.
const HOPELESS: u32 = 8;
/// Steps in which a guest is slowed down, in percent of its time. Each halves what it still gets, or nearly.
pub const THROTTLE_STEPS: [u8; 7] = [30, 50, 70, 80, 90, 95, 98];
/// A blackout that short disturbs the guest's clients less than slowing it down would (nanoseconds).
const NOT_WORTH_SLOWING: u64 = 10_000_000;
/// Rounds shorter than this say nothing about the bandwidth, their cost is latency (bytes).
const MEANINGFUL_BYTES: u64 = 64 << 10;
/// Bandwidth assumed until a round was long enough to measure it (bytes per second).
const BANDWIDTH_GUESS: u64 = 1 << 30;

/// Estimated blackout if the guest were paused now, in nanoseconds.
pub fn estimate_ns(stats: &RoundStats) -> u64 {
    let bandwidth = if stats.sent_bytes < MEANINGFUL_BYTES {
        BANDWIDTH_GUESS
    } else {
        let bandwidth = u128::from(stats.sent_bytes) * 1_000_000_000 / u128::from(stats.elapsed_ns.max(1));
        u64::try_from(bandwidth).unwrap_or(u64::MAX).max(BANDWIDTH_FLOOR)
    };
    let residue = u128::from(stats.dirty_pages) * crate::PAGE_SIZE as u128 * 1_000_000_000 / u128::from(bandwidth);
    u64::try_from(residue).unwrap_or(u64::MAX).saturating_add(stats.fixed_ns)
}

/// Whether a round that leaves `dirty` pages has helped, when `least` is the best so far.
pub fn helped(dirty: u64, least: u64) -> bool {
    u128::from(dirty) * 100 <= u128::from(least) * u128::from(SHRINK_PERCENT)
}

/// The next step of slowing down that the policy allows.
fn next_throttle(policy: &Policy, now: u8) -> Option<u8> {
    THROTTLE_STEPS.into_iter().find(|step| *step > now).filter(|step| *step <= policy.throttle_max)
}

/// What to do after a round.
pub fn decide(policy: &Policy, stats: &RoundStats) -> Decision {
    let estimate = estimate_ns(stats);
    if estimate <= policy.target_ns {
        return Decision::Pause;
    }
    let bearable = estimate <= policy.limit_ns;
    let last = stats.round.saturating_add(1) >= policy.max_rounds;
    if last || stats.stuck >= HOPELESS {
        return if bearable { Decision::Pause } else { Decision::GiveUp(estimate) };
    }
    if stats.stuck < STUCK_MAX {
        return Decision::Round;
    }
    let brief = bearable && estimate <= NOT_WORTH_SLOWING;
    match next_throttle(policy, stats.throttle) {
        Some(step) if !brief => Decision::Throttle(step),
        _ if bearable => Decision::Pause,
        _ => Decision::Round,
    }
}

#[cfg(test)]
mod tests;
