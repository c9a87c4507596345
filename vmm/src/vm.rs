//! A virtual machine: its parts put together, its life.
//!
//! Owns KVM's VM, the memory, the devices, both threads. Life: built (by [`Vm::boot`] or [`Vm::receive`]), started,
//! then running and paused in turn, ended. Built means that everything that can fail has been done.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use guest_abi::Identity;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::boot::info::{InfoPage, OwnerId, random};
use crate::boot::{Entry, Image, direct, pvh};
use crate::config::Config;
use crate::console::Console;
use crate::devices::Devices;
use crate::error::{Error, Result, host};
use crate::event::{Events, Token};
use crate::gate::Gate;
use crate::memory::{Memory, enable_manual_protect};
use crate::platform::PLATFORM_BASE;
use crate::stats::{BootTimes, Stats};
use crate::vcpu::{self, Context, End, Kicker, Outcome, Vcpu};

/// Where KVM may put its TSS and identity map (needed on VT-x): three pages and one below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
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
    end: Option<End>,
}

/// What is wanted of the vCPU thread and where it is.
struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
    on_end: Mutex<Option<Box<dyn FnOnce(&End) + Send>>>,
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, LifeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A virtual machine. Fields are dropped in this order: what uses memory before memory.
pub struct Vm {
    config: Config,
    owner: OwnerId,
    info: Option<InfoPage>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    life: Arc<Life>,
    kicker: Arc<Kicker>,
    io_stop: Arc<(AtomicBool, EventFd)>,
    context: Arc<Context>,
    vcpu: Arc<Mutex<Vcpu>>,
    fd: VmFd,
    memory: Memory,
}

/// KVM's side of a VM before its vCPU thread exists.
struct Shell {
    fd: VmFd,
    vcpu: kvm_ioctls::VcpuFd,
    cpuid: CpuId,
}

impl Shell {
    fn new(kvm: &Kvm, memory: &Memory, irqchip: bool) -> Result<Shell> {
        let fd = kvm.create_vm().map_err(crate::error::kvm("create VM"))?;
        enable_manual_protect(&fd)?;
        fd.set_tss_address(TSS_ADDRESS).map_err(crate::error::kvm("set TSS address"))?;
        if irqchip {
            fd.create_irq_chip().map_err(crate::error::kvm("create irqchip"))?;
        }
        memory.register(&fd)?;
        let vcpu = fd.create_vcpu(0).map_err(crate::error::kvm("create vCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(crate::error::kvm("get CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(crate::error::kvm("set CPUID"))?;
        Ok(Shell { fd, vcpu, cpuid })
    }
}

impl Vm {
    /// Builds a VM from its image, ready to start.
    pub fn boot(config: Config, owner: OwnerId, stats: Arc<Stats>) -> Result<Vm> {
        let kvm = open_kvm()?;
        let console = Console::open(&config.serial)?;
        let memory = Memory::new(usize::try_from(config.memory.bytes()).unwrap_or(usize::MAX))?;
        let image = Image::load(&config.image, &memory, config.boot)?;
        let shell = Shell::new(&kvm, &memory, matches!(image.entry, Entry::Pvh(_)))?;
        let cmdline = config.cmdline.clone();
        let info = match image.entry {
            Entry::Direct(start) => {
                direct::set_registers(&shell.vcpu, &start)?;
                let info = InfoPage { address: start.boot_info };
                let identity = Identity { vm_id: config.vm_id, epoch: 0, owner: owner.0, entropy: random()? };
                info.write(&memory, &shell.vcpu, &cmdline, PLATFORM_BASE, identity, &shell.cpuid)?;
                Some(info)
            }
            Entry::Pvh(entry) => {
                pvh::write_start_info(&memory, &cmdline)?;
                pvh::set_registers(&shell.vcpu, entry)?;
                None
            }
        };
        Vm::assemble(config, owner, info, shell, memory, console, stats)
    }

    fn assemble(
        config: Config,
        owner: OwnerId,
        info: Option<InfoPage>,
        shell: Shell,
        memory: Memory,
        console: Console,
        stats: Arc<Stats>,
    ) -> Result<Vm> {
        let gate = Arc::new(Gate::new()?);
        let events = Arc::new(Events::new()?);
        let io_stop = (AtomicBool::new(false), EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?);
        events.add_vcpu_wake(std::os::fd::AsRawFd::as_raw_fd(gate.as_ref()))?;
        events.add_io_wake(std::os::fd::AsRawFd::as_raw_fd(&io_stop.1))?;
        let devices = Devices::new(console.clone(), None);
        let context =
            Context { devices: Arc::new(Mutex::new(devices)), gate, events, ram: memory.ram().clone(), console, stats };
        let life = Life {
            state: Mutex::new(LifeState { want: Want::Run, phase: Phase::Created, end: None }),
            changed: Condvar::new(),
            on_end: Mutex::new(None),
        };
        BootTimes::reach(&context.stats.boot.built);
        Ok(Vm {
            config,
            owner,
            info,
            threads: Mutex::new(Vec::new()),
            life: Arc::new(life),
            kicker: Arc::new(Kicker::default()),
            io_stop: Arc::new(io_stop),
            context: Arc::new(context),
            vcpu: Arc::new(Mutex::new(Vcpu::new(shell.vcpu))),
            fd: shell.fd,
            memory,
        })
    }

    /// Starts the threads; the guest runs unless [`Vm::pause`] came first. `on_end` is called on the vCPU's thread
    /// when the VM has ended.
    pub fn start(&self, on_end: impl FnOnce(&End) + Send + 'static) -> Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if !threads.is_empty() {
            return Err(Error::Conflict("the VM has already been started".into()));
        }
        vcpu::install_kick_handler()?;
        *self.life.on_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(on_end));
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
        while state.phase == Phase::Running {
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

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The identity of this VMM process.
    pub fn owner(&self) -> OwnerId {
        self.owner
    }

    /// The boot-info page, if the VM was started directly in ring 3.
    pub fn info(&self) -> Option<InfoPage> {
        self.info
    }

    /// KVM's VM.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Counters.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.context.stats
    }

    /// The devices, locked.
    pub fn devices(&self) -> MutexGuard<'_, Devices> {
        self.context.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open_kvm() -> Result<Kvm> {
    Kvm::new().map_err(|e| Error::Host {
        what: "/dev/kvm (the VMM needs KVM and the right to use it)".into(),
        source: io::Error::from_raw_os_error(e.errno()),
    })
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
        let outcome = vcpu.lock().unwrap_or_else(PoisonError::into_inner).run(context);
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

fn io_thread(context: &Context, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let ready = context.events.io.wait(None);
        if ready.is_empty() {
            continue;
        }
        let mut devices = context.devices.lock().unwrap_or_else(PoisonError::into_inner);
        for token in ready.iter().filter(|t| *t != Token::Wake) {
            devices.handle(token);
        }
    }
}
