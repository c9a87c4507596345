//! What the drivers of both sides do when their machine tells them to, and how long it takes them.
use super::*;

impl World {
    pub(super) fn source_event(&mut self, event: source::Event) {
        self.strike();
        let before = self.source.phase();
        let actions = self.source.on_event(event);
        if self.source.phase() != before {
            self.hosts[0].phase_since = self.now;
        }
        for action in actions {
            self.source_action(action);
        }
    }

    /// Reports a step of the source, or its failure now and then.
    pub(super) fn source_step(&mut self, within: u64, event: source::Event) {
        let fails = self.faulty() && self.random.one_in(60);
        let event = if fails { source::Event::Failed(why(ReasonCode::State)) } else { event };
        self.later(within, Happening::Report(Side::Source, Box::new(Report::Source(event))));
    }

    pub(super) fn source_action(&mut self, action: source::Action) {
        use source::{Action as A, Event as E};
        match action {
            A::Send(message) => self.send(Side::Destination, Wire::Control(message)),
            A::StartDirtyLog => {
                if self.ownership == Ownership::Arbiter {
                    self.name(Side::Source, 1, Owner(Side::Destination.owner().0));
                }
            }
            A::SendRound { round } => {
                self.send(Side::Destination, Wire::Bulk(FrameType::Pages));
                self.send(Side::Destination, Wire::Control(Message::Round { round, pages: 1 }));
            }
            A::Throttle(_) => {}
            A::Measure => {
                let dirty_pages = if self.random.one_in(2) { 100_000 } else { 1 };
                let stats =
                    RoundStats { dirty_pages, sent_bytes: 1 << 30, elapsed_ns: 1 << 30, ..RoundStats::default() };
                self.source_step(100, E::Measured(stats));
            }
            A::Lull => {
                self.send(Side::Destination, Wire::Bulk(FrameType::Pages));
                self.source_step(300, E::Lulled);
            }
            A::Pause => {
                let host = &mut self.hosts[0];
                host.saved = host.runs.take().unwrap();
                self.source_step(200, E::Paused);
            }
            A::Collect => {
                let epoch = Epoch(self.hosts[0].saved.epoch);
                self.source_step(300, E::Collected(epoch));
            }
            A::SendFinal { commit } => {
                self.send(Side::Destination, Wire::Bulk(FrameType::Pages));
                self.send(Side::Destination, Wire::Bulk(FrameType::State));
                if let Some(epoch) = commit {
                    self.commit(epoch);
                }
            }
            A::SendCommit(epoch) => self.commit(epoch),
            A::Compete(epoch) => self.compete(Side::Source, epoch.0),
            // With the next tick.
            A::Watch => self.hosts[0].asked_at = 0,
            A::Resume(epoch) => {
                let host = &mut self.hosts[0];
                host.competing = None;
                if host.runs.is_none() {
                    let epoch = epoch.map_or(host.saved.epoch, |e| e.0);
                    (host.runs, host.cf) = (Some(Guest { epoch, ..host.saved }), None);
                }
            }
            A::Linger => self.later(500_000, Happening::Report(Side::Source, Box::new(Report::Source(E::LingerOver)))),
            A::Finish => {
                self.send(Side::Destination, Wire::Control(Message::Done { frames: 0 }));
                self.hang_up(Side::Source);
            }
            A::Close => self.hang_up(Side::Source),
            A::TearDown => {
                assert!(self.hosts[0].runs.is_none(), "destroys a VM that runs");
                self.hosts[0].competing = None;
            }
        }
    }

    /// The whole of COMMIT goes to the kernel, or the source knows that it did not.
    pub(super) fn commit(&mut self, epoch: Epoch) {
        if self.hosts[0].connected && self.up && !(self.faulty() && self.random.one_in(30)) {
            let message = Message::Commit { epoch, paused: Stamp::default() };
            return self.send(Side::Destination, Wire::Control(message));
        }
        self.hosts[0].connected = false;
        self.cut();
        self.source_event(source::Event::FinalNotSent(why(ReasonCode::Disconnected)));
    }

    /// This side closes; what it has sent arrives, and then the other hears of it.
    pub(super) fn hang_up(&mut self, side: Side) {
        self.host(side).connected = false;
        if std::mem::replace(&mut self.up, false) {
            let other = if side == Side::Source { Side::Destination } else { Side::Source };
            let at = self.last[other as usize].max(self.now) + 1;
            self.at(at, Happening::Lost(other));
        }
    }

    pub(super) fn destination_event(&mut self, event: destination::Event) {
        self.strike();
        let before = self.destination.phase();
        let actions = self.destination.on_event(event);
        if self.destination.phase() != before {
            self.hosts[1].phase_since = self.now;
        }
        for action in actions {
            self.destination_action(action);
        }
    }

    pub(super) fn destination_step(&mut self, within: u64, event: destination::Event) {
        let fails = self.faulty() && self.random.one_in(30);
        let event = if fails { destination::Event::Failed(why(ReasonCode::State)) } else { event };
        self.later(within, Happening::Report(Side::Destination, Box::new(Report::Destination(event))));
    }

    pub(super) fn destination_action(&mut self, action: destination::Action) {
        use destination::{Action as A, Event as E};
        match action {
            A::Send(message) => self.send(Side::Source, Wire::Control(message)),
            A::Prepare(_) if self.ownership == Ownership::Arbiter => {
                self.ask(Asker::Prepare, Frame::OwnerGet { vm_id: VM });
            }
            A::Prepare(_) => {
                let owner = Side::Destination.owner();
                self.destination_step(3_000, E::Prepared { owner, epoch: Epoch(0) });
            }
            A::RoundComplete | A::Spin => {}
            A::Load => {
                // What STATE holds is what the source's guest was when it stood still.
                self.hosts[1].saved = self.hosts[0].saved;
                self.destination_step(400, E::Loaded);
            }
            A::Compete(epoch) => self.compete(Side::Destination, epoch.0),
            A::Run(epoch) => {
                let host = &mut self.hosts[1];
                let epoch = epoch.map_or(host.saved.epoch, |e| e.0);
                (host.runs, host.cf) = (Some(Guest { epoch, ..host.saved }), None);
                let running = Message::Running { epoch: Epoch(epoch), entered: Stamp::default(), steps: [0; 4] };
                let entered = Report::Destination(E::Entered(running));
                self.later(200, Happening::Report(Side::Destination, Box::new(entered)));
            }
            A::GiveBack { epoch, owner } => {
                assert!(self.hosts[1].runs.is_none(), "gives back a VM that runs");
                self.part(Frame::OwnerCas { vm_id: VM, expect: CfEpoch(epoch.0), owner: Owner(owner.0) });
            }
            A::Destroy => {
                assert!(self.hosts[1].runs.is_none(), "destroys a VM that runs");
                self.hosts[1].competing = None;
                if self.ownership == Ownership::Arbiter && !self.destination.has_won() {
                    let owner = Owner(Side::Destination.owner().0);
                    self.part(Frame::OwnerReserve { vm_id: VM, epoch: CfEpoch(1), owner, heir: Owner::default() });
                }
            }
            A::Close => self.hang_up(Side::Destination),
        }
    }
}
