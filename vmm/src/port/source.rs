//! Giving a running VM away.
//!
//! Owns the thread of a port and everything that belongs to one attempt. The machine ([`migration::source::Source`]) says
//! what is done; a step that fails is reported to it, never dealt with here. Always true: when the thread ends, the
//! guest runs here as before, or the VM has been stopped because the destination owns it.

mod owner;
mod pause;
mod rounds;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::convergence::Policy;
use migration::message::{Message, Ownership, Reason, ReasonCode, feature};
use migration::ownership::{Epoch, OwnerId};
use migration::section::Sections;
use migration::source::{Action, Event, Phase, Source};

use super::arbiter::Arbiter;
use super::connection::{Connection, ConnectionError, Incoming};
use super::dead::{Dead, LeftOut};
use super::faults;
use super::frames::Forwarder;
use super::guest;
use super::job::{Job, JobState, OrderReport};
use super::limits;
use super::residue::Residue;
use super::tls::Route;
use super::transfer::{PageWriter, Pending, Sent, Skipped};
use super::wait::{Interest, wait};
use crate::error::{Error, Result};
use crate::schedule::Urgent;
use crate::vm::{Throttle, Vm};
use pause::Pause;

/// How long late network frames are forwarded.
pub const LINGER: Duration = Duration::from_millis(500);
/// Part of the blackout that does not depend on the residue, for the decision when to pause.
const FIXED_NS: u64 = 800_000;
/// How long the thread polls for LOADED before it sleeps. It does not poll for RUNNING: the arbiter may need the processor.
const SPIN: Duration = Duration::from_millis(1);
/// Longest sleep, so that work due by time is done.
const TICK: Duration = Duration::from_millis(20);

/// What a port is started with.
#[derive(Debug)]
pub struct Order {
    /// Where the ownership record lives; `None`: COMMIT decides.
    pub arbiter: Option<SocketAddr>,
    /// When to pause.
    pub policy: Policy,
    /// Send a digest of memory.
    pub verify: bool,
    /// How to get there.
    pub route: Route,
}

/// Drives a port to its end; to be called on a thread of its own.
pub fn run(vm: &Arc<Vm>, job: &Arc<Job>, order: &Order) {
    let outcome = Driver::new(vm, job, order).map(Driver::run);
    if let Err(e) = outcome {
        // Nothing has been touched yet.
        job.update(|s| {
            s.state = JobState::Failed;
            s.error = Some(e.to_string());
        });
    }
}

struct Driver<'a> {
    vm: &'a Arc<Vm>,
    job: &'a Arc<Job>,
    machine: Source,
    events: VecDeque<Event>,
    connection: Option<Connection>,
    /// Epoch of the record taken for a guest that holds none.
    taken: Option<Epoch>,
    arbiter: Option<Arbiter>,
    arbiter_address: Option<SocketAddr>,
    /// When the record is to be read next, while it is watched; and what the watch came to if that was not the VM.
    look_at: Instant,
    watched: Option<String>,
    /// Who said READY, and the epoch of the record it found.
    heir: Option<(OwnerId, Epoch)>,
    verify: bool,
    route: &'a Route,
    forwarder: Forwarder,
    writer: PageWriter,
    pending: Pending,
    left_out: LeftOut,
    sections: Option<Sections>,
    last_round: Sent,
    /// In all rounds, each page as often as it was.
    skipped: Skipped,
    round_bytes: u64,
    round_started: Instant,
    residue: Residue,
    residue_bytes: u64,
    logging: bool,
    throttle: Option<Throttle>,
    paused: bool,
    /// The disks' images are, or are about to be, another's to take.
    gave_images: bool,
    cancelled: bool,
    pause: Pause,
    /// Since when the other side is waited for: the phase began, or a round was sent.
    phase_since: Instant,
    spin_until: Option<Instant>,
    linger_until: Option<Instant>,
    /// This thread and the vCPUs', while the guest stands still and it is this side's turn.
    urgent: Vec<Urgent>,
    started: Instant,
}

impl<'a> Driver<'a> {
    fn new(vm: &'a Arc<Vm>, job: &'a Arc<Job>, order: &'a Order) -> Result<Driver<'a>> {
        let ownership = if order.arbiter.is_some() { Ownership::Arbiter } else { Ownership::Stream };
        let mut hello = guest::hello(vm, ownership)?;
        let (mut arbiter, mut taken) = (None, None);
        if let Some(address) = order.arbiter
            && hello.epoch == Epoch(0)
        {
            let answer = arbiter.insert(Arbiter::new(address, hello.vm_id, hello.owner)).take();
            hello.epoch = answer.map_err(|e| Error::Conflict(format!("the ownership record: {e}")))?;
            taken = Some(hello.epoch);
        }
        if let Route::Tls { ticket, .. } = &order.route
            && !ticket.is_empty()
        {
            hello = hello.with_ticket(ticket.clone());
        }
        let started = Instant::now();
        let description = guest::describe(vm)?;
        log::debug!("prepared to save: {:?}", started.elapsed());
        Ok(Driver {
            vm,
            job,
            taken,
            machine: Source::new(hello, description, order.policy),
            events: VecDeque::new(),
            connection: None,
            arbiter,
            arbiter_address: order.arbiter,
            look_at: Instant::now(),
            watched: None,
            heir: None,
            verify: order.verify,
            route: &order.route,
            forwarder: Forwarder::new(&guest::macs(vm)),
            writer: PageWriter::new(),
            pending: Pending::none(vm.memory()),
            left_out: LeftOut::new(vm.memory()),
            sections: None,
            last_round: Sent::default(),
            skipped: Skipped::default(),
            round_bytes: 0,
            round_started: Instant::now(),
            residue: Residue::new(),
            residue_bytes: 0,
            logging: false,
            throttle: None,
            paused: false,
            gave_images: false,
            cancelled: false,
            pause: Pause::default(),
            phase_since: Instant::now(),
            spin_until: None,
            linger_until: None,
            urgent: Vec::new(),
            started: Instant::now(),
        })
    }

    fn run(mut self) {
        let (job, memory) = (self.job, self.vm.memory().size() as u64);
        match Connection::connect(job.to, self.route, memory, &|| job.cancelled()) {
            Ok(connection) => {
                self.connection = Some(connection);
                self.event(Event::Connected);
            }
            Err(ConnectionError::Stopped) => self.event(Event::Cancel),
            Err(e) => self.event(Event::Disconnected(disconnected(&e))),
        }
        while !self.machine.phase().is_final() {
            self.look();
            if self.events.is_empty() {
                self.sleep();
            }
            while let Some(event) = self.events.pop_front() {
                self.event(event);
            }
        }
        self.report();
        if self.machine.phase() == Phase::Ended {
            // The guest has stood still since before COMMIT and is the destination's: its threads end, and the process.
            self.vm.stop();
        }
    }

    /// Gives an event to the machine and carries out what it says.
    fn event(&mut self, event: Event) {
        self.events.extend(faults::source_hears(&event).map(Event::Failed));
        let before = self.machine.phase();
        log::debug!("source, {}: {}", before.name(), event_name(&event));
        let watched = (before == Phase::Watching).then(|| owner::why_not(&event));
        let actions = self.machine.on_event(event);
        if let Some(why) = watched.filter(|_| self.machine.phase() == Phase::Ended) {
            log::warn!("{why}: the copy here is destroyed");
            self.watched = Some(why);
        }
        if self.machine.phase() != before {
            self.phase_since = Instant::now();
            let (phase, round) = (self.machine.phase(), self.machine.round());
            // Not within the pause: it would only cost.
            if !matches!(phase, Phase::Collecting | Phase::Handing) {
                self.job.update(|s| {
                    s.phase = phase.name().into();
                    s.round = round;
                    if phase == Phase::Unknown {
                        s.state = JobState::Unknown;
                    }
                });
            }
        }
        for action in actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        let failed = faults::source_does(&action);
        match action {
            Action::Send(message) => self.send(&message),
            Action::StartDirtyLog => {
                self.name_heir();
                let started = Instant::now();
                self.logging = true;
                if let Err(e) = self.vm.memory().start_dirty_log(self.vm.fd()) {
                    self.events.push_back(Event::Failed(internal(&e)));
                }
                let log_on = started.elapsed();
                self.pending = Pending::populated(self.vm.memory());
                log::debug!("dirty log on: {log_on:?}; {} pages: {:?}", self.pending.count(), started.elapsed());
            }
            Action::SendRound { round } => {
                if let Err(event) = self.send_round(round) {
                    self.events.push_back(event);
                }
            }
            Action::Throttle(percent) => self.slow_down(percent),
            Action::Measure => {
                let event = self.measure();
                self.events.push_back(event);
            }
            Action::Lull => {
                let event = self.lull();
                self.events.push_back(event);
            }
            Action::Pause => {
                let event = self.stop_guest();
                self.events.push_back(event);
            }
            Action::Collect => {
                let event = self.collect();
                self.events.push_back(event);
            }
            Action::SendFinal { commit } => self.send_final(commit),
            Action::SendCommit(epoch) => self.send_commit(epoch),
            Action::Compete(epoch) => self.compete(epoch),
            Action::Watch => self.watch(),
            Action::Resume(epoch) => self.resume(epoch),
            Action::Linger => self.linger_until = Some(Instant::now() + LINGER),
            Action::Finish => {
                if let Some(mut connection) = self.connection.take() {
                    let _ = connection.send(&Message::Done { frames: self.forwarder.forwarded() });
                }
            }
            Action::Close => self.connection = None,
            Action::TearDown => self.report_ported(),
        }
        if let Some(reason) = failed {
            self.events.push_front(Event::Failed(reason));
        }
    }

    /// The pages that need not be sent, now that the dirty log has been read.
    fn dead(&self) -> Dead {
        if self.skips() { Dead::look(self.vm) } else { Dead::none() }
    }

    fn skips(&self) -> bool {
        self.machine.features() & feature::SKIP != 0
    }

    /// A failure is heard of with what comes from the connection, behind what had come before it.
    fn send(&mut self, message: &Message) {
        if let Some(connection) = &mut self.connection {
            let _ = connection.send(message);
        }
    }

    fn lost(&mut self, e: &ConnectionError) {
        self.connection = None;
        self.events.push_back(match e {
            ConnectionError::Protocol { .. } => Event::Broken(Reason::new(ReasonCode::Protocol, e.to_string())),
            _ => Event::Disconnected(disconnected(e)),
        });
    }

    /// Everything that may have happened outside: the operator, the connection, the arbiter, time, late frames.
    fn look(&mut self) {
        if let Some(here) = self.job.take_resolution() {
            self.events.push_back(Event::Resolve(here));
        }
        if self.job.cancelled() && !self.cancelled {
            self.cancelled = true;
            self.events.push_back(Event::Cancel);
        }
        if !self.cancelled && self.vm.is_to_be_reset() {
            self.cancelled = true;
            self.events.push_back(Event::Failed(reset()));
        }
        if let Some(connection) = &mut self.connection {
            match connection.poll() {
                Ok(None) => {}
                Ok(Some(incoming)) => self.incoming(incoming),
                Err(e) => self.lost(&e),
            }
        }
        match self.machine.phase() {
            Phase::Competing => self.hear_arbiter(),
            Phase::Watching => self.read_record(),
            _ => {}
        }
        use Phase as P;
        if matches!(self.machine.phase(), P::Committed | P::Competing | P::Watching | P::Forwarding | P::Unknown) {
            self.forward();
        }
        if self.linger_until.is_some_and(|t| Instant::now() >= t) {
            self.linger_until = None;
            self.events.push_back(Event::LingerOver);
        }
        if let Some(limit) = self.limit()
            && self.phase_since.elapsed() >= faults::limit(limit)
        {
            self.phase_since = Instant::now();
            self.events.push_back(Event::Timeout);
        }
    }

    fn incoming(&mut self, incoming: Incoming) {
        let Some(connection) = &self.connection else { return };
        match connection.message(incoming) {
            Ok(message) => {
                if let Message::Running { entered, steps, .. } = &message {
                    self.measured(entered, steps);
                    self.report_ported();
                }
                if let Message::Ready { owner, epoch } = message {
                    self.heir = Some((owner, epoch));
                }
                if let Message::Opened { switched, late, waited_ns } = message {
                    let order = OrderReport { switched, late, waited_us: waited_ns / 1000 };
                    self.job.update(|s| s.order = Some(order));
                }
                self.events.push_back(Event::Message(message));
            }
            Err(e) => self.lost(&e),
        }
    }

    /// Frames that reach this side although the VM may already be elsewhere.
    fn forward(&mut self) {
        let keep = !matches!(self.machine.phase(), Phase::Forwarding);
        self.forwarder.ordered = self.machine.features() & feature::ORDER != 0;
        // As with `send`: that it failed is heard of behind what the destination had said, which may be that the VM is to go on here.
        let _ = self.forwarder.turn(self.vm, self.connection.as_mut(), keep);
    }

    /// How long the present phase may take.
    fn limit(&self) -> Option<Duration> {
        limits::of(self.machine.phase(), self.arbiter_address.is_some(), self.pause.digest)
    }

    fn sleep(&mut self) {
        match self.spin_until {
            Some(until) if Instant::now() < until => return std::hint::spin_loop(),
            Some(_) => self.spin_until = None,
            None => {}
        }
        let mut fds = vec![(self.job.as_raw_fd(), Interest::Read)];
        fds.extend(self.connection.as_ref().map(|c| (c.as_raw_fd(), Interest::Read)));
        fds.extend(self.arbiter.as_ref().and_then(Arbiter::descriptor).map(|fd| (fd, Interest::Read)));
        if self.forwarder.wants_frames() && self.machine.past_no_return() {
            fds.extend(guest::taps(self.vm).into_iter().map(|fd| (fd, Interest::Read)));
        }
        let _ = wait(&fds, Some(TICK));
    }

    /// The VM is the destination's.
    fn report_ported(&mut self) {
        self.urgent.clear();
        let (forwarded, stragglers) = (self.forwarder.forwarded(), self.forwarder.stragglers());
        let total = micros(self.started.elapsed());
        self.job.update(|s| {
            s.state = JobState::Completed;
            s.forwarded_frames = forwarded;
            s.stragglers = stragglers;
            s.total_us = total;
        });
    }

    fn report(&mut self) {
        let reason = self.machine.reason().cloned();
        let bytes = self.connection.as_ref().map(|c| c.sent);
        let phase = self.machine.phase();
        let total = micros(self.started.elapsed());
        let watched = self.watched.take();
        self.job.update(|s| {
            if phase == Phase::Resumed {
                s.total_us = total;
            }
            s.phase = phase.name().into();
            s.bytes = bytes.unwrap_or(s.bytes);
            s.error = reason.as_ref().map(|r| r.text.clone());
            if phase == Phase::Resumed {
                let cancelled = reason.is_some_and(|r| r.code == ReasonCode::Cancelled);
                s.state = if cancelled { JobState::Cancelled } else { JobState::Failed };
            } else {
                s.error = watched;
            }
        });
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn internal(e: &crate::Error) -> Reason {
    Reason::new(ReasonCode::Internal, e.to_string())
}

fn state(e: &crate::Error) -> Reason {
    Reason::new(ReasonCode::State, e.to_string())
}

/// What has been sent is of no use: the guest begins again, and that waits for the end of the port.
fn reset() -> Reason {
    Reason::new(ReasonCode::Cancelled, "the guest was reset")
}

fn disconnected(e: &ConnectionError) -> Reason {
    Reason::new(ReasonCode::Disconnected, e.to_string())
}

fn gone() -> Reason {
    Reason::new(ReasonCode::Disconnected, "the connection was lost")
}

fn event_name(event: &Event) -> String {
    match event {
        Event::Message(message) => message.frame_type().name().into(),
        other => format!("{other:?}").chars().take(120).collect(),
    }
}
