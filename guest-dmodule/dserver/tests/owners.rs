//! Ownership of many VMs over a disk that loses unflushed writes, from seeds: claimed, taken over with and without an heir,
//! released, while the D-module is killed again and again and its journal fills up. What must hold:
//!
//! - no epoch of a VM is ever given to two owners, whatever is forgotten or released;
//! - what was told holds after a crash: the record is there, at no earlier epoch (a hand-over to an heir may be forgotten);
//! - what was released stays so.
#![allow(clippy::unwrap_used)] // helpers of tests too
mod sim;
use dserver::{Now, Output, Server};
use fabric::fs::Time;
use fabric::id::{Epoch, Owner, VmId};
use fabric::owner::OwnerRecord;
use fabric::server::ConnectionId;
use fabric::wire::{CLAIM, CasStatus, Frame, FrameReader, Hello, Refusal};
use sim::{Random, SimDisk, Transfers, start};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

/// More than the journal has room for.
const VMS: u64 = 150;

/// What was asked last for a VM.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Claim(Owner),
    Take(Owner),
    Name(Owner),
    Release,
    Record,
}

fn claim(vm_id: VmId, epoch: Epoch, owner: Owner) -> Frame {
    let (version_min, version_max, capabilities) = (1, 1, CLAIM);
    Frame::Hello(Hello { vm_id, epoch, owner, nonce: 1, version_min, version_max, capabilities })
}

/// What is known of a VM from what was told.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// It has this record at least; none: it has none, or none that was told.
    record: Option<OwnerRecord>,
    heir: Option<Owner>,
    /// The heir was told that it has the VM, and the record, which was forgotten, does not say so: the owner, which has handed it
    /// over, says nothing more.
    handed: bool,
    /// The record was given to an heir, which may be forgotten until it is seen again.
    granted: bool,
    /// A change that was asked for may have happened or not.
    unsure: bool,
}

struct World {
    random: Random,
    disk: RefCell<SimDisk>,
    server: Server,
    io: Transfers,
    clock: u64,
    boots: u64,
    connections: u64,
    asked: BTreeMap<ConnectionId, (VmId, Asked)>,
    known: HashMap<VmId, Known>,
    /// Who was told that it has the epoch.
    given: HashMap<(VmId, Epoch), Owner>,
    counts: BTreeMap<&'static str, u64>,
    /// A claim that was refused: it is said again, from the epoch that was told.
    again: Option<(VmId, Owner, Epoch)>,
}

impl World {
    fn new(seed: u64) -> World {
        let disk = RefCell::default();
        let server = start(&disk, 1);
        World {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            disk,
            server,
            io: Transfers::default(),
            clock: 0,
            boots: 1,
            connections: 0,
            asked: BTreeMap::new(),
            known: HashMap::new(),
            given: HashMap::new(),
            counts: BTreeMap::new(),
            again: None,
        }
    }

    fn now(&mut self) -> Now {
        self.clock += 3_000_000;
        Now { mono_ns: self.clock, real: Time(self.clock as i64) }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Asks something sensible for a VM nobody asks for at present.
    fn ask(&mut self) {
        let vm_id = VmId(1 + self.random.below(VMS as usize) as u64);
        if self.asked.values().any(|(vm, _)| *vm == vm_id) {
            return;
        }
        let known = self.known.get(&vm_id).copied().unwrap_or_default();
        let new = Owner([self.random.next() | 1, vm_id.0]);
        let asked = match (known.record, self.random.below(12)) {
            _ if known.unsure => Asked::Record,
            (Some(_), 2..=7) if known.handed => Asked::Take(known.heir.unwrap_or(new)),
            (Some(_), 2..) if known.handed => Asked::Record,
            (None, 0..3) => Asked::Take(new),
            (None, _) | (_, 0..2) => Asked::Claim(new),
            (Some(_), 2) => Asked::Take(new),
            (Some(_), 3..=4) => Asked::Take(known.heir.unwrap_or(new)),
            (Some(_), 5..=7) => Asked::Name(new),
            (Some(_), 8..=10) => Asked::Release,
            _ => Asked::Record,
        };
        let record = known.record.unwrap_or_default();
        let (epoch, owner) = (record.epoch, record.owner);
        let frame = match asked {
            Asked::Claim(owner) => claim(vm_id, epoch, owner),
            Asked::Take(owner) => Frame::OwnerCas { vm_id, expect: epoch, owner },
            Asked::Name(heir) => Frame::OwnerReserve { vm_id, epoch, owner, heir },
            Asked::Release => Frame::OwnerRelease { vm_id, epoch, owner },
            Asked::Record => Frame::OwnerGet { vm_id },
        };
        self.say(vm_id, asked, frame);
    }

    fn say(&mut self, vm_id: VmId, asked: Asked, frame: Frame) {
        self.connections += 1;
        let connection = ConnectionId(self.connections);
        self.asked.insert(connection, (vm_id, asked));
        let now = self.now();
        self.server.frame(connection, frame, now);
    }

    fn outputs(&mut self) {
        while let Some(output) = self.server.poll_output() {
            match self.io.begin(output) {
                Some(Output::Send(connection, frame)) => {
                    let frame = FrameReader::new().push(&mut &frame.into_vec()[..]).unwrap().unwrap();
                    if let Some((vm_id, asked)) = self.asked.remove(&connection) {
                        self.told(vm_id, asked, frame);
                        let now = self.now();
                        self.server.closed(connection, now);
                        if let Some((vm_id, owner, from)) = self.again.take() {
                            self.say(vm_id, Asked::Claim(owner), claim(vm_id, from, owner));
                        }
                    }
                }
                Some(Output::Close(_)) | None => {}
                Some(other) => panic!("{other:?}"),
            }
        }
    }

    fn told(&mut self, vm_id: VmId, asked: Asked, frame: Frame) {
        let mut known = self.known.get(&vm_id).copied().unwrap_or_default();
        match (asked, frame) {
            (Asked::Claim(owner), Frame::HelloAck(ack)) => {
                let record = OwnerRecord { vm_id, epoch: ack.epoch, session: ack.epoch, owner };
                self.give(record);
                known = Known { record: Some(record), ..Known::default() };
                self.count("claimed");
            }
            (Asked::Claim(owner), Frame::HelloRefused(Refusal::StaleEpoch { current })) => {
                self.again = Some((vm_id, owner, current));
                self.count("claimed from another epoch");
            }
            (Asked::Take(owner), Frame::OwnerCasResult { status: CasStatus::Won, record }) => {
                assert_eq!(record.owner, owner);
                self.give(record);
                let granted = known.heir == Some(owner);
                known = Known { record: Some(record), granted, ..Known::default() };
                self.count(if granted { "handed over" } else { "taken" });
            }
            (Asked::Name(heir), Frame::OwnerCasResult { status: CasStatus::Won, .. }) => {
                known.heir = Some(heir);
                self.count("named");
            }
            (Asked::Name(_), Frame::OwnerCasResult { status: CasStatus::Refused, .. }) => self.count("too many heirs"),
            (Asked::Release, Frame::OwnerCasResult { status: CasStatus::Won, record }) => {
                assert_eq!(record, OwnerRecord { vm_id, ..OwnerRecord::default() });
                known = Known::default();
                self.count("released");
            }
            // What was given to an heir may have been forgotten, or the heir named before a restart may have it.
            (_, Frame::OwnerCasResult { status: CasStatus::Unknown | CasStatus::Lost, .. })
            | (_, Frame::HelloRefused(Refusal::Full | Refusal::Storage)) => known.unsure = true,
            (Asked::Record, Frame::OwnerRecord(record)) => {
                self.seen(known, record);
                let found = Some(record).filter(|r| r.epoch > Epoch(0));
                let forgotten =
                    known.record.filter(|told| known.granted && (1..told.epoch.0).contains(&record.epoch.0));
                known = match forgotten {
                    Some(told) => Known { record: found, heir: Some(told.owner), handed: true, ..Known::default() },
                    None if found == known.record => Known { unsure: false, ..known },
                    None => Known { record: found, ..Known::default() },
                };
                self.count("seen");
            }
            (asked, frame) => panic!("{asked:?} of {known:?}: {frame:?}"),
        }
        self.known.insert(vm_id, known);
    }

    /// Somebody is told that it has an epoch: nobody else ever was.
    fn give(&mut self, record: OwnerRecord) {
        let former = self.given.insert((record.vm_id, record.epoch), record.owner);
        assert!(former.is_none_or(|owner| owner == record.owner), "{record:?} was given to {former:?}");
    }

    /// A record as it is found fits what was told.
    fn seen(&self, known: Known, found: OwnerRecord) {
        let Some(told) = known.record else {
            assert!(known.unsure || found.epoch == Epoch(0), "{found:?} of a VM without a record");
            return;
        };
        let least = told.epoch.0 - u64::from(known.granted);
        let released = known.unsure && found.epoch == Epoch(0);
        assert!(released || found.epoch.0 >= least, "{told:?} was told, {found:?} is found ({known:?})");
        assert!(known.unsure || known.granted || found == told, "{told:?} was told, {found:?} is found");
    }

    fn crash(&mut self) {
        self.disk.borrow_mut().crash(&mut self.random);
        self.io = Transfers::default();
        self.boots += 1;
        self.server = start(&self.disk, self.boots);
        for (vm_id, _) in std::mem::take(&mut self.asked).into_values() {
            self.known.entry(vm_id).or_default().unsure = true;
        }
    }

    fn step(&mut self) {
        match self.random.below(4000) {
            0..1400 => self.ask(),
            1400..3990 => {
                let now = self.now();
                self.io.step(&self.disk, &mut self.server, &mut self.random, now);
            }
            3990..3995 => {
                let now = self.now();
                self.server.tick(now);
            }
            _ => self.crash(),
        }
        self.outputs();
    }
}

#[test]
fn every_epoch_has_one_owner_over_crashes_and_releases() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut boots = 0;
    for seed in 1..=20 {
        let mut world = World::new(seed);
        for _ in 0..30_000 {
            world.step();
        }
        // In the end all is found as it was told.
        world.crash();
        for vm in 1..=VMS {
            let (vm_id, connection) = (VmId(vm), ConnectionId(1 << 40 | vm));
            world.asked.insert(connection, (vm_id, Asked::Record));
            let now = world.now();
            world.server.frame(connection, Frame::OwnerGet { vm_id }, now);
            world.outputs();
        }
        assert!(world.asked.is_empty());
        let report = layout::check(&mut |number| Some(world.disk.borrow().read(number.0))).unwrap();
        assert_eq!(report.faults, Vec::<String>::new());
        boots += world.boots;
        for (what, n) in world.counts {
            *counts.entry(what).or_default() += n;
        }
    }
    println!("{boots} starts; {counts:?}");
    for (what, least) in [("claimed", 5000), ("taken", 2000), ("handed over", 1000), ("released", 3000), ("seen", 3000)]
    {
        assert!(counts[what] > least, "{what}: {counts:?}");
    }
}
