//! The life of a VM: start, pause, resume, end; its threads.
//!
//! Owns what is wanted of the vCPU thread and where it is. Always true: changes of either happen under one lock, so a kick
//! for what is wanted is never lost, and whoever waits for a phase sees it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;

use super::Vm;
use crate::error::{Error, Result, host};
use crate::event::Token;
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
    /// The vCPU runs.
    Running,
    /// The vCPU is stopped and can be continued.
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
    started: bool,
    end: Option<End>,
}

/// What is wanted of the vCPU thread and where it is.
pub(super) struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
    on_end: Mutex<Option<OnEnd>>,
    /// CLOCK_MONOTONIC when the vCPU thread last went to the guest, and last came back to stop.
    entered_ns: AtomicU64,
    exited_ns: AtomicU64,
}

type OnEnd = Box<dyn FnOnce(&End) + Send>;

impl Life {
    pub(super) fn new() -> Life {
        Life {
            state: Mutex::new(LifeState { want: Want::Run, phase: Phase::Created, started: false, end: None }),
            changed: Condvar::new(),
            on_end: Mutex::new(None),
            entered_ns: AtomicU64::new(0),
            exited_ns: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LifeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    /// Starts the threads; the guest runs unless [`Vm::pause`] came first. `on_end` is called on the vCPU's thread
    /// when the VM has ended.
    pub fn start(&self, on_end: impl FnOnce(&End) + Send + 'static) -> Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if !threads.is_empty() {
            return Err(Error::Conflict("the VM has already been started".into()));
        }
        vcpu::install_kick_handler()?;
        *self.life.on_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(on_end));
        self.life.lock().started = true;
        let (context, life, kicker, vcpu) =
            (self.context.clone(), self.life.clone(), self.kicker.clone(), self.vcpu.clone());
        threads.push(spawn("vcpu0", move || vcpu_thread(&context, &life, &kicker, &vcpu))?);
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
        self.life.lock().end.clone()
    }

    /// Stops the vCPU and waits until it has stopped. Paused already is no error, ended is.
    pub fn pause(&self) -> Result<()> {
        let mut state = self.life.lock();
        if state.want == Want::Run {
            state.want = Want::Pause;
            self.kicker.kick(&self.context.gate);
        }
        self.life.changed.notify_all();
        while state.phase == Phase::Running || state.started && state.phase == Phase::Created {
            state = self.life.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match state.phase {
            Phase::Ended => Err(Error::Conflict("the VM has ended".into())),
            _ => Ok(()),
        }
    }

    /// Lets the vCPU run again. Running already is no error, ended is.
    pub fn resume(&self) -> Result<()> {
        let mut state = self.life.lock();
        if state.phase == Phase::Ended {
            return Err(Error::Conflict("the VM has ended".into()));
        }
        state.want = Want::Run;
        if state.phase == Phase::Paused {
            state.phase = Phase::Running;
        }
        self.life.changed.notify_all();
        Ok(())
    }

    /// Ends the VM from outside and waits for its threads.
    pub fn stop(&self) {
        {
            let mut state = self.life.lock();
            state.want = Want::Stop;
            self.kicker.kick(&self.context.gate);
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

    /// When the vCPU thread last went to the guest, on CLOCK_MONOTONIC; 0: never.
    pub fn last_entry_ns(&self) -> u64 {
        self.life.entered_ns.load(Ordering::Acquire)
    }

    /// When the vCPU thread last came back from the guest to stop, on CLOCK_MONOTONIC; 0: never.
    pub fn last_exit_ns(&self) -> u64 {
        self.life.exited_ns.load(Ordering::Acquire)
    }

    /// Id of the vCPU's thread; 0: there is none.
    pub fn vcpu_thread(&self) -> i32 {
        self.kicker.tid()
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(THREAD_STACK)
        .spawn(body)
        .map_err(host(format!("thread {name}")))
}

fn vcpu_thread(context: &Context, life: &Life, kicker: &Kicker, vcpu: &Mutex<Vcpu>) {
    kicker.enter();
    // SAFETY: no memory is involved. Park deadlines are meant to the microsecond.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
    let end = loop {
        {
            let mut state = life.lock();
            while state.want == Want::Pause {
                state.phase = Phase::Paused;
                life.changed.notify_all();
                state = life.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.want == Want::Stop {
                break End::Stopped;
            }
            // Under the lock: a kick for what is wanted from now on comes after this.
            context.gate.clear_kick();
            state.phase = Phase::Running;
            life.changed.notify_all();
        }
        BootTimes::reach(&context.stats.boot.run);
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        life.entered_ns.store(monotonic_ns(), Ordering::Release);
        let outcome = vcpu.run(context);
        life.exited_ns.store(monotonic_ns(), Ordering::Release);
        drop(vcpu);
        if let Outcome::Ended(end) = outcome {
            break end;
        }
    };
    kicker.leave();
    let on_end = life.on_end.lock().unwrap_or_else(PoisonError::into_inner).take();
    {
        let mut state = life.lock();
        state.phase = Phase::Ended;
        state.end = Some(end.clone());
        life.changed.notify_all();
    }
    if let Some(on_end) = on_end {
        on_end(&end);
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic_ns() -> u64 {
    crate::port::stamp::clock_ns(libc::CLOCK_MONOTONIC)
}

fn io_thread(context: &Context, stop: &AtomicBool) {
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
