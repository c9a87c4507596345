//! Giving a running VM away.
//!
//! Owns the thread of a port and everything that belongs to one attempt. The machine ([`migration::source::Source`]) says
//! what is done; a step that fails is reported to it, never dealt with here. Always true: when the thread ends, the
//! guest runs here as before, or the VM has been stopped because the destination owns it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::convergence::{Policy, RoundStats};
use migration::message::{Message, Ownership, Reason, ReasonCode, Stamp, feature};
use migration::ownership::{Epoch, OwnerId};
use migration::section::Sections;
use migration::source::{Action, Event, Phase, Source};
use migration::wire::{FrameType, STATE_MAX};

use super::arbiter::Arbiter;
use super::connection::{Connection, ConnectionError, Incoming};
use super::faults;
use super::frames::Forwarder;
use super::guest;
use super::job::{Breakdown, Job, JobState, OrderReport, RoundReport};
use super::limits;
use super::residue::Residue;
use super::stamp;
use super::tls::Route;
use super::transfer::{PageWriter, Pending, SendError, Sent};
use super::urgent::Urgent;
use super::wait::{Interest, wait};
use crate::error::Result;
use crate::vm::{Phase as VmPhase, Throttle, Vm};

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

/// The instants of the pause.
#[derive(Debug, Default)]
struct Pause {
    ordered: Option<Stamp>,
    exit: Option<Stamp>,
    breakdown: Breakdown,
    /// What the digest of memory took, if one was asked for.
    digest: Duration,
}

struct Driver<'a> {
    vm: &'a Arc<Vm>,
    job: &'a Arc<Job>,
    machine: Source,
    events: VecDeque<Event>,
    connection: Option<Connection>,
    arbiter: Option<Arbiter>,
    arbiter_address: Option<SocketAddr>,
    /// Who said READY, and the epoch of the record it found.
    heir: Option<(OwnerId, Epoch)>,
    verify: bool,
    route: &'a Route,
    forwarder: Forwarder,
    writer: PageWriter,
    pending: Pending,
    sections: Option<Sections>,
    last_round: Sent,
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
            machine: Source::new(hello, description, order.policy),
            events: VecDeque::new(),
            connection: None,
            arbiter: None,
            arbiter_address: order.arbiter,
            heir: None,
            verify: order.verify,
            route: &order.route,
            forwarder: Forwarder::new(&guest::macs(vm)),
            writer: PageWriter::new(),
            pending: Pending::none(vm.memory()),
            sections: None,
            last_round: Sent::default(),
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
        let actions = self.machine.on_event(event);
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

    fn send(&mut self, message: &Message) {
        let result = match &mut self.connection {
            Some(connection) => connection.send(message),
            None => return,
        };
        if let Err(e) = result {
            self.lost(&e);
        }
    }

    fn lost(&mut self, e: &ConnectionError) {
        self.connection = None;
        self.events.push_back(match e {
            ConnectionError::Protocol { .. } => Event::Broken(Reason::new(ReasonCode::Protocol, e.to_string())),
            _ => Event::Disconnected(disconnected(e)),
        });
    }

    fn send_round(&mut self, round: u32) -> std::result::Result<(), Event> {
        self.round_started = Instant::now();
        let (vm, job) = (self.vm, self.job);
        if round > 0 {
            self.pending.add_own(vm.memory());
            self.pending.add_guest(vm.memory(), vm.fd(), true).map_err(|e| Event::Failed(internal(&e)))?;
        }
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let before = connection.sent;
        let stop = || job.cancelled() || vm.is_to_be_reset();
        let result = self.writer.send(&mut self.pending, vm.memory(), connection, &stop);
        let sent = result.map_err(|e| match e {
            SendError::Memory(e) => Event::Failed(internal(&e)),
            SendError::Connection(ConnectionError::Stopped) => {
                // A frame may be half written: this connection can say nothing more.
                self.connection = None;
                if vm.is_to_be_reset() { Event::Failed(reset()) } else { Event::Cancel }
            }
            SendError::Connection(e) => {
                self.connection = None;
                Event::Disconnected(disconnected(&e))
            }
        })?;
        self.send(&Message::Round { round, pages: sent.pages() });
        // However long that took: memory may be large and the connection slow. What is limited is the wait for the answer.
        self.phase_since = Instant::now();
        self.last_round = sent;
        let bytes = self.connection.as_ref().map_or(before, |c| c.sent);
        self.round_bytes = bytes - before;
        self.job.update(|s| {
            s.bytes = bytes;
            s.round = round;
        });
        Ok(())
    }

    /// The guest writes more than the connection takes: it gets less of its time.
    fn slow_down(&mut self, percent: u8) {
        match &self.throttle {
            Some(throttle) => throttle.set(percent),
            None => match Throttle::begin(self.vm, percent) {
                Ok(throttle) => self.throttle = Some(throttle),
                Err(e) => return self.events.push_back(Event::Failed(internal(&e))),
            },
        }
        log::info!("port {}: the guest is held for {percent} % of its time", self.job.id);
        self.job.update(|s| s.throttle_percent = percent);
    }

    fn measure(&mut self) -> Event {
        let elapsed = self.round_started.elapsed();
        if let Err(e) = guest::flush_disks(self.vm) {
            return Event::Failed(internal(&e));
        }
        let dirty_pages = match self.pending.outlook(self.vm.memory(), self.vm.fd()) {
            Ok(pages) => pages,
            Err(e) => return Event::Failed(internal(&e)),
        };
        let sent = self.last_round;
        self.job.update(|s| {
            s.rounds.push(RoundReport {
                raw_pages: sent.raw,
                zero_pages: sent.zero,
                elapsed_us: micros(elapsed),
                dirty_pages,
            });
        });
        Event::Measured(RoundStats {
            sent_bytes: self.round_bytes,
            elapsed_ns: elapsed.as_nanos() as u64,
            dirty_pages,
            fixed_ns: FIXED_NS,
            ..RoundStats::default()
        })
    }

    fn stop_guest(&mut self) -> Event {
        self.paused = true;
        // First: the blackout begins when the guest last ran, and it may have been held for a while.
        self.throttle = None;
        self.urgent.extend(Urgent::port());
        self.pause.ordered = Some(stamp::now());
        match guest::pause(self.vm, &mut self.urgent) {
            Ok(exit) => {
                self.pause.exit = Some(exit);
                let b = &mut self.pause.breakdown;
                b.stop_us = self.pause.ordered.map_or(0, |o| exit.since(&o) / 1000);
                b.pause_us = stamp::now().since(&exit) / 1000;
                Event::Paused
            }
            Err(_) if self.vm.is_to_be_reset() => Event::Failed(reset()),
            Err(e) => Event::Failed(state(&e)),
        }
    }

    fn collect(&mut self) -> Event {
        let mut clock = Instant::now();
        let mut lap = || {
            let us = micros(clock.elapsed());
            clock = Instant::now();
            us
        };
        let vm = self.vm;
        // Device state first: quiescing may still write to guest memory, which the bitmap then shows.
        if let Err(e) = guest::quiesce(vm) {
            return Event::Failed(state(&e));
        }
        self.pause.breakdown.quiesce_us = lap();
        let saved = guest::save(vm).and_then(|(mut sections, epoch)| {
            if self.verify {
                let began = Instant::now();
                guest::add_digest(vm, &mut sections)?;
                self.pause.digest = began.elapsed();
            }
            Ok((sections, epoch))
        });
        let (sections, epoch) = match saved {
            Ok(saved) => saved,
            Err(e) => return Event::Failed(state(&e)),
        };
        self.pause.breakdown.state_us = lap();
        self.pending.add_own(vm.memory());
        if let Err(e) = self.pending.add_guest(vm.memory(), vm.fd(), false) {
            return Event::Failed(internal(&e));
        }
        self.pause.breakdown.bitmap_us = lap();
        let Some(connection) = &mut self.connection else { return Event::Failed(gone()) };
        self.residue.clear();
        let result = self.residue.collect(&mut self.pending, vm.memory(), connection);
        match result {
            Ok(sent) => self.last_round = sent,
            Err(e) => return Event::Failed(Reason::new(ReasonCode::State, e.to_string())),
        }
        self.pause.breakdown.pages_us = lap();
        // Before the state is sent: it tells the destination that they are free.
        self.gave_images = true;
        if let Err(e) = vm.give_images() {
            return Event::Failed(state(&e));
        }
        self.pause.breakdown.disks_us = lap();
        self.sections = Some(sections);
        Event::Collected(epoch)
    }

    fn send_final(&mut self, commit: Option<Epoch>) {
        let started = Instant::now();
        let (Some(connection), Some(sections)) = (&mut self.connection, self.sections.take()) else {
            self.events.push_back(Event::FinalNotSent(gone()));
            return;
        };
        let mut payload = Vec::new();
        sections.encode(&mut payload);
        if payload.len() > STATE_MAX {
            let text = format!("{} bytes of state, at most {STATE_MAX}", payload.len());
            self.events.push_back(Event::FinalNotSent(Reason::new(ReasonCode::State, text)));
            return;
        }
        let mut rest = connection.seal(FrameType::State, &[&payload]).to_vec();
        rest.append(&mut payload);
        if let Some(epoch) = commit {
            connection.seal_message(&commit_message(epoch, self.pause.exit), &mut rest);
        }
        let before = connection.sent;
        let result = self.residue.write(self.vm.memory(), connection, &rest);
        self.residue_bytes = connection.sent - before;
        self.pause.breakdown.send_us = micros(started.elapsed());
        self.spin_until = commit.is_none().then(|| Instant::now() + SPIN);
        self.sent_final(result);
    }

    fn send_commit(&mut self, epoch: Epoch) {
        let Some(connection) = &mut self.connection else {
            self.events.push_back(Event::FinalNotSent(gone()));
            return;
        };
        let result = connection.send(&commit_message(epoch, self.pause.exit));
        self.spin_until = None;
        self.sent_final(result);
    }

    /// COMMIT is the last frame of what was written: a write that failed did not give all of it to the kernel, and the
    /// connection is closed, so the destination can never get it whole.
    fn sent_final(&mut self, result: std::result::Result<(), ConnectionError>) {
        if let Err(e) = result {
            self.connection = None;
            self.events.push_back(Event::FinalNotSent(disconnected(&e)));
        }
    }

    fn arbiter(&mut self) -> Option<&mut Arbiter> {
        let address = self.arbiter_address?;
        let owner = OwnerId(self.vm.owner().0);
        let vm_id = self.vm.config().vm_id;
        Some(self.arbiter.get_or_insert_with(|| Arbiter::new(address, vm_id, owner)))
    }

    /// Tells the arbiter, while the guest still runs, who may take the VM over: its compare-and-swap in the pause is then not
    /// held up by a disk. Without that the port only takes longer.
    fn name_heir(&mut self) {
        let Some((heir, epoch)) = self.heir else { return };
        match self.arbiter().map(|a| a.name(epoch, Some(heir))) {
            None | Some(Ok(true)) => {}
            Some(Ok(false)) => log::info!("the arbiter does not know this process as the VM's owner: no heir is named"),
            Some(Err(e)) => log::warn!("naming the heir: {e}"),
        }
    }

    fn compete(&mut self, epoch: Epoch) {
        if let Some(arbiter) = self.arbiter() {
            arbiter.compete(epoch);
        }
    }

    /// The guest goes on here, as if nothing had happened.
    fn resume(&mut self, epoch: Option<Epoch>) {
        self.throttle = None;
        if let Some(arbiter) = &mut self.arbiter {
            arbiter.withdraw();
        }
        if self.gave_images && !self.take_images_back() {
            return;
        }
        if self.paused {
            guest::resume(self.vm, epoch, self.forwarder.take_kept());
            self.urgent.clear();
            let paused = self.pause.exit.map(|exit| stamp::now().since(&exit) / 1000);
            self.job.update(|s| s.paused_us = paused);
        }
        if self.logging
            && let Err(e) = self.vm.memory().stop_dirty_log(self.vm.fd())
        {
            log::warn!("the dirty log stays on: {e}");
        }
    }

    /// Waits until nobody else has the disks' images: a guest that goes on would write to what is another's. False if the VM was
    /// ended meanwhile.
    fn take_images_back(&mut self) -> bool {
        let mut told = false;
        while let Err(e) = self.vm.take_images() {
            if self.vm.phase() == VmPhase::Ended {
                return false;
            }
            if !told {
                told = true;
                self.urgent.clear();
                log::error!("the VM stays paused until its disks are free: {e}");
                self.job.update(|s| s.error = Some(format!("the VM stays paused until its disks are free: {e}")));
            }
            std::thread::sleep(guest::TAKE_PAUSE);
        }
        self.gave_images = false;
        true
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
        if self.machine.phase() == Phase::Competing
            && let Some((expected, verdict)) = self.arbiter.as_mut().and_then(Arbiter::poll)
        {
            self.events.push_back(Event::Verdict { expected, verdict });
        }
        if matches!(self.machine.phase(), Phase::Committed | Phase::Competing | Phase::Forwarding | Phase::Unknown) {
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

    /// Puts together what both sides measured.
    fn measured(&mut self, entered: &Stamp, steps: &[u64; 4]) {
        let Some(exit) = self.pause.exit else { return };
        let blackout = entered.since(&exit) / 1000;
        let b = &mut self.pause.breakdown;
        [b.apply_us, b.load_us, b.cas_us, b.run_us] = steps.map(|ns| ns / 1000);
        let known = b.pause_us + b.quiesce_us + b.state_us + b.bitmap_us + b.pages_us + b.disks_us + b.send_us;
        b.transfer_us = blackout.saturating_sub(known + b.apply_us + b.load_us + b.cas_us + b.run_us);
        let (breakdown, pages, bytes) = (b.clone(), self.last_round.pages(), self.residue_bytes);
        self.job.update(|s| {
            s.blackout_us = Some(blackout);
            s.breakdown = Some(breakdown);
            s.residue_pages = pages;
            s.residue_bytes = bytes;
        });
    }

    /// Frames that reach this side although the VM may already be elsewhere.
    fn forward(&mut self) {
        let keep = !matches!(self.machine.phase(), Phase::Forwarding);
        self.forwarder.ordered = self.machine.features() & feature::ORDER != 0;
        let result = self.forwarder.turn(self.vm, self.connection.as_mut(), keep);
        if let Err(e) = result {
            self.lost(&e);
        }
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
                s.error = None;
            }
        });
    }
}

fn commit_message(epoch: Epoch, exit: Option<Stamp>) -> Message {
    Message::Commit { epoch, paused: exit.unwrap_or_default() }
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
