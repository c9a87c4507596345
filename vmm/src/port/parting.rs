//! The last word of a destination that will not run the VM, to the arbiter: said again until it is heard.
//!
//! Owns a thread for each word, with pauses between attempts that grow up to [`PAUSE_MAX`], for [`SAY_MAX`] at most. The destination waits for the
//! next VM meanwhile. A process that ends lets each word be said once more, and waits for that no longer than [`END_MAX`].
//!
//! Always true: **giving back** (a compare-and-swap from the epoch that was won, in the source's name) may be said at any time: it changes
//! only a record of that epoch, which nobody runs with. **Renouncing** must not be said any more once the same process may be the heir again: an
//! arbiter that was restarted in that port's pause would take it for that port's. So [`settle`] comes before READY.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::ownership::{Epoch, OwnerId};

use super::arbiter::{Arbiter, ArbiterError};
use super::faults;

/// How long a word is said again; a source that has lost watches the record for less.
const SAY_MAX: Duration = Duration::from_secs(600);
/// Pause behind the first attempt; behind each other one twice as long as before.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Longest time a process that ends, or the next port of the VM, waits: one attempt takes less.
const END_MAX: Duration = Duration::from_secs(2);
/// Most words at a time; another one is said in place of the oldest.
const WORDS_MAX: usize = 8;
/// Stack of the thread.
const THREAD_STACK: usize = 128 << 10;

/// What is said.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    /// At this epoch, by the heir: it does not have the VM and will not have it.
    Renounce(Epoch),
    /// This epoch was won, and is the source's again.
    GiveBack(Epoch, OwnerId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Going,
    /// One more attempt.
    Last,
    /// None any more.
    Stopped,
    Over,
}

#[derive(Debug)]
struct Parting {
    vm_id: u64,
    stage: Mutex<Stage>,
    changed: Condvar,
}

static PARTINGS: Mutex<Vec<Arc<Parting>>> = Mutex::new(Vec::new());

/// Says it in the background.
pub(super) fn say(arbiter: Arbiter, word: Word) {
    let parting =
        Arc::new(Parting { vm_id: arbiter.vm_id(), stage: Mutex::new(Stage::Going), changed: Condvar::new() });
    let mut partings = all();
    partings.retain(|p| *p.stage() != Stage::Over);
    if partings.len() >= WORDS_MAX {
        partings.remove(0).enter(Stage::Stopped);
    }
    partings.push(parting.clone());
    drop(partings);
    let thread = std::thread::Builder::new().name("parting".into()).stack_size(THREAD_STACK);
    let body = parting.clone();
    if let Err(e) = thread.spawn(move || body.run(arbiter, word)) {
        log::warn!("giving the VM up: {word:?} is not said: {e}");
        parting.enter(Stage::Over);
    }
}

/// What was to be said of this VM is said no more; false if that cannot be known yet.
pub(super) fn settle(vm_id: u64) -> bool {
    end(Stage::Stopped, |p| p.vm_id == vm_id)
}

/// The process ends: what has not been heard is said once more.
pub fn finish() {
    end(Stage::Last, |_| true);
}

fn all() -> MutexGuard<'static, Vec<Arc<Parting>>> {
    PARTINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end(stage: Stage, which: impl Fn(&Parting) -> bool) -> bool {
    let partings: Vec<_> = all().iter().filter(|p| which(p)).cloned().collect();
    let deadline = Instant::now() + END_MAX;
    partings.iter().for_each(|p| p.enter(stage));
    partings.iter().all(|p| p.is_over_by(deadline))
}

impl Parting {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stages only go forward.
    fn enter(&self, stage: Stage) {
        let mut now = self.stage();
        if (*now as u8) < stage as u8 {
            *now = stage;
            self.changed.notify_all();
        }
    }

    fn is_over_by(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let result = self.changed.wait_timeout_while(self.stage(), left, |stage| *stage != Stage::Over);
        *result.unwrap_or_else(PoisonError::into_inner).0 == Stage::Over
    }

    fn run(&self, mut arbiter: Arbiter, word: Word) {
        let deadline = Instant::now() + faults::limit(SAY_MAX);
        let mut pause = PAUSE_MIN;
        let mut told = false;
        loop {
            let stage = *self.stage();
            if stage == Stage::Stopped {
                break;
            }
            match word.say(&mut arbiter) {
                Ok(taken) => {
                    log::info!("VM {}: the arbiter has heard {word:?}; it takes it: {taken}", self.vm_id);
                    break;
                }
                Err(e) if stage == Stage::Last || Instant::now() >= deadline => {
                    log::warn!("VM {}: {word:?} is said no more: {e}", self.vm_id);
                    break;
                }
                Err(e) => {
                    if !std::mem::replace(&mut told, true) {
                        log::warn!("giving VM {} up: {e}; it is said again", self.vm_id);
                    }
                }
            }
            let wait = faults::limit(pause);
            pause = PAUSE_MAX.min(pause * 2);
            let waited = self.changed.wait_timeout_while(self.stage(), wait, |stage| *stage == Stage::Going);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        self.enter(Stage::Over);
    }
}

impl Word {
    /// Once. Whether it has changed anything, or had before; if not, the record has gone on, and it need not be said again.
    fn say(self, arbiter: &mut Arbiter) -> Result<bool, ArbiterError> {
        match self {
            Word::Renounce(epoch) => arbiter.name(epoch, None),
            Word::GiveBack(epoch, owner) => arbiter.give_back(epoch, owner),
        }
    }
}

#[cfg(test)]
mod tests;
