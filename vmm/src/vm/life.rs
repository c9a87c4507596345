//! The life of a VM: pause, resume, reset, end.
//!
//! Owns what is wanted of the vCPU threads and where they are. Always true: changes of either happen under one lock, so a kick
//! for what is wanted is never lost, and whoever waits for a phase sees it. The VM is paused when no vCPU thread is in the
//! guest, and has ended, once, when the last of them has; how is said by the vCPU that ended first. A reset keeps all of them out of
//! the guest from when it is wanted until it is over; the thread that finds them all out carries it out, once nobody copies the VM's
//! memory. Guests that reset themselves without end do so at [`RESETS`] only.

mod threads;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Vm;
use super::reset::ResetCause;
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::limit::{Bucket, Rate};
use crate::vcpu::{End, Kicker};
pub(super) use threads::spawn;

/// Resets a second that a guest may cause, and how many at once: a guest that crashes early in its boot does not keep the host busy
/// with loading it, and the log from showing anything else.
const RESETS: Rate = Rate { rate: 1, burst: Some(20) };

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
    /// A reset that is wanted, until it is over.
    reset: Option<ResetCause>,
    /// A thread carries it out.
    resetting: bool,
    /// Resets that are over.
    resets: u64,
    /// Somebody has the right to the dirty log.
    copied: bool,
    /// It was being copied when it ended.
    ended_copied: bool,
    pace: Bucket,
}

/// What a vCPU thread does next.
enum Next {
    /// Go to the guest; whether it is the first to go.
    Enter(bool),
    Reset(ResetCause),
    End,
}

/// What is wanted of the vCPU threads and where they are.
pub(super) struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
    on_end: Mutex<Option<OnEnd>>,
    gate: Arc<Gate>,
    kickers: Vec<Kicker>,
    /// A reset by the guest is no end.
    reboots: bool,
    born: Instant,
    /// CLOCK_MONOTONIC when, after none was, a vCPU thread last went to the guest, and when the last one last came back.
    entered_ns: AtomicU64,
    exited_ns: AtomicU64,
}

type OnEnd = Box<dyn FnOnce(&End) + Send>;

impl Life {
    pub(super) fn new(gate: Arc<Gate>, vcpus: usize, reboots: bool) -> Life {
        Life {
            state: Mutex::new(LifeState {
                want: Want::Run,
                phase: Phase::Created,
                held: false,
                threads: 0,
                inside: 0,
                end: None,
                reset: None,
                resetting: false,
                resets: 0,
                copied: false,
                ended_copied: false,
                pace: Bucket::new(&RESETS, Duration::ZERO),
            }),
            reboots,
            born: Instant::now(),
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

    /// The vCPU threads are to leave the guest. True if it was this call that said so.
    fn order_pause(&self) -> (MutexGuard<'_, LifeState>, bool) {
        let mut state = self.lock();
        let ours = state.want == Want::Run;
        if ours {
            state.want = Want::Pause;
            self.kick();
            // Threads that are still on their way to their first instruction find out there.
            if state.inside == 0 && state.threads > 0 {
                state.phase = Phase::Paused;
            }
        }
        (state, ours)
    }

    /// A vCPU thread wants to go to the guest: waits until it may, or has to do something else.
    fn go(&self) -> Next {
        let mut state = self.lock();
        loop {
            match (state.want, state.reset) {
                (Want::Stop, _) => return Next::End,
                (_, Some(cause)) if !state.resetting && state.inside == 0 && !state.copied => {
                    let rest = match cause {
                        ResetCause::Operator => Duration::ZERO,
                        _ => state.pace.wait(1, self.born.elapsed()),
                    };
                    if rest.is_zero() {
                        if cause != ResetCause::Operator {
                            state.pace.charge(1);
                        }
                        state.resetting = true;
                        return Next::Reset(cause);
                    }
                    state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
                (Want::Run, None) if !state.held => {
                    state.phase = Phase::Running;
                    state.inside += 1;
                    return Next::Enter(state.inside == 1);
                }
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The thread is back, the vCPU's state can be read; `end`: that of the VM, if it has ended.
    fn came_back(&self, end: Option<&End>) {
        let mut state = self.lock();
        match (end, end.and_then(ResetCause::of_end)) {
            (Some(_), Some(cause)) if self.reboots => self.want_reset(&mut state, cause),
            (Some(end), _) => self.end(&mut state, end),
            (None, _) => {}
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
            self.let_go(&state);
            self.changed.notify_all();
        }
    }

    /// Ends the kick, if nothing keeps the vCPUs out of the guest any more.
    fn let_go(&self, state: &LifeState) {
        if state.want == Want::Run && !state.held && state.reset.is_none() {
            self.gate.clear_kick();
        }
    }

    fn want_reset(&self, state: &mut LifeState, cause: ResetCause) {
        state.reset.get_or_insert(cause);
        self.kick();
        self.changed.notify_all();
    }

    /// A reset from outside; waits until it is over.
    pub(super) fn reset(&self) -> Result<()> {
        let mut state = self.lock();
        if state.copied {
            return Err(Error::Conflict("a port or a checkpoint of the VM is under way".into()));
        }
        match (state.want, state.phase) {
            (Want::Stop, _) | (_, Phase::Ended) => return Err(ended()),
            (_, Phase::Created) => return Err(Error::Conflict("the VM has not been started yet".into())),
            _ => {}
        }
        self.want_reset(&mut state, ResetCause::Operator);
        let over = state.resets + 1;
        while state.want != Want::Stop && state.resets < over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.resets < over { Err(ended()) } else { Ok(()) }
    }

    pub(super) fn is_to_be_reset(&self) -> bool {
        self.lock().reset.is_some()
    }

    /// The reset that [`Life::go`] has given to a thread is over.
    fn reset_is_over(&self, result: Result<()>) {
        let mut state = self.lock();
        (state.reset, state.resetting) = (None, false);
        match result {
            Ok(()) => {
                state.resets += 1;
                self.let_go(&state);
            }
            Err(e) => self.end(&mut state, &End::Crash(format!("the VM cannot begin again: {e}"))),
        }
        self.changed.notify_all();
    }

    /// The right to copy memory by the dirty log; there is one.
    pub(super) fn begin_copy(&self) -> Result<()> {
        let mut state = self.lock();
        if state.copied {
            return Err(Error::Conflict("a port or a checkpoint of the VM is under way".into()));
        }
        if state.reset.is_some() {
            return Err(Error::Conflict("the VM is being reset".into()));
        }
        state.copied = true;
        Ok(())
    }

    pub(super) fn end_copy(&self) {
        self.lock().copied = false;
        self.changed.notify_all();
    }

    pub(super) fn ended_copied(&self) -> bool {
        self.lock().ended_copied
    }

    pub(super) fn is_copied(&self) -> bool {
        self.lock().copied
    }

    /// The VM is to end like this; the first call counts.
    fn end(&self, state: &mut LifeState, end: &End) {
        if state.end.is_none() {
            state.end = Some(end.clone());
            state.ended_copied = state.copied;
        }
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
        let (mut state, ours) = life.order_pause();
        while match state.want {
            Want::Run => false,
            Want::Pause => state.inside > 0 || state.reset.is_some() && !state.copied,
            Want::Stop => state.threads > 0,
        } {
            state = life.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.want == Want::Pause && state.reset.is_some() {
            // The reset waits for the one who copies memory, and for a copy there is nothing left to pause.
            if ours {
                (state.want, state.phase) = (Want::Run, Phase::Running);
                life.changed.notify_all();
            }
            return Err(Error::Conflict("the VM is being reset".into()));
        }
        match (state.want, state.phase) {
            (Want::Stop, _) | (_, Phase::Ended) => Err(ended()),
            (Want::Run, _) => Err(Error::Conflict("the VM was resumed at the same time".into())),
            (Want::Pause, _) => Ok(()),
        }
    }

    /// Lets the vCPUs run again. Running already is no error, ended is.
    pub fn resume(&self) -> Result<()> {
        let mut state = self.life.lock();
        if state.want == Want::Stop {
            return Err(ended());
        }
        if state.phase == Phase::Paused {
            self.tell_of_pause();
            state.phase = Phase::Running;
        }
        state.want = Want::Run;
        self.life.let_go(&state);
        self.life.changed.notify_all();
        Ok(())
    }

    /// When, after a pause, the first vCPU thread last went to the guest, on CLOCK_MONOTONIC; 0: never.
    pub fn last_entry_ns(&self) -> u64 {
        self.life.entered_ns.load(Ordering::Acquire)
    }

    /// When the last vCPU thread last came back from the guest to stop, on CLOCK_MONOTONIC; 0: never.
    pub fn last_exit_ns(&self) -> u64 {
        self.life.exited_ns.load(Ordering::Acquire)
    }

    /// How long no vCPU ran at the last pause, from last exit to first entry, in nanoseconds; `None` before the first, and
    /// during one.
    pub fn stood_still_ns(&self) -> Option<u64> {
        let (left, entered) = (self.last_exit_ns(), self.last_entry_ns());
        (left != 0).then(|| entered.checked_sub(left)).flatten()
    }
}

fn ended() -> Error {
    Error::Conflict("the VM has ended".into())
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic_ns() -> u64 {
    crate::port::stamp::clock_ns(libc::CLOCK_MONOTONIC)
}
