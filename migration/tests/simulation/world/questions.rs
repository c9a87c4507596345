//! Questions to the D-module and what its answers mean to whoever asked: hosts that compete, and the guest.
use super::*;

impl World {
    /// On a connection of its own: it may get lost, come late, and but for a guest's come twice.
    pub(super) fn ask(&mut self, asker: Asker, frame: Frame) -> u64 {
        self.count += 1;
        let connection = self.count;
        self.askers.insert(connection, asker);
        self.carry(connection, frame.clone());
        if self.faulty() && matches!(asker, Asker::Compete(..) | Asker::Parting) && self.random.one_in(4) {
            self.count += 1;
            self.askers.insert(self.count, asker);
            self.carry(self.count, frame);
        }
        connection
    }

    pub(super) fn carry(&mut self, connection: u64, frame: Frame) {
        if self.faulty() && self.random.one_in(8) {
            return;
        }
        let within = if self.faulty() && self.random.one_in(8) { 1_500_000 } else { 1_000 };
        self.later(within, Happening::Ask(connection, frame));
    }

    pub(super) fn answers(&mut self, out: Vec<(u64, Frame)>) {
        for (connection, frame) in out {
            if !(self.faulty() && self.random.one_in(8)) {
                self.later(1_000, Happening::Answer(connection, frame));
            }
        }
        if self.dmodule.writing.is_some() {
            self.later(3_000, Happening::Written(self.boot));
        }
    }

    pub(super) fn answered(&mut self, connection: u64, frame: Frame) {
        match (self.askers.get(&connection).copied(), frame) {
            (Some(Asker::Compete(side, expect)), Frame::OwnerCasResult { status, record }) => {
                if self.hosts[side as usize].competing.is_none_or(|(e, _)| e != expect) {
                    return;
                }
                let verdict = match status {
                    CasStatus::Won => Verdict::Won(Epoch(record.epoch.0)),
                    CasStatus::Lost => {
                        Verdict::Lost(Record { epoch: Epoch(record.epoch.0), owner: OwnerId(record.owner.0) })
                    }
                    CasStatus::Behind => Verdict::Behind(Epoch(record.epoch.0)),
                    // Asked again later.
                    CasStatus::Refused | CasStatus::Unknown => return,
                };
                self.host(side).competing = None;
                match side {
                    Side::Source => self.source_event(source::Event::Verdict { expected: Epoch(expect), verdict }),
                    Side::Destination => self.destination_event(destination::Event::Verdict(verdict)),
                }
            }
            (Some(Asker::Prepare), Frame::OwnerRecord(record))
                if self.hosts[1].alive && self.destination.phase() == destination::Phase::Preparing =>
            {
                let owner = Side::Destination.owner();
                self.destination_event(destination::Event::Prepared { owner, epoch: Epoch(record.epoch.0) });
            }
            (Some(Asker::Parting), Frame::OwnerCasResult { status, .. }) if status != CasStatus::Unknown => {
                self.hosts[1].parting = None;
            }
            (Some(Asker::Watch), Frame::OwnerRecord(record)) if self.hosts[0].alive => {
                let record = Record { epoch: Epoch(record.epoch.0), owner: OwnerId(record.owner.0) };
                self.source_event(source::Event::Seen(record));
            }
            (Some(Asker::Guest(side)), frame) if self.hosts[side as usize].cf == Some(connection) => {
                self.guest_hears(side, connection, frame);
            }
            _ => {}
        }
    }

    pub(super) fn guest_hears(&mut self, side: Side, connection: u64, frame: Frame) {
        let Some(mut guest) = self.hosts[side as usize].runs else { return };
        match frame {
            Frame::HelloAck(_) => {}
            Frame::Response { sequence, outcome, .. } if sequence == Sequence(guest.sequence) => {
                assert!(outcome.is_ok(), "{outcome:?}");
                guest.sequence += 1;
            }
            Frame::HelloRefused(Refusal::StaleEpoch { current }) => {
                panic!("a guest of epoch {} runs and is fenced by {}", guest.epoch, current.0)
            }
            // Begins anew when it has waited.
            _ => return,
        }
        let now = self.now;
        let host = self.host(side);
        (host.runs, host.asked_at) = (Some(guest), now);
        let dir = FileHandle { volume: VolumeId(0), generation: 0, inode: 1 };
        let name = format!("{}.{}", guest.epoch, guest.sequence).into_bytes();
        let op = Op::MakeDir { dir, name, set: SetAttr::default() };
        let request = Request { credential: Credential::ROOT, op };
        let (epoch, sequence) = (CfEpoch(guest.epoch), Sequence(guest.sequence));
        let frame = Frame::Request { epoch, slot: Slot(0), sequence, request };
        if !(self.faulty() && self.random.one_in(8)) {
            self.later(THINKS, Happening::Ask(connection, frame));
        }
    }

    pub(super) fn compete(&mut self, side: Side, expect: u64) {
        let now = self.now;
        self.host(side).competing = Some((expect, now));
        let owner = Owner(side.owner().0);
        self.ask(Asker::Compete(side, expect), Frame::OwnerCas { vm_id: VM, expect: CfEpoch(expect), owner });
    }

    /// The destination says this until it is answered.
    pub(super) fn part(&mut self, frame: Frame) {
        self.hosts[1].parting = Some((frame.clone(), self.now));
        self.ask(Asker::Parting, frame);
    }

    /// Those that are not answered once and for all.
    pub(super) fn ask_again(&mut self) {
        let due = |asked: u64| self.now - asked > ASK_AGAIN;
        if let Some((frame, asked)) = self.hosts[1].parting.clone()
            && due(asked)
        {
            return self.part(frame);
        }
        if self.hosts[0].alive && self.source.phase() == source::Phase::Watching && due(self.hosts[0].asked_at) {
            self.hosts[0].asked_at = self.now;
            self.ask(Asker::Watch, Frame::OwnerGet { vm_id: VM });
        }
    }

    pub(super) fn name(&mut self, side: Side, epoch: u64, heir: Owner) {
        let owner = Owner(side.owner().0);
        self.ask(Asker::Naming, Frame::OwnerReserve { vm_id: VM, epoch: CfEpoch(epoch), owner, heir });
    }
}

pub(super) fn cf_hello(epoch: u64, side: Side) -> Frame {
    Frame::Hello(CfHello {
        vm_id: VM,
        epoch: CfEpoch(epoch),
        owner: Owner(side.owner().0),
        nonce: 1,
        version_min: VERSION,
        version_max: VERSION,
        capabilities: 0,
    })
}
