//! What the machine of the source speaks of: its phases, what can happen, what is to be done.
use crate::convergence::RoundStats;
use crate::message::{Message, Reason};
use crate::ownership::{Epoch, Record, Verdict};

/// How far the port is. [`Phase::name`] is what the API shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not begun.
    Idle,
    /// HELLO sent.
    Hello,
    /// DESCRIBE sent.
    Describe,
    /// Memory is copied while the guest runs.
    PreCopy,
    /// The guest is to let as little as possible be under way to it.
    Lull,
    /// The guest is being paused.
    Pausing,
    /// Paused; state and residue are being collected.
    Collecting,
    /// Paused; all is sent but COMMIT (without an arbiter only).
    Handing,
    /// COMMIT is out: the point of no return is behind.
    Committed,
    /// Competing at the arbiter to take the VM back.
    Competing,
    /// Nobody can tell who runs: without an arbiter, the connection was lost behind COMMIT. Paused until told.
    Unknown,
    /// Somebody else has won, and the connection has ended without RUNNING: the record is read for a bounded time, as the
    /// destination gives the VM back there if it cannot run it.
    Watching,
    /// The destination runs; late network frames are forwarded.
    Forwarding,
    /// The guest runs here, the port is off. Final.
    Resumed,
    /// The destination owns the VM; this copy is destroyed. Final.
    Ended,
}

impl Phase {
    /// Name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Hello => "hello",
            Phase::Describe => "describe",
            Phase::PreCopy => "pre-copy",
            Phase::Lull => "lull",
            Phase::Pausing => "pausing",
            Phase::Collecting => "collecting",
            Phase::Handing => "handing-over",
            Phase::Committed => "committed",
            Phase::Competing => "competing",
            Phase::Unknown => "unknown",
            Phase::Watching => "watching",
            Phase::Forwarding => "forwarding",
            Phase::Resumed => "resumed",
            Phase::Ended => "ended",
        }
    }

    /// Nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Resumed | Phase::Ended)
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The connection stands.
    Connected,
    /// A control message came.
    Message(Message),
    /// The measurements asked for with [`Action::Measure`].
    Measured(RoundStats),
    /// The guest has come to a lull, or does not know what that is, or was waited for long enough, after [`Action::Lull`].
    Lulled,
    /// The vCPUs stand still and the devices are quiet, after [`Action::Pause`].
    Paused,
    /// State and residue are in memory, after [`Action::Collect`]; the epoch in the guest's boot-info page.
    Collected(Epoch),
    /// The last byte of the COMMIT frame was certainly not given to the connection.
    FinalNotSent(Reason),
    /// The arbiter's answer to [`Action::Compete`].
    Verdict {
        /// What was competed with.
        expected: Epoch,
        /// The answer.
        verdict: Verdict,
    },
    /// The arbiter gave no answer; the driver asks again later by itself.
    ArbiterSilent,
    /// The record as the arbiter has it, after [`Action::Watch`]; of epoch 0: there is none.
    Seen(Record),
    /// A step of this side failed (dirty log, pause, saving state).
    Failed(Reason),
    /// The connection is gone.
    Disconnected(Reason),
    /// The peer broke the protocol: handled as if the connection were gone.
    Broken(Reason),
    /// The phase took longer than the driver allows.
    Timeout,
    /// The operator wants the port to stop.
    Cancel,
    /// In [`Phase::Unknown`], the operator says who runs. `true`: here.
    Resolve(bool),
    /// The time for forwarding late frames is over.
    LingerOver,
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a control message.
    Send(Message),
    /// Begin to log writes to guest memory.
    StartDirtyLog,
    /// Send all memory (`round` 0) or what the log says, then ROUND.
    SendRound {
        /// Number.
        round: u32,
    },
    /// Let the guest stand still for so many percent of its time, until [`Action::Pause`] or [`Action::Resume`].
    Throttle(u8),
    /// Count dirty pages without clearing the log and report [`Event::Measured`].
    Measure,
    /// Ask the guest to keep its clients waiting, wait for it for a bounded time, and send what it has written since if it does now write little.
    Lull,
    /// Stop feeding receive queues, stop the vCPUs, quiesce the devices.
    Pause,
    /// Device state first, then the last dirty bitmap.
    Collect,
    /// Send residue and state, with COMMIT behind them if `commit`, in one write.
    SendFinal {
        /// COMMIT with this epoch.
        commit: Option<Epoch>,
    },
    /// Send COMMIT.
    SendCommit(Epoch),
    /// Compare-and-swap at the arbiter with this expected epoch and the own owner id, until an answer comes.
    Compete(Epoch),
    /// Read the record at the arbiter again and again, with pauses, and report each answer as [`Event::Seen`], as long as the phase
    /// is [`Phase::Watching`]; [`Event::Timeout`] when that has taken long enough.
    Watch,
    /// Stop the dirty log and let the guest run, with the new epoch if there is one.
    Resume(Option<Epoch>),
    /// Report [`Event::LingerOver`] after the linger; late frames are forwarded until then.
    Linger,
    /// Send DONE, close the connection.
    Finish,
    /// Close the connection.
    Close,
    /// The VM is no longer this process's: destroy it.
    TearDown,
}
