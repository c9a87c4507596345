//! How long each phase of a port may take at the source.
//!
//! Always true: a phase in which the guest stands still, or in which another side decides, has a limit; what must be done in it
//! for the size of the memory is added, as measured here.

use std::time::Duration;

use migration::source::Phase;

/// Longest time the destination may take to answer HELLO and to make the VM.
const PREPARE_MAX: Duration = Duration::from_secs(10);
/// Longest time until a round is confirmed, after it was sent.
const ROUND_MAX: Duration = Duration::from_secs(20);
/// Longest time the guest stands still without LOADED (no arbiter).
const LOADED_MAX: Duration = Duration::from_secs(1);
/// Longest time from COMMIT to RUNNING before the source competes (arbiter).
const RUNNING_MAX: Duration = Duration::from_secs(1);
/// How long a source that has lost watches the record once the connection has ended, should the destination give the VM back there. A
/// network that was being changed is there again by then.
pub(super) const WATCH_MAX: Duration = Duration::from_secs(30);
/// How many times longer than here the digest of all memory may take at the destination: its memory is colder, its processor may
/// be slower.
const DIGEST_SLOWER: u32 = 4;

/// The limit of a phase; `None`: it has none. `digest` is what the source's own digest took, zero without.
pub(super) fn of(phase: Phase, arbiter: bool, digest: Duration) -> Option<Duration> {
    match phase {
        Phase::Hello | Phase::Describe => Some(PREPARE_MAX),
        Phase::PreCopy => Some(ROUND_MAX),
        Phase::Handing => Some(LOADED_MAX + digest * DIGEST_SLOWER),
        Phase::Committed if arbiter => Some(RUNNING_MAX + digest * DIGEST_SLOWER),
        Phase::Watching => Some(WATCH_MAX),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_of_large_memory_has_its_time() {
        let (none, long) = (Duration::ZERO, Duration::from_secs(30));
        assert_eq!(of(Phase::Handing, false, none), Some(LOADED_MAX));
        assert_eq!(of(Phase::Committed, true, none), Some(RUNNING_MAX));
        assert!(of(Phase::Handing, false, long).is_some_and(|limit| limit > long * 2));
        assert!(of(Phase::Committed, true, long).is_some_and(|limit| limit > long * 2));
        assert_eq!(of(Phase::PreCopy, true, long), Some(ROUND_MAX));
        assert_eq!(of(Phase::Committed, false, long), None, "the destination has the VM");
    }
}
