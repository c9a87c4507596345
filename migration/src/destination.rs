//! The destination of a port: rules, not I/O.
//!
//! Owns: in which phase the destination is and what may happen next. The driver feeds [`Event`]s in order and carries
//! out the [`Action`]s in order. PAGES, STATE and FRAMES reach the machine as [`Event::Bulk`] without their
//! content: it says whether they are due, the driver keeps what they carry.
//!
//! Always true:
//! - [`Action::Run`] is given at most once, only after a whole COMMIT, with the state loaded, and (where there is an
//!   arbiter) after its compare-and-swap was won.
//! - Nothing is allocated for the VM before HELLO has been accepted.
//! - Once it competes, it does not give up before it knows the arbiter's answer (from the arbiter, or from a source that
//!   has won): the answer may already be "won".
//! - [`Action::GiveBack`] and [`Action::Run`] exclude each other. What it asks for may arrive late and often: it only changes a record of
//!   the epoch that this side was given and has never run with, so nobody runs with it.
//!
//! Survives: loss of the connection in every phase, a source that stops, a step that fails, an arbiter that does not answer.
use crate::message::{Description, Hello, Message, Ownership, Reason, ReasonCode, VERSION_MAX, VERSION_MIN, feature};
use crate::ownership::{Epoch, OwnerId, Record, Verdict};
use crate::wire::FrameType;

/// How far it is. [`Phase::name`] is what the API shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Waits for HELLO.
    Hello,
    /// Waits for DESCRIBE.
    Describe,
    /// VM, memory, devices and the way to the arbiter are being made.
    Preparing,
    /// Memory arrives.
    Receiving,
    /// STATE is here and being loaded; COMMIT is not (without an arbiter only).
    Loading,
    /// Loaded, waits for COMMIT (without an arbiter only).
    Loaded,
    /// COMMIT is here: state is being loaded and the arbiter asked, side by side.
    Deciding,
    /// The VM is being started.
    Starting,
    /// The VM runs here; late frames may arrive.
    Running,
    /// The VM runs here and the source has gone. Final.
    Ended,
    /// The VM was not taken or is the source's again; this copy is destroyed. Final.
    Destroyed,
}

impl Phase {
    /// Name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Hello => "hello",
            Phase::Describe => "describe",
            Phase::Preparing => "preparing",
            Phase::Receiving => "receiving",
            Phase::Loading => "loading",
            Phase::Loaded => "loaded",
            Phase::Deciding => "deciding",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Ended => "ended",
            Phase::Destroyed => "destroyed",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A control message came.
    Message(Message),
    /// A PAGES, STATE or FRAMES frame came and its content was well-formed.
    Bulk(FrameType),
    /// Everything is made; the epoch of the ownership record (0 without an arbiter).
    Prepared {
        /// Own identity.
        owner: OwnerId,
        /// Epoch read.
        epoch: Epoch,
    },
    /// The state has been loaded.
    Loaded,
    /// A step of this side failed.
    Failed(Reason),
    /// The arbiter's answer to [`Action::Compete`].
    Verdict(Verdict),
    /// The arbiter gave no answer; the driver asks again later by itself.
    ArbiterSilent,
    /// The first vCPU has entered the guest; the message to tell the source with.
    Entered(Message),
    /// The guest gets frames from the taps here; the message to tell the source with. To be reported when it runs.
    Opened(Message),
    /// The connection is gone.
    Disconnected(Reason),
    /// The peer broke the protocol: handled as if the connection were gone.
    Broken(Reason),
    /// The phase took longer than the driver allows.
    Timeout,
    /// The operator wants the receiver to stop.
    Cancel,
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a control message.
    Send(Message),
    /// Make the VM, its memory and devices, and read the ownership record; report [`Event::Prepared`].
    Prepare(Description),
    /// A round is complete in guest memory: populate what is still untouched while the guest runs elsewhere.
    RoundComplete,
    /// State and residue follow at once: poll the connection instead of sleeping, for a bounded time.
    Spin,
    /// Load the sections kept from STATE; report [`Event::Loaded`].
    Load,
    /// Compare-and-swap at the arbiter with this expected epoch, until an answer comes.
    Compete(Epoch),
    /// Rewrite epoch and clock, inject late frames, start the vCPU, announce the addresses.
    Run(Option<Epoch>),
    /// Compare-and-swap at the arbiter from this epoch, which this side has won and will not run with, in the source's name; until it
    /// is answered or a bounded time is over. Nothing waits for it, and nothing is reported.
    GiveBack {
        /// The epoch that was won.
        epoch: Epoch,
        /// The source's identity, from HELLO.
        owner: OwnerId,
    },
    /// Free everything made for the VM.
    Destroy,
    /// Close the connection.
    Close,
}

/// The state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    phase: Phase,
    /// Most guest memory this host gives, in bytes.
    memory_max: u64,
    hello: Option<Hello>,
    /// A STATE frame came.
    state_here: bool,
    loaded: bool,
    /// The connection was lost while the VM was being started.
    alone: bool,
    won: Option<Epoch>,
    /// Why this side cannot run although it competes.
    failed: Option<Reason>,
    epoch: Epoch,
    reason: Option<Reason>,
}

impl Destination {
    /// Waits for a source; gives at most `memory_max` bytes to the guest.
    pub fn new(memory_max: u64) -> Destination {
        Destination {
            phase: Phase::Hello,
            memory_max,
            hello: None,
            state_here: false,
            loaded: false,
            alone: false,
            won: None,
            failed: None,
            epoch: Epoch(0),
            reason: None,
        }
    }

    /// Features both sides use, once agreed on.
    pub fn features(&self) -> u64 {
        self.hello.as_ref().map_or(0, |h| (h.offered | h.required) & feature::KNOWN)
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it failed, once it has.
    pub fn reason(&self) -> Option<&Reason> {
        self.reason.as_ref()
    }

    /// The source's HELLO, once accepted.
    pub fn hello(&self) -> Option<&Hello> {
        self.hello.as_ref()
    }

    /// The arbiter has said that the VM is this side's. An heir that gives it back then does not renounce: that would let the
    /// arbiter, should it have forgotten, give the epoch to a fresh start as well. It gives the epoch back ([`Action::GiveBack`]).
    pub fn has_won(&self) -> bool {
        self.won.is_some()
    }

    /// Takes an event; returns what to do, in order.
    pub fn on_event(&mut self, event: Event) -> Vec<Action> {
        use Phase as P;
        match (self.phase, event) {
            (P::Ended | P::Destroyed, _) => vec![],
            (P::Hello, Event::Message(Message::Hello(hello))) => self.greet(hello),
            (P::Describe, Event::Message(Message::Describe(description))) => self.describe(description),
            (P::Preparing, Event::Prepared { owner, epoch }) => self.prepared(owner, epoch),
            (P::Receiving, Event::Bulk(FrameType::Pages)) if !self.state_here => vec![],
            (P::Receiving, Event::Message(Message::Round { round, .. })) if !self.state_here => {
                vec![Action::RoundComplete, Action::Send(Message::RoundDone { round })]
            }
            (P::Receiving, Event::Message(Message::Pausing)) if !self.state_here => vec![Action::Spin],
            (P::Receiving, Event::Bulk(FrameType::State)) if !self.state_here => {
                self.state_here = true;
                if self.stream() {
                    self.phase = P::Loading;
                    return vec![Action::Load];
                }
                vec![]
            }
            (P::Receiving, Event::Message(Message::Commit { epoch, .. })) if self.state_here => {
                // Only an arbiter's VM gets here: the others leave Receiving with STATE.
                self.phase = P::Deciding;
                self.epoch = epoch;
                vec![Action::Compete(epoch), Action::Load]
            }
            (P::Loading, Event::Loaded) => {
                self.phase = P::Loaded;
                self.loaded = true;
                vec![Action::Send(Message::Loaded)]
            }
            (P::Loaded, Event::Message(Message::Commit { epoch, .. })) => {
                self.epoch = epoch;
                self.phase = P::Starting;
                vec![Action::Run(None)]
            }
            (P::Deciding, Event::Loaded) => {
                self.loaded = true;
                self.decide()
            }
            (P::Deciding, Event::Verdict(Verdict::Won(epoch))) => {
                self.won = Some(epoch);
                self.decide()
            }
            // No guest has run here yet that could have claimed anything.
            (P::Deciding, Event::Verdict(Verdict::Lost(Record { epoch, .. }) | Verdict::Behind(epoch))) => {
                let text = format!("the VM is owned elsewhere, at epoch {}", epoch.0);
                self.destroy(Reason::new(ReasonCode::NotOwner, text), self.epoch)
            }
            (P::Deciding, Event::Failed(reason)) => {
                self.failed.get_or_insert(reason);
                self.decide()
            }
            (P::Deciding, Event::Message(Message::Cancel(reason))) => {
                // The source says so only after it has won: the own compare-and-swap must lose.
                self.destroy(reason, self.epoch)
            }
            // The answer of the arbiter is what counts now; a lost source, impatience or an operator do not.
            (P::Deciding, _) => vec![],
            (P::Starting, Event::Entered(_)) if self.alone => {
                self.phase = P::Ended;
                vec![Action::Close]
            }
            (P::Starting, Event::Disconnected(_) | Event::Broken(_)) => {
                self.alone = true;
                vec![]
            }
            (P::Starting, Event::Entered(running)) => {
                self.phase = P::Running;
                vec![Action::Send(running)]
            }
            (P::Starting | P::Running, Event::Bulk(FrameType::Frames)) => vec![],
            // The driver holds the frames back; this side's answer is for the source's figures.
            (P::Running, Event::Opened(opened)) if self.features() & feature::ORDER != 0 => {
                vec![Action::Send(opened)]
            }
            (P::Running, Event::Message(Message::Done { .. }) | Event::Disconnected(_) | Event::Broken(_)) => {
                self.phase = P::Ended;
                vec![Action::Close]
            }
            (P::Running, Event::Timeout) => {
                self.phase = P::Ended;
                vec![Action::Close]
            }
            // The VM is this side's: nothing that happens to the connection changes that.
            (P::Starting | P::Running, _) => vec![],
            (P::Loaded | P::Loading | P::Receiving, Event::Bulk(FrameType::Frames)) if self.state_here => vec![],
            (_, Event::Message(Message::Cancel(reason))) => self.destroy(reason, Epoch(0)),
            (_, Event::Disconnected(reason) | Event::Broken(reason) | Event::Failed(reason)) => {
                self.destroy(reason, Epoch(0))
            }
            (_, Event::Timeout) => {
                let text = format!("the source was silent too long in phase {}", self.phase.name());
                self.destroy(Reason::new(ReasonCode::Timeout, text), Epoch(0))
            }
            (_, Event::Cancel) => {
                self.destroy(Reason::new(ReasonCode::Cancelled, "the receiver was stopped"), Epoch(0))
            }
            (_, Event::Message(message)) => self.unexpected(message.frame_type()),
            (_, Event::Bulk(frame_type)) => self.unexpected(frame_type),
            // Late reports of steps that no longer matter.
            _ => vec![],
        }
    }

    fn stream(&self) -> bool {
        self.hello.as_ref().is_some_and(|h| h.ownership == Ownership::Stream)
    }

    fn greet(&mut self, hello: Hello) -> Vec<Action> {
        let version = hello.max_version.min(VERSION_MAX);
        if version < hello.min_version.max(VERSION_MIN) || hello.min_version > hello.max_version {
            let text = format!(
                "the source speaks versions {} to {}, this host {VERSION_MIN} to {VERSION_MAX}",
                hello.min_version, hello.max_version
            );
            return self.refuse(Reason::new(ReasonCode::Version, text));
        }
        let missing = hello.required & !feature::KNOWN;
        if missing != 0 {
            return self.refuse(Reason::new(ReasonCode::Feature, format!("features {missing:#x} are not known here")));
        }
        if hello.memory_size > self.memory_max {
            let text = format!(
                "the guest has {} MiB of memory, this host gives at most {} MiB",
                hello.memory_size >> 20,
                self.memory_max >> 20
            );
            return self.refuse(Reason::new(ReasonCode::Memory, text));
        }
        if hello.ownership == Ownership::Arbiter && hello.epoch == Epoch(0) {
            // After a release, a late compare-and-swap from 0 would win as if it were the first.
            let text = "the VM has no ownership record yet: its source takes that first";
            return self.refuse(Reason::new(ReasonCode::NotOwner, text));
        }
        self.epoch = hello.epoch;
        self.hello = Some(hello);
        let features = self.features();
        self.phase = Phase::Describe;
        vec![Action::Send(Message::Welcome { version, features })]
    }

    fn describe(&mut self, description: Description) -> Vec<Action> {
        let promised = self.hello.as_ref().map_or(0, |h| h.memory_size);
        if description.memory_size != promised {
            let text = format!("HELLO said {promised} bytes of memory, DESCRIBE {}", description.memory_size);
            return self.refuse(Reason::new(ReasonCode::Protocol, text));
        }
        self.phase = Phase::Preparing;
        vec![Action::Prepare(description)]
    }

    fn prepared(&mut self, owner: OwnerId, epoch: Epoch) -> Vec<Action> {
        self.phase = Phase::Receiving;
        vec![Action::Send(Message::Ready { owner, epoch })]
    }

    /// Both answers are needed: that the state is good, and that the arbiter agrees.
    fn decide(&mut self) -> Vec<Action> {
        match (self.won, self.failed.clone()) {
            (None, _) => vec![],
            (Some(epoch), Some(reason)) => {
                let owner = self.hello.as_ref().map_or(OwnerId::default(), |h| h.owner);
                let mut actions = self.destroy(reason, epoch);
                // Behind ABORTED, which is the faster word where it arrives.
                actions.insert(1, Action::GiveBack { epoch, owner });
                actions
            }
            (Some(epoch), None) if self.loaded => {
                // The point of no return of this side: the VM is ours.
                self.phase = Phase::Starting;
                vec![Action::Run(Some(epoch))]
            }
            (Some(_), None) => vec![],
        }
    }

    fn refuse(&mut self, reason: Reason) -> Vec<Action> {
        self.reason = Some(reason.clone());
        self.phase = Phase::Destroyed;
        vec![Action::Send(Message::Refuse(reason)), Action::Destroy, Action::Close]
    }

    fn destroy(&mut self, reason: Reason, epoch: Epoch) -> Vec<Action> {
        if matches!(self.phase, Phase::Hello | Phase::Describe | Phase::Preparing) {
            return self.refuse(reason);
        }
        assert!(!matches!(self.phase, Phase::Starting | Phase::Running), "destroying a VM that runs here");
        self.reason = Some(reason.clone());
        self.phase = Phase::Destroyed;
        vec![Action::Send(Message::Aborted { reason, epoch }), Action::Destroy, Action::Close]
    }

    fn unexpected(&mut self, frame_type: FrameType) -> Vec<Action> {
        let text = format!("{} from the source in phase {}", frame_type.name(), self.phase.name());
        self.destroy(Reason::new(ReasonCode::Protocol, text), Epoch(0))
    }
}

#[cfg(test)]
mod tests;
