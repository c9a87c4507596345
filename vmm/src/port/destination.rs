//! Taking a VM over.
//!
//! Owns the listening socket ([`listen`]) and everything made for the VM that is on its way. The machine
//! ([`migration::destination::Destination`]) says what is done. Always true: whatever can fail or allocate is done before
//! READY; the guest runs only when the machine says so; an attempt that fails leaves nothing behind and
//! the next one is waited for.

mod door;
mod start;

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration::destination::{Action, Destination, Event, Phase};
use migration::message::{Description, Frames, Message, Ownership, Reason, ReasonCode, Stamp};
use migration::ownership::{Epoch, OwnerId};
use migration::pages::Pages;
use migration::section::Sections;
use migration::wire::FrameType;

use super::announce::{self, REPEAT_MS};
use super::arbiter::Arbiter;
use super::connection::{Connection, ConnectionError, Incoming, STALL_MAX};
use super::faults;
use super::frames::{KEPT_MAX, NetFrame};
use super::guest::{self, Incoming as Shell};
use super::order::Gate;
use super::parting::{self, Word};
use super::tls::handshake::GOODBYE_MAX;
use super::transfer::Arrived;
use super::wait::{Interest, wait};
use crate::boot::info::OwnerId as VmmId;
use crate::config::cli::ReceiveConfig;
use crate::schedule::Urgent;
use crate::stats::Stats;
use crate::vm::Vm;
pub use door::{Arrival, Progress, Shown, listen, receive};
use door::{Door, accept};

/// Longest silence of a source that is connected.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Longest time without COMMIT after STATE.
const COMMIT_MAX: Duration = Duration::from_secs(3);
/// How long the connection is kept after the VM runs, if the source does not end it.
const LINGER_MAX: Duration = Duration::from_secs(3);
/// How long the thread polls instead of sleeping, from PAUSING to the last of the state. It does not poll for the arbiter's
/// answer: the arbiter may need the processor.
const SPIN: Duration = Duration::from_millis(3);
/// Memory held back from READY until the VM is this side's: a process that cannot get any more dies before it competes, while
/// the source still has the VM, and not behind that. As much as loading the state and the first frames take, in bytes; not so much that
/// the allocator gives it back to the kernel (from 128 KiB on, mallopt(3)), which takes some 80 us of the pause.
const RESERVE: usize = 96 << 10;
/// Longest sleep, so that work due by time is done.
const TICK: Duration = Duration::from_millis(50);

struct Driver<'a> {
    config: &'a ReceiveConfig,
    owner: VmmId,
    stats: &'a Arc<Stats>,
    progress: &'a Progress,
    arrival: &'a mut (dyn Arrival + Send),
    door: Door<'a>,
    machine: Destination,
    events: VecDeque<Event>,
    connection: Option<Connection>,
    arbiter: Option<Arbiter>,
    /// The record's epoch when the VM was prepared for.
    found: Epoch,
    shell: Option<Shell>,
    /// [`RESERVE`].
    reserve: Vec<u8>,
    arrived: Arrived,
    sections: Option<Sections>,
    frames: Vec<NetFrame>,
    /// From the announcement on.
    gate: Option<Gate>,
    told: bool,
    applied: Duration,
    loaded_at: Option<Instant>,
    load_took: Duration,
    cas_took: Duration,
    paused: Option<Stamp>,
    run_at: Option<Instant>,
    announced: usize,
    /// The source's guest is stopped: what comes now is the last.
    pausing: bool,
    spin_until: Option<Instant>,
    /// This thread and the vCPU's, from the end of the first round until the guest has run for a while.
    urgent: Vec<Urgent>,
    heard: Instant,
}

impl<'a> Driver<'a> {
    fn new(
        config: &'a ReceiveConfig,
        owner: VmmId,
        stats: &'a Arc<Stats>,
        progress: &'a Progress,
        arrival: &'a mut (dyn Arrival + Send),
        door: Door<'a>,
        connection: Connection,
    ) -> Driver<'a> {
        progress.lock().from = connection.peer().to_string();
        Driver {
            config,
            owner,
            stats,
            progress,
            arrival,
            door,
            machine: Destination::new(guest::memory_available(config)),
            events: VecDeque::new(),
            connection: Some(connection),
            arbiter: None,
            found: Epoch(0),
            shell: None,
            reserve: Vec::new(),
            arrived: Arrived::default(),
            sections: None,
            frames: Vec::new(),
            gate: None,
            told: false,
            applied: Duration::ZERO,
            loaded_at: None,
            load_took: Duration::ZERO,
            cas_took: Duration::ZERO,
            paused: None,
            run_at: None,
            announced: 0,
            pausing: false,
            spin_until: None,
            urgent: Vec::new(),
            heard: Instant::now(),
        }
    }

    /// The VM if it runs here, or why not.
    fn run(mut self) -> std::result::Result<Arc<Vm>, Reason> {
        loop {
            self.look();
            if self.events.is_empty() {
                self.sleep();
            }
            while let Some(event) = self.events.pop_front() {
                self.event(event);
            }
            match (self.machine.phase(), &self.shell) {
                (Phase::Destroyed, _) => {
                    let unknown = || Reason::new(ReasonCode::Internal, "no reason given");
                    return Err(self.machine.reason().cloned().unwrap_or_else(unknown));
                }
                (Phase::Ended, Some(shell)) if self.announced == REPEAT_MS.len() => {
                    announce::later(&shell.vm, self.run_at.unwrap_or_else(Instant::now));
                    return Ok(shell.vm.clone());
                }
                _ => {}
            }
        }
    }

    fn event(&mut self, event: Event) {
        self.events.extend(faults::destination_hears(&event).map(Event::Failed));
        let before = self.machine.phase();
        let actions = self.machine.on_event(event);
        let phase = self.machine.phase();
        if phase != before {
            log::debug!("destination: {} -> {}", before.name(), phase.name());
            self.heard = Instant::now();
            // Not within the pause: it would only cost.
            if !matches!(phase, Phase::Loading | Phase::Loaded | Phase::Deciding | Phase::Starting) {
                let mut shown = self.progress.lock();
                shown.phase = phase.name().into();
                shown.bytes = self.connection.as_ref().map_or(shown.bytes, |c| c.received);
            }
        }
        for action in actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        let failed = faults::destination_does(&action);
        match action {
            Action::Send(message) => self.send(&message),
            Action::Prepare(description) => {
                let event = match self.prepare(&description) {
                    Ok(epoch) => Event::Prepared { owner: OwnerId(self.owner.0), epoch },
                    Err(reason) => Event::Failed(reason),
                };
                self.events.push_back(event);
            }
            // What came in by flooding is older than what the source forwards.
            Action::RoundComplete => {
                self.drop_stale();
                self.hurry();
            }
            Action::Spin => {
                self.drop_stale();
                self.hurry();
                self.applied = Duration::ZERO;
                self.pausing = true;
                self.spin_until = Some(Instant::now() + SPIN);
            }
            Action::Load => {
                let event = self.load();
                self.events.push_back(event);
            }
            Action::Compete(epoch) => {
                // First: who gets no memory for the question must not have asked it.
                self.reserve = Vec::new();
                match &mut self.arbiter {
                    Some(arbiter) => arbiter.compete(epoch),
                    // `prepare` has made it, or READY would not have been said.
                    None => log::error!("no arbiter to ask"),
                }
            }
            Action::Run(epoch) => {
                self.reserve = Vec::new();
                self.start(epoch);
            }
            Action::GiveBack { epoch, owner } => {
                if let Some(arbiter) = self.arbiter.take() {
                    parting::say(arbiter, Word::GiveBack(epoch, owner));
                }
            }
            Action::Destroy => {
                self.urgent.clear();
                if let Some(mut arbiter) = self.arbiter.take() {
                    arbiter.withdraw();
                    // An arbiter that was restarted waits for this, should the source compete with it.
                    if !self.machine.has_won() {
                        parting::say(arbiter, Word::Renounce(self.found));
                    }
                }
                if let Some(shell) = self.shell.take() {
                    shell.vm.stop();
                }
            }
            Action::Close => self.close(),
        }
        if let Some(reason) = failed {
            self.events.push_front(Event::Failed(reason));
        }
    }

    /// A failure is heard of with what comes from the connection, behind what had come before it.
    fn send(&mut self, message: &Message) {
        if let Some(connection) = &mut self.connection {
            let _ = connection.send(message);
        }
    }

    fn lost(&mut self, e: &ConnectionError) {
        if let (ConnectionError::Protocol { source: migration::Error::Tls, .. }, Some(connection)) =
            (e, &mut self.connection)
        {
            connection.refuse(Reason::new(ReasonCode::Permission, "TLS is switched off there"));
        }
        self.connection = None;
        self.events.push_back(match e {
            ConnectionError::Protocol { .. } => Event::Broken(Reason::new(ReasonCode::Protocol, e.to_string())),
            _ => Event::Disconnected(Reason::new(ReasonCode::Disconnected, e.to_string())),
        });
    }

    /// A source that is not told that the VM is given back loses it. Before COMMIT only the reason would be lost.
    fn close(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if self.machine.phase() == Phase::Destroyed {
            connection.end(faults::limit(if self.paused.is_some() { STALL_MAX } else { GOODBYE_MAX }));
        }
    }

    fn prepare(&mut self, description: &Description) -> std::result::Result<Epoch, Reason> {
        let shell = guest::build(description, self.config, self.owner, self.stats)?;
        let failed = |e: crate::Error| Reason::new(ReasonCode::Internal, e.to_string());
        self.arrival.prepare(&shell.vm).map_err(failed)?;
        self.arrived = Arrived::new(shell.vm.memory());
        let arbitrated = self.machine.hello().is_some_and(|h| h.ownership == Ownership::Arbiter);
        let mut epoch = Epoch(0);
        if arbitrated {
            let lacking = || Reason::new(ReasonCode::Arbiter, "no arbiter is configured here");
            let address = shell.vm.config().arbiter.ok_or_else(lacking)?;
            if !parting::settle(shell.vm.config().vm_id) {
                let text = "the end of an earlier port of this VM is still being told to the arbiter";
                return Err(Reason::new(ReasonCode::Busy, text));
            }
            let mut arbiter = Arbiter::new(address, shell.vm.config().vm_id, OwnerId(self.owner.0));
            epoch = arbiter.record().map_err(|e| Reason::new(ReasonCode::Arbiter, e.to_string()))?.epoch;
            self.arbiter = Some(arbiter);
            self.found = epoch;
        }
        self.shell = Some(shell);
        // Not zeroes: those would be no memory yet.
        self.reserve = vec![1; RESERVE];
        self.drop_stale();
        Ok(epoch)
    }

    /// Any round may be the last: until the next one begins. An urgent thread is also woken on a processor where it can run at once, not behind the
    /// source's when both are on one host.
    fn hurry(&mut self) {
        if self.urgent.is_empty() {
            self.urgent.extend(Urgent::port());
            if let Some(shell) = &self.shell {
                self.urgent.extend(shell.vm.vcpu_threads().filter_map(Urgent::vcpu));
            }
        }
    }

    fn drop_stale(&mut self) {
        if let Some(shell) = &self.shell {
            guest::discard_frames(&shell.vm);
        }
    }

    fn load(&mut self) -> Event {
        let started = Instant::now();
        let (Some(shell), Some(sections)) = (&mut self.shell, self.sections.take()) else {
            return Event::Failed(Reason::new(ReasonCode::State, "there is no state to load"));
        };
        let result = guest::load(shell, &sections, &self.arrived);
        self.load_took = started.elapsed();
        self.loaded_at = Some(Instant::now());
        match result {
            Ok(()) => Event::Loaded,
            Err(e) => Event::Failed(Reason::new(ReasonCode::State, e.to_string())),
        }
    }

    fn look(&mut self) {
        if self.progress.stop.load(Ordering::Acquire) {
            self.events.push_back(Event::Cancel);
        }
        // One frame at a time: the machine decides between two.
        let polled = self.connection.as_mut().map(Connection::poll);
        let quiet = matches!(polled, None | Some(Ok(None)));
        match polled {
            None | Some(Ok(None)) => {}
            Some(Ok(Some(incoming))) => {
                self.heard = Instant::now();
                if let Err(e) = self.incoming(incoming) {
                    self.lost(&e);
                }
            }
            Some(Err(e)) => self.lost(&e),
        }
        if self.machine.phase() == Phase::Deciding
            && let Some((_, verdict)) = self.arbiter.as_mut().and_then(Arbiter::poll)
        {
            self.cas_took = self.loaded_at.map_or(Duration::ZERO, |at| at.elapsed());
            self.events.push_back(Event::Verdict(verdict));
        }
        if self.machine.phase() == Phase::Starting {
            self.entered();
        }
        if self.run_at.is_some() {
            self.settle();
            self.announce();
            self.gate(quiet);
        }
        if self.heard.elapsed() > faults::limit(self.limit()) {
            self.heard = Instant::now();
            self.events.push_back(Event::Timeout);
        }
    }

    fn incoming(&mut self, incoming: Incoming) -> std::result::Result<(), ConnectionError> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let event = match incoming.frame_type {
            FrameType::Pages => {
                let started = Instant::now();
                let Some(shell) = &self.shell else {
                    // The machine says that it is not due.
                    self.events.push_back(Event::Bulk(FrameType::Pages));
                    return Ok(());
                };
                if !self.pausing {
                    // Another round, while the guest runs at the source: it needs the processor more, on a small host.
                    self.urgent.clear();
                }
                if self.machine.phase() == Phase::Receiving && self.sections.is_none() {
                    let memory = shell.vm.memory();
                    let pages = Pages::parse(connection.payload(), &memory.ranges(), self.machine.features())
                        .map_err(|e| connection.protocol(e))?;
                    if let Err(e) = self.arrived.apply(&pages, memory) {
                        self.events.push_back(Event::Failed(Reason::new(ReasonCode::Memory, e.to_string())));
                    }
                    self.applied += started.elapsed();
                }
                Event::Bulk(FrameType::Pages)
            }
            FrameType::State => {
                if self.machine.phase() == Phase::Receiving && self.sections.is_none() {
                    self.sections = Some(Sections::parse(connection.payload()).map_err(|e| connection.protocol(e))?);
                    // Before anything is decided, with an arbiter too: whoever has no disk does not compete.
                    if let Some(shell) = &self.shell
                        && let Err(e) = guest::take_images(&shell.vm)
                    {
                        self.events.push_back(Event::Failed(Reason::new(ReasonCode::Device, e.to_string())));
                        return Ok(());
                    }
                }
                Event::Bulk(FrameType::State)
            }
            FrameType::Frames => {
                let frames = Frames::parse(connection.payload()).map_err(|e| connection.protocol(e))?;
                let device = frames.device;
                let frames = frames.frames.into_iter().map(|f| NetFrame { device, bytes: f.to_vec() });
                match (&self.shell, self.run_at) {
                    (Some(shell), Some(_)) => frames.for_each(|f| {
                        if let Some(gate) = &mut self.gate {
                            gate.forwarded(f.device, &f.bytes);
                        }
                        guest::inject(&shell.vm, &f);
                    }),
                    _ => {
                        let room = KEPT_MAX.saturating_sub(self.frames.len());
                        self.frames.extend(frames.take(room));
                    }
                }
                Event::Bulk(FrameType::Frames)
            }
            _ => {
                let message = connection.message(incoming)?;
                // Only where HELLO is due: elsewhere the machine says what is wrong.
                if self.machine.phase() == Phase::Hello
                    && let Err(reason) = self.door.admit(&message, connection)
                {
                    self.events.push_back(Event::Failed(reason));
                    return Ok(());
                }
                if let Message::Commit { paused, .. } = &message {
                    self.paused = Some(*paused);
                }
                if let Message::Switched { device } = message {
                    self.switched(device);
                }
                Event::Message(message)
            }
        };
        self.events.push_back(event);
        Ok(())
    }

    fn limit(&self) -> Duration {
        match self.machine.phase() {
            Phase::Loading | Phase::Loaded => COMMIT_MAX,
            Phase::Running => LINGER_MAX,
            _ => SILENCE_MAX,
        }
    }

    fn sleep(&mut self) {
        if matches!(self.machine.phase(), Phase::Destroyed) {
            return;
        }
        let due = matches!(self.machine.phase(), Phase::Receiving | Phase::Loaded);
        match self.spin_until {
            Some(until) if due && Instant::now() < until => return std::hint::spin_loop(),
            Some(_) => self.spin_until = None,
            None => {}
        }
        if self.run_at.is_none()
            && let Some(mut other) = accept(self.door.listener)
        {
            let reason = Reason::new(ReasonCode::Busy, "another VM is on its way here");
            let _ = other.send(&Message::Refuse(reason));
        }
        let mut fds = Vec::new();
        fds.extend(self.connection.as_ref().map(|c| (c.as_raw_fd(), Interest::Read)));
        fds.extend(self.arbiter.as_ref().and_then(Arbiter::descriptor).map(|fd| (fd, Interest::Read)));
        let tick = match self.run_at {
            _ if self.machine.phase() == Phase::Starting => Duration::from_micros(50),
            Some(at) => self.next_due().saturating_sub(at.elapsed()).min(TICK),
            None => TICK,
        };
        let tick = self.gate.as_ref().and_then(|g| g.left(Instant::now())).map_or(tick, |left| left.min(tick));
        let _ = wait(&fds, Some(tick));
    }
}
