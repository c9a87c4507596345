//! A vCPU: its run loop, its kick.
//!
//! Owns the vCPU's descriptor. Always true: a kick that was given before or while the vCPU runs makes
//! [`Vcpu::run`] return, with every access of the guest completed, so that the state can be read.

pub mod cpuid;
pub mod park;
pub mod reset;
pub mod state;

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::acpi::{self, Command};
use crate::console::Console;
use crate::devices::Devices;
use crate::error::{Result, host};
use crate::event::Events;
use crate::gate::Gate;
use crate::memory::GuestRam;
use crate::platform::{self, Action, PLATFORM_BASE, PLATFORM_SIZE};
use crate::stats::Stats;
use cpuid::CPUS_MAX;
use park::{Looks, Patience};

/// Exit status of a process that was killed over its control interface: as if by SIGKILL.
const KILLED_STATUS: i32 = 128 + libc::SIGKILL;
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

impl Context {
    /// All devices.
    pub fn devices(&self) -> MutexGuard<'_, Devices> {
        // A device that panicked is a bug, but the state behind the lock is only ever changed in whole steps.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut patience = Patience::new(context.processors);
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
