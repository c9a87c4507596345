//! A vCPU: its run loop, its park, its kick.
//!
//! Owns the vCPU's descriptor. Always true: a kick that was given before or while the vCPU runs makes
//! [`Vcpu::run`] return, with every access of the guest completed, so that the state can be read.

pub mod cpuid;
pub mod reset;
pub mod state;

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use guest_abi::platform::PARK_FOREVER;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::acpi::{self, Command};
use crate::console::Console;
use crate::devices::Devices;
use crate::error::{Result, host};
use crate::event::{Events, Token};
use crate::gate::Gate;
use crate::memory::GuestRam;
use crate::platform::{self, Action, PLATFORM_BASE, PLATFORM_SIZE};
use crate::polling::{Offers, Polling};
use crate::stats::Stats;
use crate::virtio::Progress;
use cpuid::CPUS_MAX;

/// Exit status of a process that was killed over its control interface: as if by SIGKILL.
const KILLED_STATUS: i32 = 128 + libc::SIGKILL;
/// KVM_EXIT_INTERNAL_ERROR data is not needed; the registers say where it happened.
const DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// Attempts to get the devices before their lock is waited for: somewhat longer than a long frame takes.
const TRIES_MAX: usize = 4096;

/// Looks at the gate for each look at the clock.
const GLANCES: usize = 32;

/// Most exits for one access of the guest: the longest string there is in a page, by bytes.
const PIECES_MAX: usize = 4096;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest ended itself with this status.
    Exit(u32),
    /// The guest asked for a reset, and `on_reset` says that this is its end.
    Reset,
    /// The guest has switched itself off.
    PowerOff,
    /// A processor could not even begin to handle a fault.
    TripleFault,
    /// An error that KVM cannot get over.
    Crash(String),
    /// Ended from outside.
    Stopped,
    /// Ended from outside without waiting for anything.
    Killed,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Exit(status) => write!(f, "the guest ended with status {status}"),
            End::Reset => f.write_str("the guest asked for a reset"),
            End::PowerOff => f.write_str("the guest has switched itself off"),
            End::TripleFault => f.write_str("the guest crashed: triple fault"),
            End::Crash(reason) => write!(f, "the guest crashed: {reason}"),
            End::Stopped => f.write_str("stopped"),
            End::Killed => f.write_str("killed"),
        }
    }
}

impl End {
    /// Exit status of the process.
    pub fn status(&self) -> i32 {
        match self {
            End::Exit(status) => *status as i32,
            End::Reset | End::PowerOff | End::Stopped => 0,
            End::Killed => KILLED_STATUS,
            End::TripleFault | End::Crash(_) => guest_abi::exit_status::RING0_FAULT as i32,
        }
    }
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The kick of the gate.
    Kicked,
    /// The VM has ended.
    Ended(End),
}

/// What the vCPU needs of the VM.
pub struct Context {
    /// Devices.
    pub devices: Arc<Mutex<Devices>>,
    /// Park and kick.
    pub gate: Arc<Gate>,
    /// Descriptors to serve while parked.
    pub events: Arc<Events>,
    /// Memory.
    pub ram: Arc<GuestRam>,
    /// Console.
    pub console: Console,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Processors of the host this process may use.
    pub processors: usize,
    /// What the vCPU thread leaves to the I/O thread.
    pub looks: Looks,
}

/// A guest that parks wants all queues looked at, and may go on before that when the I/O thread, which is at the devices already,
/// has found something for it: then the look is owed to it.
///
/// Always true: of a debt that [`Looks::leave`] has made the I/O thread learns at its next [`Looks::end`]. Each side writes its own
/// flag before it reads the other's.
#[derive(Debug, Default)]
pub struct Looks {
    serving: AtomicBool,
    owed: AtomicBool,
}

impl Looks {
    /// The I/O thread goes to the devices.
    pub fn begin(&self) {
        self.serving.store(true, Ordering::SeqCst);
    }

    /// It comes from them: true if all queues are to be looked at once more.
    #[must_use]
    pub fn end(&self) -> bool {
        self.serving.store(false, Ordering::SeqCst);
        self.owed.swap(false, Ordering::SeqCst)
    }

    /// Leaves a look at all queues to the I/O thread; false if it is not at the devices.
    #[must_use]
    fn leave(&self) -> bool {
        self.owed.store(true, Ordering::SeqCst);
        self.serving.load(Ordering::SeqCst)
    }
}

/// How a vCPU thread waits at a park before it sleeps.
struct Patience {
    polling: Polling,
    offers: Offers,
}

impl Context {
    /// All devices.
    pub fn devices(&self) -> MutexGuard<'_, Devices> {
        // A device that panicked is a bug, but the state behind the lock is only ever changed in whole steps.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The devices; nothing if the I/O thread, which has them, finds something for the guest meanwhile: it looks at all queues
    /// then, and the guest need not wait until it is through.
    fn devices_unless_open(&self) -> Option<MutexGuard<'_, Devices>> {
        for _ in 0..TRIES_MAX {
            match self.devices.try_lock() {
                Ok(devices) => return Some(devices),
                Err(TryLockError::Poisoned(e)) => return Some(e.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
            if self.gate.is_open() && !self.gate.kicked() && self.looks.leave() {
                return None;
            }
            std::hint::spin_loop();
        }
        Some(self.devices())
    }

    /// Waits until a device has something for the guest, a kick, or the deadline; serves the devices meanwhile.
    fn park(&self, ns: u64, patience: &mut Patience) {
        let stats = &self.stats.vcpu;
        stats.parks.inc();
        match self.devices_unless_open() {
            Some(mut devices) => {
                if devices.park() == Progress::More {
                    self.gate.signal();
                }
            }
            None => {
                self.gate.pass();
                return;
            }
        }
        let deadline = (ns != PARK_FOREVER).then(|| Instant::now() + Duration::from_nanos(ns).min(DEADLINE_MAX));
        if !self.gate.is_open() && !self.opens_soon(deadline, patience) {
            stats.slept.inc();
            let begin = Instant::now();
            loop {
                let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
                if left == Some(Duration::ZERO) {
                    break;
                }
                if self.gate.may_sleep() {
                    let ready = self.events.vcpu.wait(left);
                    self.gate.awake();
                    self.serve(&ready);
                }
                if self.gate.is_open() {
                    break;
                }
            }
            patience.polling.slept(begin.elapsed());
        }
        if self.gate.kicked() {
            self.collect();
        }
        self.gate.pass();
    }

    /// Looks at the gate for as long as that has paid lately; the I/O thread serves the devices meanwhile. True if it has opened,
    /// or the deadline has come.
    fn opens_soon(&self, deadline: Option<Instant>, patience: &mut Patience) -> bool {
        // The guest has looked by itself before it parked.
        let budget = patience.polling.budget(false);
        if budget.is_zero() {
            return false;
        }
        let begin = Instant::now();
        patience.offers.came();
        loop {
            for _ in 0..GLANCES {
                if self.gate.is_open() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if deadline.is_some_and(|d| now >= d) {
                return true;
            }
            if now.duration_since(begin) >= budget {
                return false;
            }
            if patience.offers.is_due() {
                patience.offers.offer();
            }
        }
    }

    /// Serves what this thread alone was told of, without waiting: see [`crate::event`].
    fn collect(&self) {
        loop {
            let ready = self.events.vcpu.wait(Some(Duration::ZERO));
            self.serve(&ready);
            if !ready.is_full() {
                break;
            }
        }
    }

    fn serve(&self, ready: &crate::event::Ready) {
        if ready.is_empty() {
            return;
        }
        let mut devices = self.devices();
        for token in ready.iter() {
            match token {
                Token::Wake => self.gate.drain(),
                token => {
                    // More to do means that something was given to the guest: it is let run, and parks again.
                    if devices.handle(token) == Progress::More {
                        self.gate.signal();
                    }
                }
            }
        }
    }
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: usize,
}

impl Vcpu {
    /// Takes over a vCPU; `index` is its number in the VM, from 0, and its APIC id.
    pub fn new(fd: VcpuFd, index: usize) -> Vcpu {
        Vcpu { fd, index }
    }

    /// Its number in the VM.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The descriptor, to read and set state while the vCPU does not run.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the guest on this thread until it ends or the gate is kicked.
    pub fn run(&mut self, context: &Context) -> Outcome {
        let _kickable = Kickable::new(&mut self.fd);
        let mut parked = false;
        let mut patience = Patience { polling: Polling::new(context.processors), offers: Offers::new() };
        loop {
            let leaving = context.gate.kicked();
            if leaving {
                // KVM completes an access the guest is in the middle of only when it is entered again.
                self.fd.set_kvm_immediate_exit(1);
            }
            match self.step(context, &mut patience) {
                Step::On => parked = false,
                Step::Parked => parked = true,
                Step::Interrupted => {
                    self.fd.set_kvm_immediate_exit(0);
                    if context.gate.kicked() {
                        // With the flag set before, the guest has executed nothing since its park.
                        context.gate.set_at_rest(parked && leaving);
                        return Outcome::Kicked;
                    }
                    parked = false;
                }
                Step::End(end) => {
                    match &end {
                        End::Crash(_) | End::TripleFault => log::error!("{end}; {}", self.registers()),
                        End::Reset => self.complete(),
                        _ => {}
                    }
                    return Outcome::Ended(end);
                }
            }
        }
    }

    fn step(&mut self, context: &Context, patience: &mut Patience) -> Step {
        let stats = &context.stats.exits[self.index % CPUS_MAX as usize];
        match self.fd.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => match address.checked_sub(PLATFORM_BASE) {
                Some(offset @ 0..PLATFORM_SIZE) => {
                    stats.platform.inc();
                    let mut console = context.console.clone();
                    match platform::store(offset, data, &context.ram, &mut console, &context.stats) {
                        Action::None => Step::On,
                        Action::Park(ns) => {
                            context.park(ns, patience);
                            Step::Parked
                        }
                        Action::Exit(status) => Step::End(End::Exit(status)),
                    }
                }
                _ => {
                    stats.mmio.inc();
                    context.devices().mmio_write(address, data, &context.stats);
                    Step::On
                }
            },
            Ok(VcpuExit::MmioRead(address, data)) => {
                stats.mmio.inc();
                context.devices().mmio_read(address, data, &context.stats);
                Step::On
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                stats.pio.inc();
                match acpi::command(port, data) {
                    Some(Command::Reset) => Step::End(End::Reset),
                    Some(Command::PowerOff) => Step::End(End::PowerOff),
                    None => {
                        context.devices().pio_write(port, data, &context.stats);
                        Step::On
                    }
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                stats.pio.inc();
                context.devices().pio_read(port, data, &context.stats);
                Step::On
            }
            Ok(VcpuExit::Hlt) => {
                stats.halt.inc();
                Step::End(End::Crash("halted without an interrupt controller".into()))
            }
            Ok(VcpuExit::Shutdown) => Step::End(End::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                log::info!("system event {kind}");
                Step::End(End::Reset)
            }
            Ok(exit) => {
                stats.other.inc();
                Step::End(End::Crash(format!("KVM exit {exit:x?}")))
            }
            Err(e) if e.errno() == libc::EINTR => {
                stats.interrupted.inc();
                Step::Interrupted
            }
            // A vCPU that was not started yet has been sent INIT or SIPI.
            Err(e) if e.errno() == libc::EAGAIN => {
                stats.waiting.inc();
                Step::On
            }
            Err(e) => Step::End(End::Crash(format!("KVM_RUN: {e}"))),
        }
    }

    /// Has KVM complete the access the guest is in the middle of, without an instruction more: else it would do so when it is
    /// entered after a reset, to registers that are another start's.
    fn complete(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // One that comes in pieces exits once more for each; what they are does not matter any more.
        for _ in 0..PIECES_MAX {
            if self.fd.run().is_err() {
                break;
            }
        }
        self.fd.set_kvm_immediate_exit(0);
    }

    fn registers(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "rip {:#x} rsp {:#x} rax {:#x} cr2 {:#x} cr3 {:#x} cpl {}",
                r.rip,
                r.rsp,
                r.rax,
                s.cr2,
                s.cr3,
                s.cs.selector & 3
            ),
            _ => "registers cannot be read".into(),
        }
    }
}

enum Step {
    On,
    /// A park has ended; the guest has not gone on yet.
    Parked,
    Interrupted,
    End(End),
}

thread_local! {
    /// Where this thread's `kvm_run.immediate_exit` is, while it is in [`Vcpu::run`].
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// While it lives, the kick signal makes this thread leave the guest.
struct Kickable;

impl Kickable {
    fn new(fd: &mut VcpuFd) -> Kickable {
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag);
        Kickable
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set only while `Vcpu::run` on this very thread keeps the vCPU's mapping alive; the
        // store is what the kernel expects between exits, and is volatile because the thread it interrupts writes it too.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler of the kick signal; once per process is enough, more does no harm.
pub fn install_kick_handler() -> Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler touches only its own thread's cell and the flag it points to.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
    };
    if rc != 0 { Err(host("sigaction")(io::Error::last_os_error())) } else { Ok(()) }
}

/// The vCPU's thread, as seen by those who kick it.
#[derive(Debug, Default)]
pub struct Kicker {
    tid: AtomicI32,
}

impl Kicker {
    /// The calling thread is the one to be kicked.
    pub fn enter(&self) {
        // SAFETY: no memory is involved.
        self.tid.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    /// The thread's id; 0: there is none.
    pub fn tid(&self) -> i32 {
        self.tid.load(Ordering::Acquire)
    }

    /// The thread will not run the vCPU any more.
    pub fn leave(&self) {
        self.tid.store(0, Ordering::Release);
    }

    /// Makes the thread leave the guest; the demand must stand already ([`Gate::kick`]).
    pub fn signal(&self) {
        let tid = self.tid.load(Ordering::Acquire);
        if tid != 0 {
            // SAFETY: no memory is involved; a thread of this process without the cell ignores the signal.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        }
    }
}
