//! What happens in this process, for those who watch it (`GET /v1/events`).
//!
//! Owns a bounded list of the last notices. Always true: to give a notice never waits for a reader and allocates no more than
//! the notice; a reader that is too slow learns how many it has missed; numbers grow by one. The list is the process's, as a
//! process is one VM: whoever has something to say calls [`publish`].

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::watch;

use crate::port::job::JobState;

/// Most notices remembered.
pub const REMEMBERED_MAX: usize = 256;
/// Longest text of a notice.
const TEXT_MAX: usize = 512;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Notice {
    /// The VM is in another state.
    State {
        /// As in `GET /v1/vm`.
        state: String,
        /// Why, where there is something to say.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A port got on.
    Migration {
        /// Its number.
        id: u64,
        /// How it stands.
        state: JobState,
        /// Phase of the protocol.
        phase: String,
        /// Current round.
        round: u32,
    },
    /// A checkpoint was begun, or is over.
    Checkpoint {
        /// Its directory.
        path: String,
        /// `running`, `completed` or `failed`.
        checkpoint: &'static str,
        /// Why it failed.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// Something about a device an operator should know.
    Device {
        /// Its id.
        device: String,
        /// What.
        detail: String,
    },
    /// The reader was too slow.
    Lost {
        /// How many notices it has missed.
        lost: u64,
    },
}

impl Notice {
    /// Its name in the stream.
    pub fn name(&self) -> &'static str {
        match self {
            Notice::State { .. } => "state",
            Notice::Migration { .. } => "migration",
            Notice::Checkpoint { .. } => "checkpoint",
            Notice::Device { .. } => "device",
            Notice::Lost { .. } => "lost",
        }
    }
}

/// A notice with its number and time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Number, from 1.
    pub id: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// What happened.
    pub notice: Notice,
}

#[derive(Debug)]
struct Bus {
    entries: Mutex<VecDeque<Entry>>,
    last: watch::Sender<u64>,
}

static BUS: OnceLock<Bus> = OnceLock::new();

fn bus() -> &'static Bus {
    BUS.get_or_init(|| Bus { entries: Mutex::new(VecDeque::new()), last: watch::Sender::new(0) })
}

fn entries() -> MutexGuard<'static, VecDeque<Entry>> {
    bus().entries.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a notice.
pub fn publish(notice: Notice) {
    let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    let mut entries = entries();
    let id = next(&entries);
    if entries.len() == REMEMBERED_MAX {
        entries.pop_front();
    }
    entries.push_back(Entry { id, time_ms, notice });
    bus().last.send_replace(id);
}

fn next(entries: &VecDeque<Entry>) -> u64 {
    entries.back().map_or(1, |e| e.id + 1)
}

/// The VM is in another state.
pub fn state(state: impl Into<String>, reason: Option<String>) {
    publish(Notice::State { state: state.into(), reason: reason.map(bounded) });
}

/// A checkpoint was begun, or is over.
pub fn checkpoint(path: &Path, state: &'static str, error: Option<String>) {
    let path = bounded(path.display().to_string());
    publish(Notice::Checkpoint { path, checkpoint: state, error: error.map(bounded) });
}

/// Something about a device that an operator should know: an I/O error, a back end that is gone. What happens often must be
/// bounded by the caller.
pub fn device(device: &str, detail: impl Into<String>) {
    publish(Notice::Device { device: device.to_owned(), detail: bounded(detail.into()) });
}

/// As [`device`], and in the log.
pub fn trouble(device: &str, detail: impl Into<String>) {
    let detail = detail.into();
    log::error!("{device}: {detail}");
    self::device(device, detail);
}

fn bounded(mut text: String) -> String {
    let mut end = TEXT_MAX.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Number of the last notice; 0: there was none.
pub fn last() -> u64 {
    next(&entries()) - 1
}

/// The first notice after `id`, or that some are lost.
pub fn after(id: u64) -> Option<Entry> {
    let entries = entries();
    let first = entries.front()?;
    if id + 1 < first.id {
        let lost = Notice::Lost { lost: first.id - 1 - id };
        return Some(Entry { id: first.id - 1, time_ms: first.time_ms, notice: lost });
    }
    entries.get(usize::try_from(id + 1 - first.id).ok()?).cloned()
}

/// Changes with every notice.
pub fn watch() -> watch::Receiver<u64> {
    bus().last.subscribe()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_learns_what_it_missed() {
        let start = last();
        for n in 0..REMEMBERED_MAX + 10 {
            device("disk9", n.to_string());
        }
        let first = after(start).unwrap();
        let Notice::Lost { lost } = first.notice else { panic!("{first:?}") };
        assert!(lost >= 10);
        let mut at = first.id;
        let mut seen = 0;
        while let Some(entry) = after(at) {
            assert_eq!(entry.id, at + 1);
            at = entry.id;
            seen += 1;
        }
        assert!(seen >= REMEMBERED_MAX);
        assert_eq!(after(u64::MAX - 1), None);
        device("disk9", "ü".repeat(TEXT_MAX));
        let Some(Entry { notice: Notice::Device { detail, .. }, .. }) = after(last() - 1) else { panic!() };
        assert!(detail.len() <= TEXT_MAX);
    }
}
