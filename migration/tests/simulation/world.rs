//! Two hosts, a connection between them, a D-module, a guest: everything that happens, in virtual time.

mod drivers;
mod questions;

use std::collections::BTreeMap;

use fabric::fs::{Credential, FileHandle, SetAttr, VolumeId};
use fabric::id::{Epoch as CfEpoch, Owner, Sequence, Slot};
use fabric::op::{Op, Request};
use fabric::wire::{CasStatus, Frame, Hello as CfHello, Refusal, VERSION};
use migration::convergence::{Policy, RoundStats};
use migration::destination::{self, Destination};
use migration::message::{
    Description, Hello, Message, Ownership, Reason, ReasonCode, Stamp, VERSION_MAX, VERSION_MIN, feature,
};
use migration::ownership::{Epoch, OwnerId, Record, Verdict};
use migration::source::{self, Source};
use migration::wire::FrameType;

use crate::arbiter::{Dmodule, VM};
use questions::cf_hello;

/// Microseconds. Faults happen before, and everything is decided long before the end.
const FAULTS_UNTIL: u64 = 4_000_000;
const END: u64 = 20_000_000;
/// A port has about so many events.
const EVENTS: u64 = 40;
/// How often the drivers look at their limits and the guest at its own.
const TICK: u64 = 20_000;
/// Limits of the drivers: for a phase, and for the answer behind COMMIT.
const LIMIT: u64 = 3_000_000;
const RUNNING_MAX: u64 = 1_000_000;
const ASK_AGAIN: u64 = 100_000;
/// How long a source watches the record.
const WATCH_MAX: u64 = 8_000_000;
/// Longest time between two requests of a guest.
const THINKS: u64 = 10_000;
/// When a guest asks once more, on another connection.
const REPLY_MAX: u64 = 200_000;

/// What became of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Ported,
    Resumed,
    Unknown,
    /// It went down with a host.
    Crashed,
    /// The D-module was restarted in the pause and the heir has crashed: stays paused.
    Untold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Source,
    Destination,
}

impl Side {
    fn owner(self) -> OwnerId {
        match self {
            Side::Source => OwnerId([1, 1]),
            Side::Destination => OwnerId([2, 2]),
        }
    }
}

/// A guest: what moves with its memory.
#[derive(Debug, Clone, Copy, Default)]
struct Guest {
    epoch: u64,
    /// Request that is out.
    sequence: u64,
}

#[derive(Debug, Clone)]
enum Wire {
    Control(Message),
    Bulk(FrameType),
}

#[derive(Debug)]
enum Happening {
    /// To this side, on the connection of the port.
    Wire(Side, Wire),
    /// This side hears that the connection has ended.
    Lost(Side),
    Report(Side, Box<Report>),
    /// A question to the D-module.
    Ask(u64, Frame),
    /// Its answer.
    Answer(u64, Frame),
    Written(u64),
    Tick,
    Fault,
}

#[derive(Debug)]
enum Report {
    Source(source::Event),
    Destination(destination::Event),
}

/// Why somebody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asker {
    Compete(Side, u64),
    Prepare,
    Naming,
    /// The last word of a destination that has given up: it is said again until it is answered.
    Parting,
    /// A source that has lost.
    Watch,
    Guest(Side),
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

struct Host {
    alive: bool,
    /// `Some`: the guest runs.
    runs: Option<Guest>,
    /// The guest as it stands still here, or has arrived.
    saved: Guest,
    /// Its CF connection, and since when it waits there (a source that watches: for the record).
    cf: Option<u64>,
    asked_at: u64,
    competing: Option<(u64, u64)>,
    /// The question with which a destination gives up, and when it was last asked.
    parting: Option<(Frame, u64)>,
    /// The driver still has its end of the connection.
    connected: bool,
    phase_since: u64,
}

impl Host {
    fn new() -> Host {
        Host {
            alive: true,
            runs: None,
            saved: Guest::default(),
            cf: None,
            asked_at: 0,
            competing: None,
            parting: None,
            connected: true,
            phase_since: 0,
        }
    }
}

pub struct World {
    random: Random,
    now: u64,
    ownership: Ownership,
    source: Source,
    destination: Destination,
    hosts: [Host; 2],
    dmodule: Dmodule,
    boot: u64,
    restarts: u64,
    crashed: bool,
    askers: BTreeMap<u64, Asker>,
    queue: BTreeMap<(u64, u64), Happening>,
    count: u64,
    /// Arrival of the last on the way to each side: the connection keeps the order.
    last: [u64; 2],
    up: bool,
    cancelled: bool,
    /// Events of both machines so far, and those behind which a fault happens.
    events: u64,
    struck: Vec<u64>,
}

fn why(code: ReasonCode) -> Reason {
    Reason::new(code, "simulated")
}

impl World {
    pub fn new(ownership: Ownership, seed: u64) -> World {
        let arbiter = ownership == Ownership::Arbiter;
        let epoch = Epoch(u64::from(arbiter));
        let hello = Hello {
            min_version: VERSION_MIN,
            max_version: VERSION_MAX,
            required: 0,
            offered: feature::OFFERED,
            port: [3, 4],
            vm_id: VM.0,
            owner: Side::Source.owner(),
            ownership,
            epoch,
            memory_size: 4096,
            ticket: Vec::new(),
        };
        let description = Description { memory_size: 4096, ..Description::default() };
        let policy = Policy { max_rounds: 4, ..Policy::default() };
        let mut world = World {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            now: 0,
            ownership,
            source: Source::new(hello, description, policy),
            destination: Destination::new(1 << 20),
            hosts: [Host::new(), Host::new()],
            dmodule: Dmodule::new(),
            boot: 0,
            restarts: 0,
            crashed: false,
            askers: BTreeMap::new(),
            queue: BTreeMap::new(),
            count: 0,
            last: [0; 2],
            up: true,
            cancelled: false,
            events: 0,
            struck: Vec::new(),
        };
        if arbiter {
            // The guest has started afresh before the port.
            world.dmodule.frame(0, cf_hello(0, Side::Source));
            world.dmodule.written();
        }
        world.hosts[0].runs = Some(Guest { epoch: epoch.0, sequence: 1 });
        for _ in 0..world.random.below(4) {
            // At any time, or close to a step of the port.
            if world.random.one_in(4) {
                let at = world.random.below(FAULTS_UNTIL / 8);
                world.at(at, Happening::Fault);
            } else {
                let event = world.random.below(EVENTS);
                world.struck.push(event);
            }
        }
        world.at(0, Happening::Tick);
        world.later(50_000, Happening::Report(Side::Source, Box::new(Report::Source(source::Event::Connected))));
        world
    }

    pub fn run(mut self) -> End {
        while let Some(((at, _), happening)) = self.queue.pop_first() {
            if at > END {
                break;
            }
            self.now = at;
            self.happen(happening);
            let both = self.hosts.iter().all(|h| h.runs.is_some());
            assert!(!both, "two run at {at}");
        }
        self.end()
    }

    /// Now is long after the last fault.
    fn end(&self) -> End {
        let [here, there] = &self.hosts;
        let phase = self.source.phase();
        if phase == source::Phase::Unknown && here.alive {
            assert_eq!(self.ownership, Ownership::Stream, "in doubt in spite of an arbiter");
            return End::Unknown;
        }
        if here.alive {
            let sealed = self.restarts > 0 && !there.alive && phase == source::Phase::Competing;
            if sealed {
                return End::Untold;
            }
            assert!(phase.is_final(), "the source is not decided: {phase:?}");
        }
        if there.alive {
            use destination::Phase as P;
            let phase = self.destination.phase();
            assert!(matches!(phase, P::Ended | P::Destroyed | P::Hello), "the destination is not decided: {phase:?}");
        }
        for host in &self.hosts {
            if let Some(guest) = host.runs
                && self.ownership == Ownership::Arbiter
            {
                assert!(guest.sequence > 1000, "the guest has not gone on: {guest:?}");
                let sequences = 1..guest.sequence;
                assert!(sequences.clone().all(|s| self.dmodule.executed.contains(&s)), "an acknowledged one is lost");
            }
        }
        match (here.runs, there.runs) {
            (Some(_), None) => End::Resumed,
            (None, Some(_)) => End::Ported,
            _ => {
                assert!(self.crashed, "nobody runs, and nobody has crashed");
                End::Crashed
            }
        }
    }

    fn faulty(&self) -> bool {
        self.now < FAULTS_UNTIL
    }

    fn at(&mut self, at: u64, happening: Happening) {
        self.count += 1;
        self.queue.insert((at, self.count), happening);
    }

    fn later(&mut self, within: u64, happening: Happening) {
        let at = self.now + 1 + self.random.below(within);
        self.at(at, happening);
    }

    fn host(&mut self, side: Side) -> &mut Host {
        &mut self.hosts[side as usize]
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Wire(side, wire) if self.hosts[side as usize].connected => match (side, wire) {
                (Side::Source, Wire::Control(message)) => self.source_event(source::Event::Message(message)),
                (Side::Destination, Wire::Control(message)) => {
                    self.destination_event(destination::Event::Message(message));
                }
                (Side::Destination, Wire::Bulk(frame)) => self.destination_event(destination::Event::Bulk(frame)),
                (Side::Source, Wire::Bulk(frame)) => panic!("{frame:?} to the source"),
            },
            Happening::Lost(side) if self.hosts[side as usize].connected => {
                self.host(side).connected = false;
                let reason = why(ReasonCode::Disconnected);
                match side {
                    Side::Source => self.source_event(source::Event::Disconnected(reason)),
                    Side::Destination => self.destination_event(destination::Event::Disconnected(reason)),
                }
            }
            Happening::Wire(..) | Happening::Lost(_) => {}
            Happening::Report(side, report) if self.hosts[side as usize].alive => match *report {
                Report::Source(event) => self.source_event(event),
                Report::Destination(event) => self.destination_event(event),
            },
            Happening::Report(..) => {}
            Happening::Ask(connection, frame) => {
                let out = self.dmodule.frame(connection, frame);
                self.answers(out);
            }
            Happening::Answer(connection, frame) => self.answered(connection, frame),
            Happening::Written(boot) if boot == self.boot => {
                let out = self.dmodule.written();
                self.answers(out);
            }
            Happening::Written(_) => {}
            Happening::Tick => {
                self.tick();
                self.at(self.now + TICK, Happening::Tick);
            }
            Happening::Fault => self.fault(),
        }
    }

    fn fault(&mut self) {
        match self.random.below(7) {
            0 => self.crash(Side::Source),
            1 => self.crash(Side::Destination),
            2 | 3 => self.cut(),
            4 if !self.cancelled && self.hosts[0].alive => {
                self.cancelled = true;
                self.source_event(source::Event::Cancel);
            }
            5 if self.ownership == Ownership::Arbiter => {
                self.boot += 1;
                self.restarts += 1;
                let reached = self.random.one_in(2);
                self.dmodule.restart(reached);
                // What was on its way on any connection is gone with it.
                self.queue.retain(|_, h| !matches!(h, Happening::Ask(..) | Happening::Answer(..)));
            }
            _ => {
                let side = if self.random.one_in(2) { Side::Source } else { Side::Destination };
                // An impatient driver: a limit comes early.
                match side {
                    Side::Source if self.hosts[0].alive => self.source_event(source::Event::Timeout),
                    Side::Destination if self.hosts[1].alive => self.destination_event(destination::Event::Timeout),
                    _ => {}
                }
            }
        }
    }

    fn crash(&mut self, side: Side) {
        self.crashed = true;
        let host = self.host(side);
        (host.alive, host.runs, host.connected, host.competing, host.parting) = (false, None, false, None, None);
        self.cut();
    }

    /// The connection breaks: a tail of what is on its way is lost, and each side hears of it some time.
    fn cut(&mut self) {
        if !self.up {
            return;
        }
        self.up = false;
        for side in [Side::Source, Side::Destination] {
            let from = self.now + self.random.below(2_000);
            self.queue.retain(|(at, _), h| !(matches!(h, Happening::Wire(to, _) if *to == side) && *at >= from));
            let at = self.last[side as usize].max(self.now) + 1 + self.random.below(2_000_000);
            self.at(at, Happening::Lost(side));
        }
    }

    fn tick(&mut self) {
        let limit = |phase| match phase {
            source::Phase::Committed => RUNNING_MAX,
            source::Phase::Watching => WATCH_MAX,
            _ => LIMIT,
        };
        let phase = self.source.phase();
        let lasting = phase.is_final() || matches!(phase, source::Phase::Competing | source::Phase::Unknown);
        let stream = self.ownership == Ownership::Stream && phase == source::Phase::Committed;
        if self.hosts[0].alive && !lasting && !stream && self.now - self.hosts[0].phase_since > limit(phase) {
            self.hosts[0].phase_since = self.now;
            self.source_event(source::Event::Timeout);
        }
        let phase = self.destination.phase();
        let over = matches!(phase, destination::Phase::Ended | destination::Phase::Destroyed);
        if self.hosts[1].alive && !over && self.now - self.hosts[1].phase_since > LIMIT {
            self.hosts[1].phase_since = self.now;
            self.destination_event(destination::Event::Timeout);
        }
        self.ask_again();
        for side in [Side::Source, Side::Destination] {
            let host = &self.hosts[side as usize];
            if let Some((expect, asked)) = host.competing
                && self.now - asked > ASK_AGAIN
            {
                self.compete(side, expect);
            }
            if self.ownership == Ownership::Arbiter
                && let Some(guest) = self.hosts[side as usize].runs
                && (self.hosts[side as usize].cf.is_none() || self.now - self.hosts[side as usize].asked_at > REPLY_MAX)
            {
                // The guest's CF client begins anew.
                let connection = self.ask(Asker::Guest(side), cf_hello(guest.epoch, side));
                let now = self.now;
                let host = self.host(side);
                (host.cf, host.asked_at) = (Some(connection), now);
            }
        }
    }

    fn send(&mut self, to: Side, wire: Wire) {
        if self.up {
            let at = self.last[to as usize].max(self.now) + 1 + self.random.below(500);
            self.last[to as usize] = at;
            self.at(at, Happening::Wire(to, wire));
        }
    }

    fn strike(&mut self) {
        self.events += 1;
        if self.struck.contains(&self.events) {
            self.later(400, Happening::Fault);
        }
    }
}
