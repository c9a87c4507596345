//! Exhaustive model check of porting: the real state machines of source and destination, an arbiter, a connection that
//! can be cut at any message, requests to the arbiter that are lost, delayed and repeated, crashes of either side,
//! timeouts and cancelling operators at any time. Where the source has named the destination as its heir, the arbiter answers
//! before its record is durable, and may forget the answer in a restart. Meanwhile the record may be released or claimed ([`lives`]).
//!
//! Checked in every reachable state: never two running, not even one after the other; with an arbiter, whoever runs has the record's epoch (so
//! the D-module never accepts a request of a stale one). Checked from every reachable state: when faults
//! end, it gets decided.
mod arbiter;
mod drivers;
mod lives;
mod search;

use arbiter::Told;
use drivers::{Outcome, Task, outcomes};
use lives::Lives;
use migration::convergence::Policy;
use migration::destination::{self, Destination};
use migration::message::{
    Description, Hello, Message, Ownership, Reason, ReasonCode, VERSION_MAX, VERSION_MIN, feature,
};
use migration::ownership::{Epoch, OwnerId, Record};
use migration::source::{self, Source};
use migration::wire::FrameType;
use search::{End, hash, search_from};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

const SOURCE: OwnerId = OwnerId([1, 1]);
const DESTINATION: OwnerId = OwnerId([2, 2]);
/// The process that starts the VM afresh.
const FRESH: OwnerId = OwnerId([3, 3]);
const START: Epoch = Epoch(5);

/// What travels on the connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Wire {
    Control(Message),
    Bulk(FrameType),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Side {
    Source,
    Destination,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    source: Source,
    destination: Destination,
    /// Of epoch 0: there is none.
    record: Record,
    session: Epoch,
    /// No epoch up to this is given.
    floor: Epoch,
    lives: Lives,
    /// It is durable that the destination is the heir.
    heir: bool,
    /// The destination was given the epoch, and a restart of the arbiter would forget it.
    forgettable: bool,
    /// The arbiter was restarted and may have forgotten that.
    sealed: bool,
    restarts: u8,
    /// The destination, which has won and given up, has the arbiter asked in the source's name: from this epoch. It may arrive at any time, and
    /// often.
    gives_back: Option<Epoch>,
    /// The record as the source has read it while it watches; it hears of it later.
    shown: Option<(Epoch, OwnerId)>,
    /// The time for which it watches was over before the destination was heard.
    watched_in_vain: bool,
    /// The destination, which has given up, tells the arbiter so.
    renounces: bool,
    up: bool,
    /// The connection was lost by a fault, not closed by one of the two: what was said before may not be heard.
    severed: bool,
    to_destination: VecDeque<Wire>,
    to_source: VecDeque<Message>,
    source_told: bool,
    destination_told: bool,
    source_alive: bool,
    destination_alive: bool,
    tasks: BTreeSet<(Side, Task)>,
    /// Requests on their way to the arbiter; delivering one may leave it there (repetition, delay).
    requests: BTreeSet<(Side, Epoch)>,
    /// What each side wants from the arbiter at present.
    competing: BTreeMap<Side, Epoch>,
    answers: BTreeSet<(Side, Epoch, Told)>,
    source_runs: Option<Epoch>,
    destination_runs: Option<Epoch>,
    resumes: u8,
    runs: u8,
    torn_down: bool,
    destroyed: bool,
    cancels: u8,
    timeouts: u8,
}

fn start(ownership: Ownership, heir: bool) -> State {
    let hello = Hello {
        min_version: VERSION_MIN,
        max_version: VERSION_MAX,
        required: 0,
        offered: feature::OFFERED,
        port: [3, 4],
        vm_id: 1,
        owner: SOURCE,
        ownership,
        epoch: START,
        memory_size: 4096,
        ticket: Vec::new(),
    };
    let description = Description { memory_size: 4096, ..Description::default() };
    let policy = Policy { max_rounds: 2, ..Policy::default() };
    State {
        source: Source::new(hello, description, policy),
        destination: Destination::new(1 << 20),
        record: Record { epoch: START, owner: SOURCE },
        session: START,
        floor: Epoch(0),
        lives: Lives::default(),
        heir,
        forgettable: false,
        sealed: false,
        restarts: 0,
        gives_back: None,
        shown: None,
        watched_in_vain: false,
        renounces: false,
        up: true,
        severed: false,
        to_destination: VecDeque::new(),
        to_source: VecDeque::new(),
        source_told: false,
        destination_told: false,
        source_alive: true,
        destination_alive: true,
        tasks: BTreeSet::from([(Side::Source, Task::Connect)]),
        requests: BTreeSet::new(),
        competing: BTreeMap::new(),
        answers: BTreeSet::new(),
        source_runs: Some(START),
        destination_runs: None,
        resumes: 0,
        runs: 0,
        torn_down: false,
        destroyed: false,
        cancels: 0,
        timeouts: 0,
    }
}

fn why(code: ReasonCode) -> Reason {
    Reason::new(code, "")
}

impl State {
    fn cut(&mut self) {
        self.up = false;
    }

    fn sever(&mut self) {
        self.cut();
        self.severed = true;
    }

    fn answer(&mut self, answer: (Side, Epoch, Told)) {
        self.answers.remove(&answer);
        let (side, expected, told) = answer;
        if side == Side::Source && self.competing.get(&side) == Some(&expected) {
            // The driver asks no more.
            self.competing.remove(&side);
        }
        let verdict = told.verdict();
        match side {
            Side::Source if self.source_alive => self.source_event(source::Event::Verdict { expected, verdict }),
            // The driver of the destination competes once and drops answers after it was told to stop.
            Side::Destination if self.destination_alive && self.competing.contains_key(&side) => {
                self.destination_event(destination::Event::Verdict(verdict));
            }
            _ => {}
        }
    }

    fn deliver_to_destination(&mut self) {
        match self.to_destination.pop_front() {
            Some(Wire::Control(message)) => self.destination_event(destination::Event::Message(message)),
            Some(Wire::Bulk(frame_type)) => self.destination_event(destination::Event::Bulk(frame_type)),
            None => {}
        }
    }

    fn deliver_to_source(&mut self) {
        if let Some(message) = self.to_source.pop_front() {
            self.source_event(source::Event::Message(message));
        }
    }

    fn tell_source(&mut self) {
        self.source_told = true;
        self.to_source.clear();
        self.source_event(source::Event::Disconnected(why(ReasonCode::Disconnected)));
    }

    fn tell_destination(&mut self) {
        self.destination_told = true;
        self.to_destination.clear();
        self.destination_event(destination::Event::Disconnected(why(ReasonCode::Disconnected)));
    }

    fn crash(&mut self, side: Side) {
        self.sever();
        self.tasks.retain(|(s, _)| *s != side);
        self.competing.remove(&side);
        match side {
            Side::Source => {
                self.source_alive = false;
                self.source_runs = None;
                self.to_source.clear();
            }
            Side::Destination => {
                self.destination_alive = false;
                self.destination_runs = None;
                self.to_destination.clear();
            }
        }
    }

    /// All that can happen next, faults included.
    fn successors(&self) -> Vec<State> {
        let mut next = Vec::new();
        let mut add = |change: &dyn Fn(&mut State)| {
            let mut state = self.clone();
            change(&mut state);
            if state != *self {
                next.push(state);
            }
        };
        for (side, task) in self.tasks.iter().copied() {
            for outcome in outcomes(task) {
                add(&|s| s.perform(side, task, *outcome));
            }
        }
        if self.source_alive && !self.source_told {
            add(&State::deliver_to_source);
            // What was said before an orderly end is heard before it.
            if !self.up && (self.severed || self.to_source.is_empty()) {
                add(&State::tell_source);
            }
        }
        if self.destination_alive && !self.destination_told {
            add(&State::deliver_to_destination);
            if !self.up {
                add(&State::tell_destination);
            }
        }
        for (side, expected) in self.requests.iter().copied() {
            add(&|s| s.arbitrate(side, expected));
            add(&|s| {
                s.requests.remove(&(side, expected));
                s.arbitrate(side, expected);
            });
            add(&|s| {
                s.requests.remove(&(side, expected));
            });
        }
        for answer in self.answers.iter().copied() {
            add(&|s| s.answer(answer));
            add(&|s| {
                s.answers.remove(&answer);
            });
        }
        for (side, expected) in self.competing.iter().map(|(s, e)| (*s, *e)) {
            add(&|s| {
                s.requests.insert((side, expected));
            });
        }
        if self.up {
            add(&State::sever);
        }
        if self.forgettable {
            add(&State::written);
        }
        if self.heir && self.restarts < 1 {
            add(&State::restart_arbiter);
        }
        add(&State::hello);
        self.what_others_do(&mut add);
        if self.renounces {
            add(&State::renounce);
            // It is said again until it is heard, as long as there is somebody to say it.
            if !self.destination_alive {
                add(&|s| s.renounces = false);
            }
        }
        if let Some(epoch) = self.gives_back {
            add(&|s| s.give_back(epoch));
            // It is said again for longer than the source watches.
            if !self.destination_alive || self.watched_in_vain {
                add(&|s| s.gives_back = None);
            }
        }
        if self.watches() {
            add(&|s| s.shown = Some(s.read()));
            if let Some(record) = self.shown {
                add(&|s| s.show(record));
            }
        }
        if self.cancels < 1 {
            for (alive, side) in [(self.source_alive, Side::Source), (self.destination_alive, Side::Destination)] {
                if alive {
                    add(&|s| {
                        s.cancels += 1;
                        match side {
                            Side::Source => s.source_event(source::Event::Cancel),
                            Side::Destination => s.destination_event(destination::Event::Cancel),
                        }
                    });
                }
            }
        }
        if self.timeouts < 1 {
            for (alive, side) in [(self.source_alive, Side::Source), (self.destination_alive, Side::Destination)] {
                if alive {
                    add(&|s| {
                        s.timeouts += 1;
                        match side {
                            Side::Source => {
                                s.watched_in_vain |= s.watches();
                                s.source_event(source::Event::Timeout);
                            }
                            Side::Destination => s.destination_event(destination::Event::Timeout),
                        }
                    });
                }
            }
        }
        if self.source_alive && self.destination_alive {
            add(&|s| s.crash(Side::Source));
            add(&|s| s.crash(Side::Destination));
        }
        next
    }

    /// Must hold always.
    fn check(&self, ownership: Ownership) {
        assert!(self.source_runs.is_none() || self.destination_runs.is_none(), "two run: {self:#?}");
        // Not even one after the other: the copy that did not run is of the past.
        assert!(self.resumes + self.runs <= 1, "told to run twice: {self:#?}");
        if ownership == Ownership::Arbiter {
            self.check_records();
        }
    }

    /// Without further faults: steps succeed, whoever waits in vain times out, the arbiter answers. Gives how it ends, and
    /// remembers that for the states on the way, which others come by as well.
    fn heal(mut self, ownership: Ownership, known: &mut HashMap<u128, End>) -> End {
        let mut passed = vec![hash(&self)];
        let end = loop {
            assert!(passed.len() < 400, "not decided after many steps: {self:#?}");
            self.step(ownership);
            let here = hash(&self);
            if let Some(end) = known.get(&here) {
                break *end;
            }
            if passed.last() == Some(&here) {
                self.check_decided(ownership);
                break self.outcome();
            }
            passed.push(here);
        };
        known.extend(passed.into_iter().map(|state| (state, end)));
        end
    }

    fn outcome(&self) -> End {
        End {
            ported: self.destination_runs.is_some(),
            resumed: self.source_runs.is_some(),
            unknown: self.source.phase() == source::Phase::Unknown,
            untold: self.untold(),
            taken_away: self.lives.taken_away,
        }
    }

    /// One step of healing; none is left when it changes nothing.
    pub(crate) fn step(&mut self, ownership: Ownership) {
        self.hello();
        if self.forgettable {
            self.written();
        } else if self.renounces {
            self.renounce();
        } else if let Some(epoch) = self.gives_back.take() {
            self.give_back(epoch);
        } else if !self.lives.is_settled() {
            self.settle();
        } else if let Some((side, task)) = self.tasks.first().copied() {
            self.perform(side, task, Outcome::Good);
        } else if self.destination_alive && !self.destination_told && !self.to_destination.is_empty() {
            self.deliver_to_destination();
        } else if self.source_alive && !self.source_told && !self.to_source.is_empty() {
            self.deliver_to_source();
        } else if let Some((side, expected)) = self.requests.pop_first() {
            self.arbitrate(side, expected);
        } else if let Some(answer) = self.answers.first().copied() {
            self.answer(answer);
        } else if let Some((side, expected)) = self.answerable() {
            self.requests.insert((side, expected));
        } else if self.watches() && self.record_counts() {
            self.show(self.read());
        } else if !self.up && self.source_alive && !self.source_told {
            self.tell_source();
        } else if !self.up && self.destination_alive && !self.destination_told {
            self.tell_destination();
        } else {
            if self.source_alive {
                self.source_event(source::Event::Timeout);
            }
            if self.destination_alive {
                self.destination_event(destination::Event::Timeout);
            }
        }
        self.check(ownership);
    }

    /// The source reads the record.
    pub(crate) fn watches(&self) -> bool {
        self.source_alive && self.source.phase() == source::Phase::Watching
    }

    /// What the source would read now ends its watch.
    fn record_counts(&self) -> bool {
        let mut next = self.clone();
        next.show(self.read());
        !next.watches()
    }

    /// A question to the arbiter that it would answer.
    fn answerable(&self) -> Option<(Side, Epoch)> {
        let unknown =
            |(side, epoch): &(Side, Epoch)| self.sealed && *side == Side::Source && *epoch == self.record.epoch;
        self.competing.iter().map(|(s, e)| (*s, *e)).find(|question| !unknown(question))
    }

    /// Must hold when nothing more happens.
    fn check_decided(&self, ownership: Ownership) {
        if self.untold() {
            // The operator decides, as after a crash of the host.
            return;
        }
        let unknown = self.source_alive && self.source.phase() == source::Phase::Unknown;
        assert!(!unknown || ownership == Ownership::Stream, "an arbiter's VM is in doubt: {self:#?}");
        if self.source_alive && !unknown {
            assert!(self.source.phase().is_final(), "the source is not decided: {self:#?}");
            assert_eq!(self.source_runs.is_some(), self.source.phase() == source::Phase::Resumed, "{self:#?}");
        }
        if self.destination_alive {
            use destination::Phase as P;
            let phase = self.destination.phase();
            assert!(matches!(phase, P::Ended | P::Destroyed | P::Hello), "the destination is not decided: {self:#?}");
            assert_eq!(self.destination_runs.is_some(), phase == P::Ended, "{self:#?}");
        }
        if self.source_alive && self.destination_alive && !unknown {
            let running = usize::from(self.source_runs.is_some()) + usize::from(self.destination_runs.is_some());
            // The source gives up some time, as it cannot be told that no word will come.
            assert!(running == 1 || self.watched_in_vain || self.lives.taken_away, "nobody runs: {self:#?}");
        }
    }
}

fn search(ownership: Ownership, heir: bool) {
    let ended = search_from(&start(ownership, heir), ownership);
    // The search must have reached both ends, else it proves nothing.
    assert!(ended.ported > 0 && ended.resumed > 0 && ended.states > 1000);
    assert_eq!(ended.unknown > 0, ownership == Ownership::Stream);
    assert_eq!(ended.untold > 0, heir);
}

#[test]
fn arbiter_decides() {
    search(Ownership::Arbiter, false);
}

#[test]
fn arbiter_decides_with_an_heir() {
    search(Ownership::Arbiter, true);
}

#[test]
fn stream_decides() {
    search(Ownership::Stream, false);
}
