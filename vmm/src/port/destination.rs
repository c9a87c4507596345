//! Taking a VM over.
//!
//! Owns the listening socket and everything made for the VM that is on its way. The machine
//! ([`migration::destination::Destination`]) says what is done. Always true: whatever can fail or allocate is done before
//! READY; the guest runs only when the machine says so; an attempt that fails leaves nothing behind and
//! the next one is waited for.

use std::collections::VecDeque;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use migration::destination::{Action, Destination, Event, Phase};
use migration::message::{Description, Frames, Message, Ownership, Reason, ReasonCode, Stamp, feature};
use migration::ownership::{Epoch, OwnerId};
use migration::pages::Pages;
use migration::section::Sections;
use migration::wire::FrameType;

use super::announce::{self, REPEAT_MS};
use super::arbiter::Arbiter;
use super::connection::{Connection, ConnectionError, Incoming};
use super::faults;
use super::frames::{KEPT_MAX, NetFrame};
use super::guest::{self, Incoming as Shell};
use super::order::Gate;
use super::stamp;
use super::tls::{Credentials, Protection, Security, UNSET};
use super::transfer;
use super::urgent::Urgent;
use super::wait::{Interest, wait};
use crate::boot::info::OwnerId as VmmId;
use crate::config::cli::ReceiveConfig;
use crate::error::{Result, host};
use crate::stats::Stats;
use crate::vm::Vm;

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
/// the source still has the VM, and not behind that. As much as loading the state and the first frames take, in bytes.
const RESERVE: usize = 512 << 10;
/// Stack of the thread of an arrival.
const THREAD_STACK: usize = 256 << 10;
/// Longest sleep, so that work due by time is done.
const TICK: Duration = Duration::from_millis(50);

/// What the process shows about a VM that is on its way.
#[derive(Debug, Default)]
pub struct Progress {
    stop: AtomicBool,
    state: std::sync::Mutex<Shown>,
}

/// See [`Progress::shown`].
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Shown {
    /// Phase of the protocol; empty while nobody is connected.
    pub phase: String,
    /// Who ports.
    pub from: String,
    /// Bytes received.
    pub bytes: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Why the last of them did.
    pub last_error: Option<String>,
    /// Last exit of the last vCPU at the source to first entry here, in microseconds, once the VM runs here.
    pub blackout_us: Option<u64>,
}

impl Progress {
    /// Ends the waiting, unless the VM already runs here.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// How it stands.
    pub fn shown(&self) -> Shown {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What is to happen with a VM that has arrived.
pub trait Arrival {
    /// Called when everything is made, before READY: to start its threads, paused.
    fn prepare(&mut self, vm: &Arc<Vm>) -> Result<()>;
    /// Called when it runs here.
    fn runs(&mut self, vm: &Arc<Vm>);
}

/// Opens the socket a source connects to.
pub fn listen(config: &ReceiveConfig) -> Result<TcpListener> {
    let what = || format!("--receive {}", config.listen);
    let listener = TcpListener::bind(config.listen).map_err(host(what()))?;
    listener.set_nonblocking(true).map_err(host(what()))?;
    Ok(listener)
}

/// Waits for a VM and takes it over; returns when it runs here and the source has gone, or after [`Progress::stop`].
/// Attempts that fail are logged, and the next one is waited for.
pub fn receive(
    listener: &TcpListener,
    config: &ReceiveConfig,
    security: &Security,
    owner: VmmId,
    stats: &Arc<Stats>,
    progress: &Progress,
    arrival: &mut (dyn Arrival + Send),
) -> Result<Option<Arc<Vm>>> {
    log::info!("waiting at {} for a VM", config.listen);
    while !progress.stop.load(Ordering::Acquire) {
        let _ = wait(&[(listener.as_raw_fd(), Interest::Read)], Some(TICK));
        let Ok((socket, peer)) = listener.accept() else { continue };
        log::info!("{peer} ports a VM here");
        // On a thread of its own, which gives its rights up before the guest runs; the next attempt needs them again.
        let attempt = std::thread::scope(|scope| {
            let body = || {
                let protection = security.protection().ok_or(Reason::new(ReasonCode::Permission, UNSET))?;
                let stop = || progress.stop.load(Ordering::Acquire);
                let connection = Connection::accept(socket, peer, &protection, &stop)
                    .map_err(|e| Reason::new(ReasonCode::Permission, e.to_string()))?;
                let door = Door { listener, security, protection };
                Driver::new(config, owner, stats, progress, arrival, door, connection).run()
            };
            let thread = std::thread::Builder::new().name("arrival".into()).stack_size(THREAD_STACK);
            let thread = thread.spawn_scoped(scope, body).map_err(host("thread arrival"))?;
            let panicked = |_| Err(Reason::new(ReasonCode::Internal, "the thread of the arrival had panicked"));
            Ok(thread.join().unwrap_or_else(panicked))
        });
        match attempt? {
            Ok(vm) => return Ok(Some(vm)),
            Err(reason) => {
                log::warn!("the VM did not come: {}", reason.text);
                let mut shown = progress.lock();
                shown.failed += 1;
                shown.last_error = Some(reason.text);
                shown.phase.clear();
            }
        }
    }
    Ok(None)
}

/// The source's connection says that this host is taken: in the clear, as for a session there is no time.
fn accept(listener: &TcpListener) -> Option<Connection> {
    let (socket, peer): (TcpStream, _) = listener.accept().ok()?;
    Connection::new(socket, peer).map_err(|e| log::warn!("{e}")).ok()
}

/// Who is let in.
struct Door<'a> {
    listener: &'a TcpListener,
    security: &'a Security,
    protection: Protection,
}

impl Door<'_> {
    /// Looks at the ticket and the names before the machine sees HELLO.
    fn admit(&self, message: &Message, connection: &Connection) -> std::result::Result<(), Reason> {
        let (Message::Hello(hello), Protection::Tls(credentials)) = (message, &self.protection) else {
            let carries = matches!(message, Message::Hello(hello) if !hello.ticket.is_empty());
            let text = "a ticket can only be checked with TLS, which is off here";
            return if carries { Err(Reason::new(ReasonCode::Permission, text)) } else { Ok(()) };
        };
        let credentials: &Credentials = credentials;
        let peer = connection.certificate().ok_or(Reason::new(ReasonCode::Permission, "no certificate"))?;
        self.security.admit(credentials, hello, peer)
    }
}

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
    touched: Vec<u64>,
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
    /// This thread and the vCPU's, from the end of the first round until the guest runs.
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
            touched: Vec::new(),
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
                    if std::env::var_os("NOLATER").is_none() {
                        announce::later(&shell.vm, self.run_at.unwrap_or_else(Instant::now));
                    }
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
            Action::Destroy => {
                self.urgent.clear();
                if let Some(arbiter) = &mut self.arbiter {
                    arbiter.withdraw();
                    // An arbiter that was restarted waits for this, should the source compete with it.
                    if let Err(e) = arbiter.name(self.found, None) {
                        log::warn!("giving the VM up: {e}");
                    }
                }
                if let Some(shell) = self.shell.take() {
                    shell.vm.stop();
                }
            }
            Action::Close => self.connection = None,
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

    fn prepare(&mut self, description: &Description) -> std::result::Result<Epoch, Reason> {
        let shell = guest::build(description, self.config, self.owner, self.stats)?;
        let failed = |e: crate::Error| Reason::new(ReasonCode::Internal, e.to_string());
        self.arrival.prepare(&shell.vm).map_err(failed)?;
        self.touched = vec![0; shell.vm.memory().bitmap_words()];
        let arbitrated = self.machine.hello().is_some_and(|h| h.ownership == Ownership::Arbiter);
        let mut epoch = Epoch(0);
        if arbitrated {
            let lacking = || Reason::new(ReasonCode::Arbiter, "no arbiter is configured here");
            let address = shell.vm.config().arbiter.ok_or_else(lacking)?;
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
        let result = guest::load(shell, &sections);
        self.load_took = started.elapsed();
        self.loaded_at = Some(Instant::now());
        match result {
            Ok(()) => Event::Loaded,
            Err(e) => Event::Failed(Reason::new(ReasonCode::State, e.to_string())),
        }
    }

    fn start(&mut self, epoch: Option<Epoch>) {
        let Some(shell) = &self.shell else { return };
        let vm = shell.vm.clone();
        self.run_at = Some(Instant::now());
        // What is in the taps now came by flooding, and to the source before the announcement can.
        guest::discard_frames(&shell.vm);
        let ordered = self.machine.features() & feature::ORDER != 0;
        if ordered {
            guest::hold_taps(&shell.vm);
        }
        for frame in self.frames.drain(..) {
            guest::inject(&shell.vm, &frame);
        }
        if let Err(e) = guest::start(shell, epoch) {
            // The VM is ours and cannot run: that is a crash of the VM, as any other error of KVM.
            log::error!("the VM that arrived cannot run: {e}");
            shell.vm.stop();
        }
        self.announce();
        self.gate = Some(Gate::new(guest::nets(&vm), Instant::now(), ordered));
        self.arrival.runs(&vm);
    }

    /// Opens the taps that have waited long enough; tells the source when all are open.
    fn gate(&mut self, quiet: bool) {
        let (Some(shell), Some(gate)) = (&self.shell, &mut self.gate) else { return };
        for device in gate.overdue(Instant::now(), self.connection.is_none(), quiet) {
            guest::open_tap(&shell.vm, device, |frame| gate.is_new(device, frame));
        }
        if self.machine.phase() == Phase::Running
            && !self.told
            && let Some(opened) = gate.result()
        {
            self.told = true;
            log::debug!("{opened:?}");
            self.events.push_back(Event::Opened(Message::Opened {
                switched: opened.switched,
                late: opened.late,
                waited_ns: opened.waited.as_nanos() as u64,
            }));
        }
    }

    /// All that came to the source before the announcement has been injected.
    fn switched(&mut self, device: u32) {
        let (Some(shell), Some(gate)) = (&self.shell, &mut self.gate) else { return };
        if gate.switch(device, Instant::now()) {
            guest::open_tap(&shell.vm, device, |frame| gate.is_new(device, frame));
        }
    }

    /// Sends the announcements that are due.
    fn announce(&mut self) {
        let (Some(at), Some(shell)) = (self.run_at, &self.shell) else { return };
        while let Some(due) = REPEAT_MS.get(self.announced)
            && at.elapsed() >= Duration::from_millis(*due)
        {
            guest::announce(&shell.vm);
            self.announced += 1;
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
            self.announce();
            self.gate(quiet);
        }
        if self.heard.elapsed() > faults::limit(self.limit()) {
            self.heard = Instant::now();
            self.events.push_back(Event::Timeout);
        }
    }

    fn entered(&mut self) {
        let Some(shell) = &self.shell else { return };
        if let Some(entered) = guest::entered(&shell.vm) {
            let run = self.run_at.map_or(Duration::ZERO, |at| at.elapsed());
            let late = stamp::now().since(&entered);
            let steps = [self.applied, self.load_took, self.cas_took, run].map(|d| d.as_nanos() as u64);
            let steps = [steps[0], steps[1], steps[2], steps[3].saturating_sub(late)];
            let epoch = Epoch(guest::epoch(&shell.vm));
            self.urgent.clear();
            self.progress.lock().blackout_us = self.paused.map(|p| entered.since(&p) / 1000);
            self.events.push_back(Event::Entered(Message::Running { epoch, entered, steps }));
        } else if shell.vm.end().is_some() {
            // It ended before its first entry; the source must not wait for it.
            self.connection = None;
            let running = Message::Running { epoch: Epoch(0), entered: stamp::now(), steps: [0; 4] };
            self.events.push_back(Event::Disconnected(Reason::new(ReasonCode::Internal, "the VM ended")));
            self.events.push_back(Event::Entered(running));
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
                    let pages =
                        Pages::parse(connection.payload(), &memory.ranges()).map_err(|e| connection.protocol(e))?;
                    if let Err(e) = transfer::apply(&pages, memory, &mut self.touched) {
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
        let tick = match (self.run_at, REPEAT_MS.get(self.announced)) {
            (Some(at), Some(due)) => Duration::from_millis(*due).saturating_sub(at.elapsed()),
            _ if self.machine.phase() == Phase::Starting => Duration::from_micros(50),
            _ => TICK,
        };
        let tick = self.gate.as_ref().and_then(|g| g.left(Instant::now())).map_or(tick, |left| left.min(tick));
        let _ = wait(&fds, Some(tick));
    }
}
