//! The life of a VM: start, pause, resume, end; its threads.
//!
//! Owns what is wanted of the vCPU threads and where they are. Always true: changes of either happen under one lock, so a kick
//! for what is wanted is never lost, and whoever waits for a phase sees it. The VM is paused when no vCPU thread is in the
//! guest, and has ended, once, when the last of them has; how is said by the vCPU that ended first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;

use super::Vm;
use crate::error::{Error, Result, host};
use crate::event::Token;
use crate::gate::Gate;
use crate::sandbox::{self, Kind};
use crate::stats::BootTimes;
use crate::vcpu::{self, Context, End, Kicker, Outcome, Vcpu};
use crate::virtio::Progress;

/// Stack of the vCPU and I/O threads.
const THREAD_STACK: usize = 256 << 10;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not started yet.
    Created,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped and can be continued.
    Paused,
    /// Over.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Pause,
    Stop,
}

struct LifeState {
    want: Want,
    phase: Phase,
    /// vCPU threads are not to go to the guest although they are wanted to run: the guest is slowed down.
    held: bool,
    /// vCPU threads that exist.
    threads: usize,
    /// vCPU threads that are in the guest, or on their way there or back.
    inside: usize,
    end: Option<End>,
}

/// What is wanted of the vCPU threads and where they are.
pub(super) struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
    on_end: Mutex<Option<OnEnd>>,
    gate: Arc<Gate>,
    kickers: Vec<Kicker>,
    /// CLOCK_MONOTONIC when, after none was, a vCPU thread last went to the guest, and when the last one last came back.
    entered_ns: AtomicU64,
    exited_ns: AtomicU64,
}

type OnEnd = Box<dyn FnOnce(&End) + Send>;

impl Life {
    pub(super) fn new(gate: Arc<Gate>, vcpus: usize) -> Life {
        Life {
            state: Mutex::new(LifeState {
                want: Want::Run,
                phase: Phase::Created,
                held: false,
                threads: 0,
                inside: 0,
                end: None,
            }),
            changed: Condvar::new(),
            on_end: Mutex::new(None),
            gate,
            kickers: (0..vcpus).map(|_| Kicker::default()).collect(),
            entered_ns: AtomicU64::new(0),
            exited_ns: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LifeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls all vCPU threads out of the guest, until [`Gate::clear_kick`]; under the lock.
    fn kick(&self) {
        self.gate.kick();
        self.kickers.iter().for_each(Kicker::signal);
    }

    fn order_pause(&self) -> MutexGuard<'_, LifeState> {
        let mut state = self.lock();
        if state.want == Want::Run {
            state.want = Want::Pause;
            self.kick();
            // Threads that are still on their way to their first instruction find out there.
            if state.inside == 0 && state.threads > 0 {
                state.phase = Phase::Paused;
            }
        }
        state
    }

    /// A vCPU thread wants to go to the guest: waits until it may. Says whether it is the first to go; `None`: it must end.
    fn go(&self) -> Option<bool> {
        let mut state = self.lock();
        while state.want == Want::Pause || state.held && state.want == Want::Run {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.want == Want::Stop {
            return None;
        }
        state.phase = Phase::Running;
        state.inside += 1;
        Some(state.inside == 1)
    }

    /// The thread is back, the vCPU's state can be read; `end`: that of the VM, if it has ended.
    fn came_back(&self, end: Option<&End>) {
        let mut state = self.lock();
        if let Some(end) = end {
            self.end(&mut state, end);
        }
        state.inside -= 1;
        if state.inside == 0 {
            if state.want == Want::Pause {
                state.phase = Phase::Paused;
            }
            self.changed.notify_all();
        }
    }

    /// Keeps the vCPU threads out of the guest, or lets them go on, while the VM counts as running.
    pub(super) fn hold(&self, hold: bool) {
        let mut state = self.lock();
        if state.held == hold {
            return;
        }
        state.held = hold;
        if state.want != Want::Run {
            return;
        }
        if hold {
            self.kick();
        } else {
            self.gate.clear_kick();
            self.changed.notify_all();
        }
    }

    /// The VM is to end like this; the first call counts.
    fn end(&self, state: &mut LifeState, end: &End) {
        state.end.get_or_insert_with(|| end.clone());
        state.want = Want::Stop;
        self.kick();
        self.changed.notify_all();
    }

    /// A vCPU thread is no more, and with the last one the VM.
    fn over(&self) {
        let mut state = self.lock();
        self.end(&mut state, &End::Stopped);
        state.threads -= 1;
        if state.threads > 0 {
            return;
        }
        state.phase = Phase::Ended;
        let end = state.end.clone();
        drop(state);
        let on_end = self.on_end.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(on_end), Some(end)) = (on_end, end) {
            on_end(&end);
        }
    }
}

impl Vm {
    /// Starts the threads; the guest runs unless [`Vm::pause`] came first. `on_end` is called on a vCPU's thread
    /// when the VM has ended.
    pub fn start(&self, on_end: impl FnOnce(&End) + Send + 'static) -> Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if !threads.is_empty() {
            return Err(Error::Conflict("the VM has already been started".into()));
        }
        vcpu::install_kick_handler()?;
        *self.life.on_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(on_end));
        {
            let mut state = self.life.lock();
            state.threads = self.vcpus.len();
            if state.want == Want::Pause {
                state.phase = Phase::Paused;
            }
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let (context, life, vcpu) = (self.context.clone(), self.life.clone(), vcpu.clone());
            match spawn(&format!("vcpu{index}"), move || vcpu_thread(&context, &life, index, &vcpu)) {
                Ok(thread) => threads.push(thread),
                Err(e) => {
                    // For those that do not exist; those that do end by themselves.
                    (index..self.vcpus.len()).for_each(|_| self.life.over());
                    return Err(e);
                }
            }
        }
        let (context, stop) = (self.context.clone(), self.io_stop.clone());
        threads.push(spawn("io", move || io_thread(&context, &stop.0))?);
        Ok(())
    }

    /// Where the VM is in its life.
    pub fn phase(&self) -> Phase {
        self.life.lock().phase
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<End> {
        let state = self.life.lock();
        if state.phase == Phase::Ended { state.end.clone() } else { None }
    }

    /// Tells the vCPUs to stop, and does not wait for it as [`Vm::pause`] does.
    pub fn order_pause(&self) {
        drop(self.life.order_pause());
    }

    /// Stops the vCPUs and waits until all have stopped. Paused already is no error, ended is.
    pub fn pause(&self) -> Result<()> {
        let life = &self.life;
        let mut state = life.order_pause();
        while state.want == Want::Pause && state.inside > 0 || state.want == Want::Stop && state.threads > 0 {
            state = life.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match (state.want, state.phase) {
            (Want::Stop, _) | (_, Phase::Ended) => Err(Error::Conflict("the VM has ended".into())),
            (Want::Run, _) => Err(Error::Conflict("the VM was resumed at the same time".into())),
            (Want::Pause, _) => Ok(()),
        }
    }

    /// Lets the vCPUs run again. Running already is no error, ended is.
    pub fn resume(&self) -> Result<()> {
        let mut state = self.life.lock();
        if state.want == Want::Stop {
            return Err(Error::Conflict("the VM has ended".into()));
        }
        if state.phase == Phase::Paused {
            self.tell_of_pause();
            state.phase = Phase::Running;
        }
        state.want = Want::Run;
        self.life.gate.clear_kick();
        self.life.changed.notify_all();
        Ok(())
    }

    /// Ends the VM from outside and waits for its threads.
    pub fn stop(&self) {
        {
            let mut state = self.life.lock();
            state.want = Want::Stop;
            self.life.kick();
            self.life.changed.notify_all();
        }
        self.io_stop.0.store(true, Ordering::Release);
        let _ = self.io_stop.1.write(1);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the VM had panicked");
            }
        }
    }

    /// When, after a pause, the first vCPU thread last went to the guest, on CLOCK_MONOTONIC; 0: never.
    pub fn last_entry_ns(&self) -> u64 {
        self.life.entered_ns.load(Ordering::Acquire)
    }

    /// When the last vCPU thread last came back from the guest to stop, on CLOCK_MONOTONIC; 0: never.
    pub fn last_exit_ns(&self) -> u64 {
        self.life.exited_ns.load(Ordering::Acquire)
    }

    /// Ids of the vCPUs' threads that exist.
    pub fn vcpu_threads(&self) -> impl Iterator<Item = i32> + '_ {
        self.life.kickers.iter().map(Kicker::tid).filter(|tid| *tid != 0)
    }
}

pub(super) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(THREAD_STACK)
        .spawn(body)
        .map_err(host(format!("thread {name}")))
}

fn vcpu_thread(context: &Context, life: &Life, index: usize, vcpu: &Mutex<Vcpu>) {
    // An index of a vCPU is one of a kicker: both were made together.
    let kicker = &life.kickers[index];
    kicker.enter();
    let confined = sandbox::confine(Kind::Vcpu);
    // SAFETY: no memory is involved. Park deadlines are meant to the microsecond.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
    while let Some(first) = life.go() {
        if let Err(e) = &confined {
            life.came_back(Some(&End::Crash(e.to_string())));
            continue;
        }
        BootTimes::reach(&context.stats.boot.run);
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        if first {
            life.entered_ns.store(monotonic_ns(), Ordering::Release);
        }
        let outcome = vcpu.run(context);
        life.exited_ns.fetch_max(monotonic_ns(), Ordering::AcqRel);
        drop(vcpu);
        match outcome {
            Outcome::Kicked => life.came_back(None),
            Outcome::Ended(end) => life.came_back(Some(&end)),
        }
    }
    kicker.leave();
    life.over();
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic_ns() -> u64 {
    crate::port::stamp::clock_ns(libc::CLOCK_MONOTONIC)
}

fn io_thread(context: &Context, stop: &AtomicBool) {
    if let Err(e) = sandbox::confine(Kind::Io) {
        log::error!("the I/O thread cannot be confined, so no device is served: {e}");
        return;
    }
    while !stop.load(Ordering::Acquire) {
        let ready = context.events.io.wait(None);
        if ready.is_empty() {
            continue;
        }
        for token in ready.iter().filter(|t| *t != Token::Wake) {
            // The lock is given up in between, so that a long queue does not keep the guest from the other devices.
            while context.devices.lock().unwrap_or_else(PoisonError::into_inner).handle(token) == Progress::More {}
        }
    }
}
