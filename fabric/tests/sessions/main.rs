//! Both sides of a session over a link that is cut, with a D-module that is restarted and a VM that is ported and
//! restarted, from seeds. Nothing here knows how the sessions work; it counts what is executed.
//!
//! The link is TCP's: bytes arrive in order, in any pieces, at any time; a cut loses a tail of either direction,
//! and the D-module may go on reading what had arrived long after the client has another connection.
//! The D-module executes pending requests in any order; what is stable is answered after the next consistency point; a
//! restart loses all that the last one did not hold.
#![allow(clippy::unwrap_used)] // helpers of tests too
mod dmodule;

use dmodule::*;
use fabric::client::{ClientSession, Event, Ticket};
use fabric::fs::*;
use fabric::id::*;
use fabric::op::*;
use fabric::server::{Action, ConnectionId};
use fabric::wire::{CasStatus, Encoded, Frame, FrameReader, Hello, owner_cas};
use std::collections::{HashMap, HashSet, VecDeque};

const VM: VmId = VmId(0x51);
const REGISTERS: u64 = 4;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n.max(1)
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What the VM did and was told.
#[derive(Default)]
struct Ledger {
    /// Directories asked for, by ticket, by this start of the VM.
    asked: HashMap<Ticket, Vec<u8>>,
    /// Registers being written or read, so that one is outstanding on each.
    busy: HashMap<Ticket, u64>,
    /// Inode each directory was told to have.
    told: HashMap<Vec<u8>, u64>,
    /// Value each register must have.
    value: HashMap<u64, Vec<u8>>,
    /// Directories and register values that may or may not be there: the VM that asked was restarted.
    lost: HashSet<Vec<u8>>,
    completed: usize,
}

struct World {
    random: Random,
    server: DModule,
    client: ClientSession,
    ledger: Ledger,
    /// The VM's identity.
    epoch: Epoch,
    owner: Owner,
    connection: Option<ConnectionId>,
    connections: u64,
    /// Bytes on their way, not yet at the D-module.
    up: VecDeque<u8>,
    down: VecDeque<u8>,
    names: u64,
    /// A port under way: the compare-and-swap asked for on this connection.
    port: Option<(ConnectionId, Owner)>,
    fenced: bool,
    counts: [usize; 6],
    strangers: u64,
    /// Sessions given to them.
    forgotten: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let owner = Owner([seed, 0]);
        World {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            server: DModule::new(),
            client: ClientSession::new(VM, Epoch::UNCLAIMED, owner),
            ledger: Ledger::default(),
            epoch: Epoch::UNCLAIMED,
            owner,
            connection: None,
            connections: 0,
            up: VecDeque::new(),
            down: VecDeque::new(),
            names: 0,
            port: None,
            fenced: false,
            counts: [0; 6],
            strangers: 0,
            forgotten: 0,
        }
    }

    fn new_connection(&mut self) -> ConnectionId {
        self.connections += 1;
        ConnectionId(self.connections)
    }

    fn connect(&mut self) {
        let id = self.new_connection();
        self.server.inboxes.insert(id, Inbox { bytes: VecDeque::new(), reader: FrameReader::new(), cut: false });
        self.connection = Some(id);
        self.client.connected();
    }

    /// The connection breaks: a part of what is under way arrives, the rest never does.
    fn cut(&mut self) {
        let Some(id) = self.connection.take() else { return };
        if let Some(inbox) = self.server.inboxes.get_mut(&id) {
            let n = self.random.below(self.up.len() + 1);
            inbox.bytes.extend(self.up.drain(..n));
            inbox.cut = true;
        }
        self.up.clear();
        self.down.clear();
        self.client.disconnected();
    }

    fn submit(&mut self) {
        let register = self.random.next() % REGISTERS;
        let free = !self.ledger.busy.values().any(|r| *r == register);
        self.names += 1;
        let value = format!("value {}", self.names).into_bytes();
        let name = format!("name {}", self.names).into_bytes();
        let (op, register) = match self.random.below(4) {
            0 if free => {
                let stability = Stability::FileSync;
                (Op::Write { handle: root(), offset: register, stability, data: value.clone() }, Some(register))
            }
            1 if free => (Op::Read { handle: root(), offset: register, length: 100 }, Some(register)),
            2 | 3 => (Op::MakeDir { dir: root(), name: name.clone(), set: SetAttr::default() }, None),
            _ => return,
        };
        let write = matches!(op, Op::Write { .. });
        let Ok(ticket) = self.client.submit(Request { credential: Credential::ROOT, op }) else { return };
        match register {
            Some(register) => {
                self.ledger.busy.insert(ticket, register);
                if write {
                    self.ledger.value.insert(register, value);
                }
            }
            None => {
                self.ledger.asked.insert(ticket, name);
            }
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.client.poll_event() {
            match event {
                Event::Completed(ticket, outcome) => {
                    self.ledger.completed += 1;
                    match (self.ledger.asked.remove(&ticket), self.ledger.busy.remove(&ticket), outcome) {
                        (Some(name), None, Ok(Reply::Created { attr, .. })) => {
                            let before = self.ledger.told.insert(name, attr.handle.inode);
                            assert_eq!(before, None, "completed twice");
                        }
                        (None, Some(_), Ok(Reply::Written { .. })) => {}
                        (None, Some(register), Ok(Reply::Data { data, .. })) => {
                            let wanted = self.ledger.value.get(&register).cloned().unwrap_or_default();
                            assert_eq!(data, wanted, "register {register}");
                        }
                        other => panic!("{ticket:?}: {other:?}"),
                    }
                }
                Event::Opened { epoch, .. } => {
                    assert!(epoch >= self.epoch);
                    self.epoch = epoch;
                }
                Event::Fenced { .. } => self.fenced = true,
                Event::Pong(_) => {}
            }
        }
    }

    fn transmit(&mut self) {
        if self.connection.is_some() {
            while let Some(chunk) = self.client.poll_transmit() {
                self.up.extend(chunk.as_ref());
                if self.random.one_in(3) {
                    break;
                }
            }
        }
    }

    fn receive(&mut self) {
        let n = self.down.len().min(1 + self.random.below(1500));
        let piece: Vec<u8> = self.down.drain(..n).collect();
        if self.client.receive(&piece).is_err() {
            self.events();
            self.cut();
        }
        self.events();
    }

    fn actions(&mut self) {
        while let Some(action) = self.server.sessions.poll_action() {
            match action {
                Action::Send(id, encoded) => self.sent(id, encoded),
                Action::Execute { token, request, keep } => self.server.pending.push(Pending { token, request, keep }),
                Action::WriteOwners(change) => {
                    assert!(self.server.writing.replace(change).is_none(), "one change at a time");
                }
                Action::ReadKept(read) => self.server.read_kept(read),
                Action::Close(id) => {
                    self.server.inboxes.remove(&id);
                    if self.connection == Some(id) {
                        self.cut();
                    }
                }
            }
        }
    }

    fn sent(&mut self, id: ConnectionId, encoded: Encoded) {
        if self.connection == Some(id) {
            self.down.extend(encoded.into_vec());
        } else if let Some((port, owner)) = self.port
            && port == id
        {
            let frame = FrameReader::new().push(&mut &encoded.into_vec()[..]).unwrap();
            match frame {
                Some(Frame::OwnerCasResult { status: CasStatus::Won, record }) => {
                    let former = self.epoch;
                    self.epoch = record.epoch;
                    self.owner = owner;
                    self.port = None;
                    self.counts[3] += 1;
                    self.stale(former);
                    self.client.set_epoch(record.epoch, owner);
                    self.fenced = false;
                }
                Some(Frame::OwnerCasResult { status: CasStatus::Unknown, .. }) => self.ask(id, owner),
                other => panic!("nobody else asks: {other:?}"),
            }
        } else if id.0 >> 40 == 1 {
            let frame = FrameReader::new().push(&mut &encoded.into_vec()[..]).unwrap();
            self.forgotten += usize::from(matches!(frame, Some(Frame::HelloAck(_))));
        }
    }

    /// The copy of the VM that lost goes on sending, on the very same connection and on one of its own.
    fn stale(&mut self, former: Epoch) {
        let op = Op::MakeDir { dir: root(), name: b"stale".to_vec(), set: SetAttr::default() };
        let request = Request { credential: Credential::ROOT, op };
        for slot in [0, 1, 63] {
            for sequence in 1..3 {
                let (slot, sequence, request) = (Slot(slot), Sequence(sequence), request.clone());
                let frame = Frame::Request { epoch: former, slot, sequence, request };
                if let Some(id) = self.connection {
                    self.server.sessions.frame(id, frame.clone());
                }
                self.server.sessions.frame(ConnectionId(u64::MAX), frame);
            }
        }
    }

    fn ask(&mut self, id: ConnectionId, owner: Owner) {
        let question = owner_cas(VM, self.epoch, owner).unwrap();
        let frame = FrameReader::new().push(&mut &question[..]).unwrap().unwrap();
        self.server.sessions.frame(id, frame);
    }

    fn start_port(&mut self) {
        if self.port.is_none() && self.epoch != Epoch::UNCLAIMED {
            let owner = Owner([self.random.next(), 1]);
            let id = self.new_connection();
            self.port = Some((id, owner));
            self.ask(id, owner);
        }
    }

    fn restart_server(&mut self) {
        self.server.restart(&mut self.random);
        self.cut();
        self.counts[1] += 1;
        if let Some((_, owner)) = self.port {
            let id = self.new_connection();
            self.port = Some((id, owner));
            self.ask(id, owner);
        }
    }

    /// The VM starts afresh: what it had asked for is done or not, but nothing is done twice.
    /// Another VM's HELLO: if this one's session is idle then, it is forgotten.
    fn stranger(&mut self) {
        self.strangers += 1;
        let connection = ConnectionId(1 << 40 | self.strangers);
        let hello = Hello {
            vm_id: STRANGER,
            epoch: Epoch(1),
            owner: Owner([9, 9]),
            nonce: 1,
            version_min: 1,
            version_max: 1,
            capabilities: 0,
        };
        self.server.sessions.frame(connection, Frame::Hello(hello));
        self.actions();
        self.server.sessions.closed(connection);
    }

    fn restart_vm(&mut self) {
        if self.port.is_some() {
            return;
        }
        self.cut();
        self.counts[2] += 1;
        let former = std::mem::take(&mut self.ledger);
        self.ledger.told = former.told;
        self.ledger.lost = former.lost;
        self.ledger.lost.extend(former.asked.into_values());
        self.owner = Owner([self.random.next(), 2]);
        self.epoch = Epoch::UNCLAIMED;
        self.client = ClientSession::new(VM, Epoch::UNCLAIMED, self.owner);
        // Its registers begin with writes of its own.
        for register in 0..REGISTERS {
            let value = format!("first {register} {}", self.counts[2]).into_bytes();
            let stability = Stability::FileSync;
            let op = Op::Write { handle: root(), offset: register, stability, data: value.clone() };
            let ticket = self.client.submit(Request { credential: Credential::ROOT, op }).unwrap();
            self.ledger.busy.insert(ticket, register);
            self.ledger.value.insert(register, value);
        }
    }

    fn owners_written(&mut self) {
        let Some(change) = self.server.writing.take() else { return };
        let failed = self.random.one_in(8);
        if !failed || self.random.one_in(2) {
            self.server.owners.apply(&change);
        }
        self.server.sessions.owners_written(!failed);
    }

    fn step(&mut self, faults: bool) {
        // While it is being ported the VM does not run.
        let runs = self.port.is_none();
        match self.random.below(if faults { 100 } else { 90 }) {
            0..10 if runs && faults => self.submit(),
            0..25 if runs => self.transmit(),
            25..35 => {
                if let Some(inbox) = self.connection.and_then(|id| self.server.inboxes.get_mut(&id)) {
                    let n = self.up.len().min(1 + self.random.below(3000));
                    inbox.bytes.extend(self.up.drain(..n));
                }
            }
            35..50 => self.server.read(&mut self.random),
            50..62 => self.server.execute(&mut self.random),
            62..68 => self.server.consistency_point(),
            68..72 => self.owners_written(),
            72..85 if runs => self.receive(),
            85..90 if runs && self.connection.is_none() => self.connect(),
            90..94 if runs && self.random.one_in(3) => {
                self.cut();
                self.counts[0] += 1;
            }
            94..96 if self.random.one_in(8) => self.restart_server(),
            96..98 if self.random.one_in(2) => self.start_port(),
            98..99 if self.random.one_in(10) => self.restart_vm(),
            99 => self.stranger(),
            _ => {}
        }
        self.actions();
    }

    fn check(&self, seed: u64) {
        assert_eq!(self.client.outstanding(), 0, "seed {seed}: all is answered");
        assert!(!self.fenced, "seed {seed}: the owner is not fenced");
        let mut made: HashMap<&[u8], Vec<u64>> = HashMap::new();
        for (name, inode) in &self.server.durable.made {
            made.entry(name).or_default().push(*inode);
        }
        for (name, inode) in &self.ledger.told {
            assert_eq!(made.remove(&name[..]), Some(vec![*inode]), "seed {seed}: once, and as told");
        }
        for (name, inodes) in made {
            assert!(self.ledger.lost.contains(name) && inodes.len() == 1, "seed {seed}: {inodes:?}");
        }
        for (register, value) in &self.ledger.value {
            assert_eq!(self.server.durable.registers.get(register), Some(value), "seed {seed}: register {register}");
        }
    }
}

#[test]
fn once_whatever_happens() {
    let (mut counts, mut forgotten) = ([0; 6], 0);
    for seed in 1..=400 {
        let mut world = World::new(seed);
        for _ in 0..4000 {
            world.step(true);
        }
        let mut steps = 0;
        while world.client.outstanding() > 0 || world.port.is_some() {
            world.step(false);
            steps += 1;
            assert!(steps < 200_000, "seed {seed}: it ends");
        }
        world.server.consistency_point();
        world.check(seed);
        world.counts[4] = world.ledger.told.len();
        world.counts[5] = world.ledger.completed;
        forgotten += world.forgotten;
        for (sum, n) in counts.iter_mut().zip(world.counts) {
            *sum += n;
        }
    }
    let [cuts, restarts, vm_restarts, ports, made, completed] = counts;
    println!(
        "{cuts} cuts, {restarts} restarts, {vm_restarts} of the VM, {ports} ports: {made} made, {completed} in all"
    );
    assert!(forgotten > 1000, "{forgotten} sessions forgotten");
    assert!(cuts > 1000 && restarts > 400 && vm_restarts > 100 && ports > 1000 && made > 10_000);
}
