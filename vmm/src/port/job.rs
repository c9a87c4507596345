//! A port as the API sees it: progress, figures, cancel.
//!
//! Owns what is shared between the thread that drives a port and those that ask about it.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use schemars::JsonSchema;
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::{Error, Result, host};
use crate::notice::{self, Notice};

/// How a port stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Under way.
    #[default]
    Running,
    /// The VM runs at the destination.
    Completed,
    /// The VM runs here; `error` says why.
    Failed,
    /// The VM runs here because the operator said so.
    Cancelled,
    /// The VM is paused and nobody here can know whether it runs at the destination: see docs/migration-protocol.md.
    Unknown,
}

/// Where the blackout went, in microseconds. All but `transfer` are measured by the side that does the step; `transfer` is
/// what is left of the blackout: the network, and the time until the other side looked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Breakdown {
    /// Source, before the blackout: from the order to stop until the vCPU's last exit.
    pub stop_us: u64,
    /// Source: from the last exit until the port thread knew.
    pub pause_us: u64,
    /// Source: quieting the devices.
    pub quiesce_us: u64,
    /// Source: reading the state of vCPU and devices.
    pub state_us: u64,
    /// Source: writing out and unlocking the images of disks.
    pub disks_us: u64,
    /// Source: the last dirty bitmap.
    pub bitmap_us: u64,
    /// Source: copying and sealing the residue.
    pub pages_us: u64,
    /// Source: the last write.
    pub send_us: u64,
    /// What no step accounts for.
    pub transfer_us: u64,
    /// Destination: applying the residue.
    pub apply_us: u64,
    /// Destination: setting the state of vCPU and devices.
    pub load_us: u64,
    /// Destination: what the compare-and-swap took longer than the loading beside it.
    pub cas_us: u64,
    /// Destination: epoch, clock, frames, until the vCPU's first entry.
    pub run_us: u64,
}

/// One pre-copy round.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct RoundReport {
    /// Pages with content.
    pub raw_pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Pages not sent as they lie in receive buffers.
    pub posted_pages: u64,
    /// Pages not sent as the guest has no use for them.
    pub free_pages: u64,
    /// Until the destination confirmed.
    pub elapsed_us: u64,
    /// Dirty when it was over.
    pub dirty_pages: u64,
}

/// How long the destination held its own taps back, so that the guest got what the source forwarded first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct OrderReport {
    /// Devices opened in order: the announcement had reached the source's tap.
    pub switched: u32,
    /// Devices opened because that took too long.
    pub late: u32,
    /// From the announcement until the last was opened.
    pub waited_us: u64,
}

/// What became of the lull the guest was asked for before it was stopped: its clients were to have nothing under way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LullReport {
    /// The guest has said in time that it had come to one.
    pub answered: bool,
    /// How long it was waited for, while the guest ran.
    pub waited_us: u64,
}

/// Everything about a port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct JobStatus {
    /// Number of the port in this process.
    pub id: u64,
    /// Destination.
    pub to: String,
    /// How it stands.
    pub state: JobState,
    /// How far it is: the phase of the protocol.
    pub phase: String,
    /// Current pre-copy round.
    pub round: u32,
    /// Bytes sent.
    pub bytes: u64,
    /// Bytes sent while the VM stood still.
    pub residue_bytes: u64,
    /// Pages sent while the VM stood still.
    pub residue_pages: u64,
    /// Pages that had changed and were not sent then as they lie in receive buffers.
    pub residue_posted_pages: u64,
    /// Pages that had changed and were not sent then as the guest has no use for them.
    pub residue_free_pages: u64,
    /// Pages not sent in any round as they lie in receive buffers, each as often as it was due.
    pub posted_pages: u64,
    /// Pages not sent in any round as the guest has no use for them, each as often as it was due.
    pub free_pages: u64,
    /// Rounds so far.
    pub rounds: Vec<RoundReport>,
    /// How much the guest was slowed down, in percent of its time, as its memory changed faster than it could be sent.
    pub throttle_percent: u8,
    /// From the order to the end, in microseconds.
    pub total_us: u64,
    /// How long the arbiter took to make the destination's right to the VM durable, in microseconds; the guest ran meanwhile.
    pub heir_us: Option<u64>,
    /// Last exit of the last vCPU here to first entry there, in microseconds.
    pub blackout_us: Option<u64>,
    /// How long the guest stood still for a port that did not take place, in microseconds.
    pub paused_us: Option<u64>,
    /// Where it went.
    pub breakdown: Option<Breakdown>,
    /// Network frames forwarded to the destination.
    pub forwarded_frames: u64,
    /// Those of them that came after the announcement of the destination.
    pub stragglers: u64,
    /// How the guest's lull went, if it knows lulls.
    pub lull: Option<LullReport>,
    /// How the frames' order was kept, once the destination has told.
    pub order: Option<OrderReport>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A port of this process.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// Destination.
    pub to: SocketAddr,
    cancel: AtomicBool,
    resolve: Mutex<Option<bool>>,
    wake: EventFd,
    status: Mutex<JobStatus>,
}

impl Job {
    /// One that has not begun.
    pub fn new(id: u64, to: SocketAddr) -> Result<Job> {
        Ok(Job {
            id,
            to,
            cancel: AtomicBool::new(false),
            resolve: Mutex::new(None),
            wake: EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?,
            status: Mutex::new(JobStatus { id, to: to.to_string(), phase: "idle".into(), ..JobStatus::default() }),
        })
    }

    /// A copy of everything.
    pub fn status(&self) -> JobStatus {
        self.lock().clone()
    }

    /// Whether it is still under way (or in doubt, which is not over either).
    pub fn is_active(&self) -> bool {
        matches!(self.lock().state, JobState::Running | JobState::Unknown)
    }

    /// Asks for it to be stopped; it may be too late.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// Says who runs a VM in doubt. `true`: here.
    pub fn resolve(&self, here: bool) -> Result<()> {
        if self.lock().state != JobState::Unknown {
            return Err(Error::Conflict("the port is not in doubt".into()));
        }
        *self.resolve.lock().unwrap_or_else(PoisonError::into_inner) = Some(here);
        let _ = self.wake.write(1);
        Ok(())
    }

    pub(super) fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }

    /// Takes the operator's word, and the wake-up that came with it.
    pub(super) fn take_resolution(&self) -> Option<bool> {
        let _ = self.wake.read();
        self.resolve.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut JobStatus)) {
        let mut status = self.lock();
        let (state, round, phase) = (status.state, status.round, status.phase.clone());
        change(&mut status);
        if (state, round, phase.as_str()) != (status.state, status.round, status.phase.as_str()) {
            let (id, state, phase, round) = (status.id, status.state, status.phase.clone(), status.round);
            notice::publish(Notice::Migration { id, state, phase, round });
        }
    }

    fn lock(&self) -> MutexGuard<'_, JobStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Job {
    /// Readable when somebody wants something of the port.
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
