//! The source of a port: rules, not I/O.
//!
//! Owns: in which phase the source is and what may happen next. The driver feeds [`Event`]s in the order they
//! happen and carries out the [`Action`]s in the order given; it reports the outcome of each as another event.
//!
//! Always true:
//! - [`Action::Resume`] is given at most once, and never after the destination may run: before the point of no return
//!   ([`Source::past_no_return`]) it is free; after it, it needs a won compare-and-swap, or (without an arbiter) the
//!   destination's word that it will never run.
//! - [`Action::TearDown`] and [`Action::Resume`] exclude each other.
//! - A record that was only read, however old, never lets the guest run: it makes this side compete once more.
//!
//! Survives: loss of the connection, a destination that stops, a driver step that fails, a cancelling operator, an arbiter
//! that does not answer, a destination that has won, cannot run the VM and cannot say so here: in every phase the machine ends in
//! [`Phase::Resumed`], in [`Phase::Ended`], or stays
//! paused in [`Phase::Competing`] (arbiter: until it answers) or [`Phase::Unknown`] (no arbiter: until told).
mod terms;

use crate::convergence::{Decision, Policy, RoundStats, decide, helped};
use crate::message::{Description, Hello, Message, Ownership, Reason, ReasonCode};
use crate::ownership::{Epoch, Record, Verdict};
pub use terms::{Action, Event, Phase};

/// The state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    phase: Phase,
    hello: Hello,
    description: Description,
    policy: Policy,
    round: u32,
    /// Fewest dirty pages after a round, and rounds in a row that have not got below.
    least_dirty: u64,
    stuck: u32,
    /// How much the guest is slowed down, in percent of its time.
    throttle: u8,
    /// What to compete with; known once COMMIT is out.
    epoch: Epoch,
    connected: bool,
    /// Agreed on in WELCOME.
    features: u64,
    /// RUNNING came: the destination cannot give the VM back any more.
    runs_there: bool,
    reason: Option<Reason>,
}

impl Source {
    /// A port that has not begun.
    pub fn new(hello: Hello, description: Description, policy: Policy) -> Source {
        Source {
            phase: Phase::Idle,
            epoch: hello.epoch,
            hello,
            description,
            policy,
            round: 0,
            least_dirty: u64::MAX,
            stuck: 0,
            throttle: 0,
            connected: false,
            features: 0,
            runs_there: false,
            reason: None,
        }
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it failed, once it has.
    pub fn reason(&self) -> Option<&Reason> {
        self.reason.as_ref()
    }

    /// Current pre-copy round.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Features both sides use, once agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the destination may run already, so that this side must not resume of its own accord.
    pub fn past_no_return(&self) -> bool {
        matches!(
            self.phase,
            Phase::Committed | Phase::Competing | Phase::Unknown | Phase::Watching | Phase::Forwarding | Phase::Ended
        )
    }

    /// Takes an event; returns what to do, in order.
    pub fn on_event(&mut self, event: Event) -> Vec<Action> {
        use Phase as P;
        match (self.phase, event) {
            (P::Idle, Event::Connected) => {
                self.connected = true;
                self.phase = P::Hello;
                vec![Action::Send(Message::Hello(self.hello.clone()))]
            }
            (P::Hello, Event::Message(Message::Welcome { version, features })) => {
                let understood = (self.hello.min_version..=self.hello.max_version).contains(&version)
                    && features & !self.hello.offered & !self.hello.required == 0
                    && features & self.hello.required == self.hello.required;
                if !understood {
                    let text = format!("destination chose version {version} with features {features:#x}");
                    return self.abort(Reason::new(ReasonCode::Version, text));
                }
                self.features = features;
                self.phase = P::Describe;
                vec![Action::Send(Message::Describe(self.description.clone()))]
            }
            (P::Hello | P::Describe, Event::Message(Message::Refuse(reason))) => self.abort(reason),
            (P::Describe, Event::Message(Message::Ready { epoch, .. })) => {
                if self.hello.ownership == Ownership::Arbiter && epoch != self.hello.epoch {
                    let text = format!("the ownership record is at epoch {}, the guest at {}", epoch.0, self.epoch.0);
                    return self.abort(Reason::new(ReasonCode::NotOwner, text));
                }
                self.phase = P::PreCopy;
                vec![Action::StartDirtyLog, Action::SendRound { round: 0 }]
            }
            (P::PreCopy, Event::Message(Message::RoundDone { round })) if round == self.round => vec![Action::Measure],
            (P::PreCopy, Event::Measured(stats)) => self.measured(stats),
            (P::Lull, Event::Lulled) => {
                self.phase = P::Pausing;
                vec![Action::Send(Message::Pausing), Action::Pause]
            }
            (P::Pausing, Event::Paused) => {
                self.phase = P::Collecting;
                vec![Action::Collect]
            }
            (P::Collecting, Event::Collected(epoch)) => self.collected(epoch),
            (P::Handing, Event::Message(Message::Loaded)) => {
                // The point of no return: from here the destination may run.
                self.phase = P::Committed;
                vec![Action::SendCommit(self.epoch)]
            }
            (P::Handing | P::Committed, Event::FinalNotSent(reason)) => {
                // Without a whole COMMIT the destination neither competes nor runs, whatever else it has got.
                self.phase = P::Collecting;
                self.connected = false;
                self.abort(reason)
            }
            (P::Committed | P::Competing, Event::Message(Message::Running { .. })) => {
                self.phase = P::Forwarding;
                self.runs_there = true;
                vec![Action::Linger]
            }
            (P::Committed | P::Competing, Event::Message(Message::Aborted { reason, epoch })) => {
                self.aborted(reason, epoch)
            }
            (P::Forwarding, Event::Message(Message::Running { .. })) if !self.runs_there => {
                self.runs_there = true;
                vec![Action::Linger]
            }
            (P::Forwarding, Event::Message(Message::Aborted { reason, epoch }))
                if !self.runs_there && epoch == self.epoch.next() =>
            {
                // This side had lost to a destination that then failed and gives the VM back.
                self.aborted(reason, epoch)
            }
            // Figures only; the driver has taken them.
            (P::Forwarding, Event::Message(Message::Opened { .. })) => vec![],
            (P::Handing, Event::Message(Message::Aborted { reason, .. })) => self.abort(reason),
            (P::Competing, Event::Verdict { expected, verdict }) if expected == self.epoch => self.decided(verdict),
            (P::Competing, Event::ArbiterSilent) => vec![],
            (P::Watching, Event::Seen(record)) => self.seen(record),
            (P::Watching, Event::Timeout) => self.tear_down(),
            (P::Committed, Event::Timeout | Event::Cancel) if self.hello.ownership == Ownership::Arbiter => {
                self.note(Reason::new(ReasonCode::Timeout, "no word from the destination after the hand-over"));
                self.phase = P::Competing;
                vec![Action::Compete(self.epoch)]
            }
            (P::Unknown, Event::Resolve(here)) => {
                if here {
                    self.phase = P::Resumed;
                    vec![Action::Close, Action::Resume(None)]
                } else {
                    self.phase = P::Ended;
                    vec![Action::Close, Action::TearDown]
                }
            }
            // Until the destination is heard of it may still give the VM back, and this is the only copy then.
            (P::Forwarding, Event::LingerOver | Event::Timeout | Event::Cancel) if self.runs_there => {
                [vec![Action::Finish], self.tear_down()].concat()
            }
            (_, Event::Disconnected(reason) | Event::Broken(reason)) => self.lost_connection(reason),
            (_, Event::Message(message)) => self.unexpected(&message),
            (_, Event::Cancel) if !self.past_no_return() => {
                self.abort(Reason::new(ReasonCode::Cancelled, "cancelled by the operator"))
            }
            (_, Event::Timeout) if !self.past_no_return() => {
                let text = format!("the destination did not answer in time in phase {}", self.phase.name());
                self.abort(Reason::new(ReasonCode::Timeout, text))
            }
            (_, Event::Failed(reason)) if !self.past_no_return() => self.abort(reason),
            // Late reports of steps that no longer matter, cancelling after the point of no return, …
            _ => vec![],
        }
    }

    fn measured(&mut self, mut stats: RoundStats) -> Vec<Action> {
        stats.round = self.round;
        self.stuck = if helped(stats.dirty_pages, self.least_dirty) { 0 } else { self.stuck + 1 };
        self.least_dirty = self.least_dirty.min(stats.dirty_pages);
        stats.stuck = self.stuck;
        stats.throttle = self.throttle;
        match decide(&self.policy, &stats) {
            Decision::Round => {
                self.round += 1;
                vec![Action::SendRound { round: self.round }]
            }
            Decision::Throttle(percent) => {
                self.throttle = percent;
                self.stuck = 0;
                self.round += 1;
                vec![Action::Throttle(percent), Action::SendRound { round: self.round }]
            }
            Decision::Pause => {
                self.phase = Phase::Lull;
                vec![Action::Lull]
            }
            Decision::GiveUp(estimate) => {
                let slowed = match (self.throttle, self.policy.throttle_max) {
                    (0, 0) => "; it may not be slowed down".to_owned(),
                    (0, _) => String::new(),
                    (now, _) => format!(" although the guest was slowed down by {now} %"),
                };
                let text = format!(
                    "after {} rounds {} pages are dirty{slowed}: the blackout would be {} ms, the limit is {} ms",
                    self.round + 1,
                    stats.dirty_pages,
                    estimate / 1_000_000,
                    self.policy.limit_ns / 1_000_000
                );
                self.abort(Reason::new(ReasonCode::NotConverging, text))
            }
        }
    }

    fn collected(&mut self, epoch: Epoch) -> Vec<Action> {
        self.epoch = epoch;
        match self.hello.ownership {
            Ownership::Arbiter if epoch != self.hello.epoch => {
                let text = format!("the guest's epoch changed from {} to {}", self.hello.epoch.0, epoch.0);
                self.abort(Reason::new(ReasonCode::NotOwner, text))
            }
            Ownership::Arbiter => {
                // The point of no return: from here the destination may win and run.
                self.phase = Phase::Committed;
                vec![Action::SendFinal { commit: Some(epoch) }]
            }
            Ownership::Stream => {
                self.phase = Phase::Handing;
                vec![Action::SendFinal { commit: None }]
            }
        }
    }

    /// The destination will never run. With an arbiter its record still has to say so.
    fn aborted(&mut self, reason: Reason, epoch: Epoch) -> Vec<Action> {
        self.note(reason);
        match self.hello.ownership {
            Ownership::Stream => {
                self.phase = Phase::Resumed;
                vec![Action::Close, Action::Resume(None)]
            }
            Ownership::Arbiter => {
                // A destination that had won before it failed gives the next epoch to compete with.
                let given_back = epoch == self.epoch.next();
                let competing = core::mem::replace(&mut self.phase, Phase::Competing) == Phase::Competing;
                if given_back {
                    self.epoch = epoch;
                }
                if competing && !given_back { vec![] } else { vec![Action::Compete(self.epoch)] }
            }
        }
    }

    fn decided(&mut self, verdict: Verdict) -> Vec<Action> {
        match verdict {
            Verdict::Won(epoch) => {
                self.phase = Phase::Resumed;
                let reason = self.reason.clone().unwrap_or(Reason::new(ReasonCode::Cancelled, "taken back"));
                let mut actions = self.goodbye(reason);
                actions.push(Action::Resume(Some(epoch)));
                actions
            }
            Verdict::Behind(epoch) => {
                // Nobody else was given what is behind this epoch, and nobody is any more: all who compete start from an earlier one.
                self.epoch = epoch;
                vec![Action::Compete(epoch)]
            }
            Verdict::Lost(record) if self.is_given_back(record) => self.take_given_back(),
            Verdict::Lost(_) if self.connected => {
                self.phase = Phase::Forwarding;
                vec![]
            }
            Verdict::Lost(_) => self.watch(),
        }
    }

    /// The destination, which had won, has put this side into the record behind itself.
    fn is_given_back(&self, record: Record) -> bool {
        record.owner == self.hello.owner && record.epoch == self.epoch.next().next()
    }

    /// What was read may be old, or a claim's doing: the arbiter says whether it holds. Asked by its owner it changes nothing.
    fn take_given_back(&mut self) -> Vec<Action> {
        self.epoch = self.epoch.next();
        self.phase = Phase::Competing;
        vec![Action::Compete(self.epoch)]
    }

    fn watch(&mut self) -> Vec<Action> {
        self.phase = Phase::Watching;
        vec![Action::Watch]
    }

    fn seen(&mut self, record: Record) -> Vec<Action> {
        if self.is_given_back(record) {
            return self.take_given_back();
        }
        // An older one is what an arbiter that was restarted has forgotten the destination's epoch from.
        if (1..=self.epoch.next().0).contains(&record.epoch.0) {
            return vec![];
        }
        // Started afresh, handed on, or released: the destination had it, and gives nothing back any more.
        self.tear_down()
    }

    fn tear_down(&mut self) -> Vec<Action> {
        self.phase = Phase::Ended;
        vec![Action::TearDown]
    }

    fn lost_connection(&mut self, reason: Reason) -> Vec<Action> {
        self.connected = false;
        match (self.phase, self.hello.ownership) {
            (Phase::Committed, Ownership::Arbiter) => {
                self.note(reason);
                self.phase = Phase::Competing;
                vec![Action::Close, Action::Compete(self.epoch)]
            }
            (Phase::Committed, Ownership::Stream) => {
                self.note(reason);
                self.phase = Phase::Unknown;
                vec![Action::Close]
            }
            (Phase::Forwarding, _) => {
                self.note(reason);
                let last = if self.runs_there { self.tear_down() } else { self.watch() };
                [vec![Action::Close], last].concat()
            }
            (Phase::Competing | Phase::Unknown | Phase::Watching, _) => vec![Action::Close],
            (Phase::Resumed | Phase::Ended, _) => vec![],
            _ => self.abort(reason),
        }
    }

    fn unexpected(&mut self, message: &Message) -> Vec<Action> {
        if self.phase.is_final() || self.phase == Phase::Forwarding {
            return vec![];
        }
        if let Message::Aborted { reason, .. } | Message::Refuse(reason) = message {
            // The destination gives up: before the point of no return its reason is the one to show.
            if !self.past_no_return() {
                return self.abort(reason.clone());
            }
        }
        let text = format!("{} from the destination in phase {}", message.frame_type().name(), self.phase.name());
        self.lost_connection(Reason::new(ReasonCode::Protocol, text))
    }

    /// Ends a port before the point of no return: the guest goes on as if nothing had happened.
    fn abort(&mut self, reason: Reason) -> Vec<Action> {
        assert!(!self.past_no_return(), "abort behind the point of no return");
        if self.phase == Phase::Resumed {
            return vec![];
        }
        self.note(reason.clone());
        self.phase = Phase::Resumed;
        let mut actions = self.goodbye(reason);
        actions.push(Action::Resume(None));
        actions
    }

    /// Tells the destination, as far as it can be reached.
    fn goodbye(&mut self, reason: Reason) -> Vec<Action> {
        if core::mem::replace(&mut self.connected, false) {
            vec![Action::Send(Message::Cancel(reason)), Action::Close]
        } else {
            vec![Action::Close]
        }
    }

    /// Keeps the first reason: what follows from it is not news.
    fn note(&mut self, reason: Reason) {
        self.reason.get_or_insert(reason);
    }
}

#[cfg(test)]
mod tests;
