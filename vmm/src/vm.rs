//! A virtual machine: its parts put together, its life.
//!
//! Owns KVM's VM, the memory, the devices, both threads. Life: built (by [`Vm::boot`] or [`Vm::receive`]), started,
//! then running and paused in turn, ended. Built means that everything that can fail has been done.

pub mod state;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use guest_abi::Identity;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::boot::info::{InfoPage, OwnerId, random};
use crate::boot::{Entry, Image, direct, pvh};
use crate::config::Config;
use crate::config::cli::ReceiveConfig;
use crate::console::Console;
use crate::devices::{Devices, SERIAL_GSI};
use crate::error::{Error, FieldError, Result, host};
use crate::event::{Events, Token};
use crate::gate::Gate;
use crate::memory::{Memory, enable_manual_protect};
use crate::platform::PLATFORM_BASE;
use crate::stats::{BootTimes, Stats};
use crate::vcpu::state::{MsrList, missing_features};
use crate::vcpu::{self, Context, End, Kicker, Outcome, Vcpu};
use crate::virtio::blk::Blk;
use crate::virtio::mmio::Transport;
use crate::virtio::net::Net;
use crate::virtio::{Device, Progress};
pub use state::{VmDescription, VmState};

/// Where KVM may put its TSS and identity map (needed on VT-x): three pages and one below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// How often making a VM is tried again after an interruption.
const CREATE_ATTEMPTS: u32 = 100;
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
struct Life {
    state: Mutex<LifeState>,
    changed: Condvar,
    on_end: Mutex<Option<OnEnd>>,
    /// CLOCK_MONOTONIC when the vCPU thread last went to the guest, and last came back to stop.
    entered_ns: AtomicU64,
    exited_ns: AtomicU64,
}

type OnEnd = Box<dyn FnOnce(&End) + Send>;

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
    irqchip: bool,
    cpuid: CpuId,
    tsc_khz: u32,
    msrs: OnceLock<MsrList>,
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
    irqchip: bool,
}

impl Shell {
    fn new(kvm: &Kvm, memory: &Memory, irqchip: bool) -> Result<Shell> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(crate::error::kvm("get CPUID"))?;
        Shell::with_cpuid(kvm, memory, irqchip, cpuid)
    }

    fn with_cpuid(kvm: &Kvm, memory: &Memory, irqchip: bool, cpuid: CpuId) -> Result<Shell> {
        let fd = create_vm(kvm)?;
        enable_manual_protect(&fd)?;
        fd.set_tss_address(TSS_ADDRESS).map_err(crate::error::kvm("set TSS address"))?;
        if irqchip {
            fd.create_irq_chip().map_err(crate::error::kvm("create irqchip"))?;
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(pit).map_err(crate::error::kvm("create PIT"))?;
        }
        memory.register(&fd)?;
        let vcpu = fd.create_vcpu(0).map_err(crate::error::kvm("create vCPU"))?;
        vcpu.set_cpuid2(&cpuid).map_err(crate::error::kvm("set CPUID"))?;
        Ok(Shell { fd, vcpu, cpuid, irqchip })
    }
}

/// Opens taps and images and puts the devices at their places: network devices first.
fn open_devices(
    config: &Config,
    shell: &Shell,
    memory: &Memory,
    gate: &Arc<Gate>,
    events: &Events,
) -> Result<Vec<Transport>> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for net in &config.nets {
        devices.push(Box::new(Net::open(net)?));
    }
    for disk in &config.disks {
        devices.push(Box::new(Blk::open(disk)?));
    }
    let place = |(index, device)| {
        Transport::new(device, index as u16, &shell.fd, shell.irqchip, memory.clone(), gate.clone(), events)
    };
    devices.into_iter().enumerate().map(place).collect()
}

/// A new irqfd for the serial port, where there is an interrupt controller.
fn serial_irq(fd: &VmFd, irqchip: bool) -> Result<Option<EventFd>> {
    if !irqchip {
        return Ok(None);
    }
    let irq = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
    fd.register_irqfd(&irq, SERIAL_GSI).map_err(crate::error::kvm("register irqfd"))?;
    Ok(Some(irq))
}

impl Vm {
    /// Builds a VM from its image, ready to start.
    pub fn boot(config: Config, owner: OwnerId, stats: Arc<Stats>) -> Result<Vm> {
        let kvm = open_kvm()?;
        let memory = Memory::new(usize::try_from(config.memory.bytes()).unwrap_or(usize::MAX))?;
        let image = Image::load(&config.image, &memory, config.boot)?;
        let irqchip = matches!(image.entry, Entry::Pvh(_));
        let info = match image.entry {
            Entry::Direct(start) => Some(InfoPage { address: start.boot_info }),
            Entry::Pvh(_) => None,
        };
        let shell = Shell::new(&kvm, &memory, irqchip)?;
        let vm = Vm::assemble(config, owner, info, shell, memory, stats)?;
        vm.prepare_start(&image)?;
        Ok(vm)
    }

    /// Registers and pages of the first start.
    fn prepare_start(&self, image: &Image) -> Result<()> {
        let mut cmdline = self.config.cmdline.clone();
        for index in 0..self.devices().virtio().len() {
            if !cmdline.is_empty() {
                cmdline.push(' ');
            }
            cmdline += &Devices::announcement(index as u16);
        }
        let vcpu = self.vcpu();
        match image.entry {
            Entry::Direct(start) => {
                direct::set_registers(vcpu.fd(), &start)?;
                let identity = Identity { vm_id: self.config.vm_id, epoch: 0, owner: self.owner.0, entropy: random()? };
                let info = InfoPage { address: start.boot_info };
                info.write(&self.memory, vcpu.fd(), &cmdline, PLATFORM_BASE, identity, &self.cpuid)
            }
            Entry::Pvh(entry) => {
                pvh::write_start_info(&self.memory, &cmdline)?;
                pvh::set_registers(vcpu.fd(), entry)
            }
        }
    }

    /// Builds an empty VM for one that will be ported here: everything but its state. The taps are this host's, joined by
    /// the devices' ids.
    pub fn receive(description: &VmDescription, host: &ReceiveConfig, owner: OwnerId, stats: Arc<Stats>) -> Result<Vm> {
        let mut config = description.config.clone();
        let mut errors = Vec::new();
        for (i, net) in config.nets.iter_mut().enumerate() {
            match host.nets.iter().find(|h| h.id == net.id) {
                Some(here) => {
                    net.tap.clone_from(&here.tap);
                    net.fd = here.fd;
                }
                None => errors.push(FieldError::new(format!("nets[{i}].id"), format!("no tap for {} here", net.id))),
            }
        }
        if !errors.is_empty() {
            return Err(Error::Config(errors));
        }
        config.serial.clone_from(&host.serial);
        config.arbiter = host.arbiter.or(config.arbiter);
        let kvm = open_kvm()?;
        let told = CpuId::from_entries(&description.cpuid).map_err(|e| Error::State(format!("CPUID: {e:?}")))?;
        let here = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(crate::error::kvm("get CPUID"))?;
        if let Some(missing) = missing_features(&told, &here) {
            return Err(Error::State(format!("this host's processor lacks what the guest was told of: {missing}")));
        }
        let memory = Memory::new(usize::try_from(config.memory.bytes()).unwrap_or(usize::MAX))?;
        let shell = Shell::with_cpuid(&kvm, &memory, description.irqchip, told)?;
        Vm::assemble(config, owner, description.info, shell, memory, stats)
    }

    fn assemble(
        config: Config,
        owner: OwnerId,
        info: Option<InfoPage>,
        shell: Shell,
        memory: Memory,
        stats: Arc<Stats>,
    ) -> Result<Vm> {
        let console = Console::open(&config.serial)?;
        let gate = Arc::new(Gate::new()?);
        let events = Arc::new(Events::new()?);
        let io_stop = (AtomicBool::new(false), EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?);
        events.add_vcpu_wake(gate.as_raw_fd())?;
        events.add_io_wake(io_stop.1.as_raw_fd())?;
        let virtio = open_devices(&config, &shell, &memory, &gate, &events)?;
        let serial_irq = serial_irq(&shell.fd, shell.irqchip)?;
        let context = Context {
            devices: Arc::new(Mutex::new(Devices::new(console.clone(), serial_irq, virtio))),
            gate,
            events,
            ram: memory.ram().clone(),
            console,
            stats,
        };
        let life = Life {
            state: Mutex::new(LifeState { want: Want::Run, phase: Phase::Created, started: false, end: None }),
            changed: Condvar::new(),
            on_end: Mutex::new(None),
            entered_ns: AtomicU64::new(0),
            exited_ns: AtomicU64::new(0),
        };
        let tsc_khz = shell.vcpu.get_tsc_khz().map_err(crate::error::kvm("get TSC frequency"))?;
        BootTimes::reach(&context.stats.boot.built);
        Ok(Vm {
            config,
            owner,
            info,
            irqchip: shell.irqchip,
            cpuid: shell.cpuid,
            tsc_khz,
            msrs: OnceLock::new(),
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

    /// Frequency of the time stamp counter the guest reads, in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
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

    /// The vCPU; waits for ever unless the VM is paused, not started or ended.
    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
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

/// KVM gives up making a VM when a signal (or a completion of io_uring, which comes in the same way) arrives meanwhile.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let mut attempts = 0..CREATE_ATTEMPTS;
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR && attempts.next().is_some() => {}
            result => return result.map_err(crate::error::kvm("create VM")),
        }
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
