//! What the drivers of both sides do when their machine tells them to, and what may come of it.
use super::{DESTINATION, SOURCE, START, Side, State, Wire, why};
use migration::convergence::RoundStats;
use migration::destination;
use migration::message::{Message, ReasonCode, Stamp, feature};
use migration::ownership::Epoch;
use migration::source;
use migration::wire::FrameType;

/// A step a driver has been told to do and will report on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Task {
    Connect,
    SendRound(u32),
    Measure,
    Lull,
    Pause,
    Collect,
    SendFinal(Option<Epoch>),
    SendCommit(Epoch),
    /// Late frames, and among them the announcement: it may reach the source's tap at any time from COMMIT on.
    Forward,
    Linger,
    Prepare,
    Load,
    Start,
    Open,
}

impl State {
    pub(crate) fn source_event(&mut self, event: source::Event) {
        for action in self.source.on_event(event) {
            self.source_action(action);
        }
        if !self.watches() {
            self.shown = None;
        }
    }

    pub(crate) fn source_action(&mut self, action: source::Action) {
        use source::Action as A;
        match action {
            A::Send(message) => self.send_to_destination(Wire::Control(message)),
            A::StartDirtyLog => {}
            A::SendRound { round } => self.task(Side::Source, Task::SendRound(round)),
            // The model's guest is never slowed down: its policy gives up or pauses first.
            A::Throttle(_) => {}
            A::Measure => self.task(Side::Source, Task::Measure),
            A::Lull => self.task(Side::Source, Task::Lull),
            A::Pause => {
                self.source_runs = None;
                self.task(Side::Source, Task::Pause);
            }
            A::Collect => self.task(Side::Source, Task::Collect),
            A::SendFinal { commit } => self.task(Side::Source, Task::SendFinal(commit)),
            A::SendCommit(epoch) => self.task(Side::Source, Task::SendCommit(epoch)),
            A::Compete(epoch) => {
                self.competing.insert(Side::Source, epoch);
                self.requests.insert((Side::Source, epoch));
            }
            A::Watch => {}
            A::Resume(epoch) => {
                assert!(!self.torn_down, "resumes a destroyed VM");
                self.competing.remove(&Side::Source);
                self.resumes += 1;
                self.source_runs = Some(epoch.unwrap_or(START));
            }
            A::Linger => self.task(Side::Source, Task::Linger),
            A::Finish => {
                self.send_to_destination(Wire::Control(Message::Done { frames: 0 }));
                self.source_told = true;
                self.cut();
            }
            A::Close => {
                self.source_told = true;
                self.to_source.clear();
                self.cut();
            }
            A::TearDown => {
                assert!(self.source_runs.is_none(), "destroys a VM that runs");
                self.competing.remove(&Side::Source);
                self.torn_down = true;
            }
        }
    }

    pub(crate) fn destination_event(&mut self, event: destination::Event) {
        for action in self.destination.on_event(event) {
            self.destination_action(action);
        }
    }

    pub(crate) fn destination_action(&mut self, action: destination::Action) {
        use destination::Action as A;
        match action {
            A::Send(message) => {
                if self.up {
                    self.to_source.push_back(message);
                }
            }
            A::Prepare(_) => self.task(Side::Destination, Task::Prepare),
            A::RoundComplete | A::Spin => {}
            A::Load => self.task(Side::Destination, Task::Load),
            A::Compete(epoch) => {
                self.competing.insert(Side::Destination, epoch);
                self.requests.insert((Side::Destination, epoch));
            }
            A::Run(epoch) => {
                assert!(!self.destroyed, "runs a destroyed VM");
                self.competing.remove(&Side::Destination);
                self.runs += 1;
                // From here on the vCPU may have entered the guest; the report comes later.
                self.destination_runs = Some(epoch.unwrap_or(START));
                self.task(Side::Destination, Task::Start);
            }
            A::GiveBack { epoch, owner } => {
                assert_eq!((owner, self.destination_runs), (SOURCE, None));
                self.gives_back = Some(epoch);
            }
            A::Destroy => {
                self.renounces = self.heir && !self.destination.has_won();
                assert!(self.destination_runs.is_none(), "destroys a VM that runs");
                self.competing.remove(&Side::Destination);
                self.destroyed = true;
            }
            A::Close => {
                self.destination_told = true;
                self.to_destination.clear();
                self.cut();
            }
        }
    }

    pub(crate) fn task(&mut self, side: Side, task: Task) {
        self.tasks.insert((side, task));
    }

    pub(crate) fn send_to_destination(&mut self, wire: Wire) {
        if self.up {
            self.to_destination.push_back(wire);
        }
    }

    /// Carries out a driver step. `fails`: it reports a failure instead.
    pub(crate) fn perform(&mut self, side: Side, task: Task, outcome: Outcome) {
        use source::Event as S;
        self.tasks.remove(&(side, task));
        let failed = why(ReasonCode::State);
        match (task, outcome) {
            (Task::Connect, Outcome::Good) => self.source_event(S::Connected),
            (Task::SendRound(round), Outcome::Good) => {
                self.send_to_destination(Wire::Bulk(FrameType::Pages));
                self.send_to_destination(Wire::Control(Message::Round { round, pages: 1 }));
            }
            (Task::Measure, Outcome::Good | Outcome::Busy) => {
                let dirty_pages = if outcome == Outcome::Busy { 100_000 } else { 1 };
                let stats =
                    RoundStats { dirty_pages, sent_bytes: 1 << 30, elapsed_ns: 1 << 30, ..RoundStats::default() };
                self.source_event(S::Measured(stats));
            }
            (Task::Lull, Outcome::Good) => {
                self.send_to_destination(Wire::Bulk(FrameType::Pages));
                self.source_event(S::Lulled);
            }
            (Task::Pause, Outcome::Good) => self.source_event(S::Paused),
            (Task::Collect, Outcome::Good) => self.source_event(S::Collected(START)),
            (Task::SendFinal(_) | Task::SendCommit(_), Outcome::Bad) => {
                // A part may have left, but not the last byte of COMMIT.
                if matches!(task, Task::SendFinal(Some(_))) {
                    self.send_to_destination(Wire::Bulk(FrameType::State));
                }
                self.cut();
                self.source_event(S::FinalNotSent(failed));
            }
            (Task::SendFinal(commit), _) => {
                self.send_to_destination(Wire::Bulk(FrameType::Pages));
                self.send_to_destination(Wire::Bulk(FrameType::State));
                if let Some(epoch) = commit {
                    self.send_to_destination(Wire::Control(commit_message(epoch)));
                    self.task(Side::Source, Task::Forward);
                }
            }
            (Task::SendCommit(epoch), _) => {
                self.send_to_destination(Wire::Control(commit_message(epoch)));
                self.task(Side::Source, Task::Forward);
            }
            (Task::Forward, _) => {
                // The driver forwards only in these phases, and only while it has the connection.
                if self.source.past_no_return() && !self.source_told {
                    assert_eq!(self.source.features(), feature::OFFERED);
                    self.send_to_destination(Wire::Bulk(FrameType::Frames));
                    self.send_to_destination(Wire::Control(Message::Switched { device: 0 }));
                }
            }
            (Task::Linger, _) => self.source_event(S::LingerOver),
            (Task::Prepare, Outcome::Good) => {
                self.destination_event(destination::Event::Prepared { owner: DESTINATION, epoch: self.record.epoch })
            }
            (Task::Load, Outcome::Good) => self.destination_event(destination::Event::Loaded),
            (Task::Start, _) => {
                let epoch = self.destination_runs.unwrap_or_default();
                let running = Message::Running { epoch, entered: Stamp::default(), steps: [0; 4] };
                self.destination_event(destination::Event::Entered(running));
                self.task(Side::Destination, Task::Open);
            }
            (Task::Open, _) => {
                let opened = Message::Opened { switched: 1, late: 0, waited_ns: 0 };
                self.destination_event(destination::Event::Opened(opened));
            }
            (_, _) if side == Side::Source => self.source_event(S::Failed(failed)),
            _ => self.destination_event(destination::Event::Failed(failed)),
        }
    }
}

pub(crate) fn commit_message(epoch: Epoch) -> Message {
    Message::Commit { epoch, paused: Stamp::default() }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Good,
    Busy,
    Bad,
}

pub(crate) fn outcomes(task: Task) -> &'static [Outcome] {
    match task {
        Task::Connect | Task::Forward | Task::Linger | Task::Start | Task::Open => &[Outcome::Good],
        Task::Measure => &[Outcome::Good, Outcome::Busy, Outcome::Bad],
        _ => &[Outcome::Good, Outcome::Bad],
    }
}
