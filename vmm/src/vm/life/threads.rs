//! The threads of a VM: one a vCPU, and one for I/O.
//!
//! Always true: a vCPU's thread does what [`Life`] says next, and tells it when it is back; the last that ends ends the VM.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::{Life, Next, Phase, Want, monotonic_ns};
use crate::error::{Error, Result, host};
use crate::sandbox::{self, Kind};
use crate::schedule;
use crate::stats::BootTimes;
use crate::vcpu::{self, Context, End, Kicker, Outcome, Vcpu};
use crate::vm::Vm;
use crate::vm::io::io_thread;
use crate::vm::reset::Restart;

/// Stack of the vCPU and I/O threads.
const THREAD_STACK: usize = 256 << 10;

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
        let restart = Restart::of(self).map(Arc::new);
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let (context, life, vcpu) = (self.context.clone(), self.life.clone(), vcpu.clone());
            let restart = restart.clone();
            let body = move || vcpu_thread(&context, &life, index, &vcpu, restart.as_deref());
            match spawn(&format!("vcpu{index}"), body) {
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

    /// Ids of the vCPUs' threads that exist.
    pub fn vcpu_threads(&self) -> impl Iterator<Item = i32> + '_ {
        self.life.kickers.iter().map(Kicker::tid).filter(|tid| *tid != 0)
    }
}

pub(in crate::vm) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(THREAD_STACK)
        .spawn(body)
        .map_err(host(format!("thread {name}")))
}

fn vcpu_thread(context: &Context, life: &Life, index: usize, vcpu: &Mutex<Vcpu>, restart: Option<&Restart>) {
    // An index of a vCPU is one of a kicker: both were made together.
    let kicker = &life.kickers[index];
    kicker.enter();
    schedule::prompt();
    let confined = sandbox::confine(Kind::Vcpu);
    // SAFETY: no memory is involved. Park deadlines are meant to the microsecond.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
    loop {
        let first = match life.go() {
            Next::Enter(first) => first,
            Next::Reset(cause) => {
                let nothing = || Err(Error::State("nothing to begin from".into()));
                life.reset_is_over(restart.map_or_else(nothing, |r| r.perform(cause)));
                continue;
            }
            Next::End => break,
        };
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
