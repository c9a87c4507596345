//! Building a VM: for a first start, or empty for one that will arrive.
//!
//! Owns the order in which KVM's VM, its vCPUs, the devices and the state of the first start come about. Always true: whatever
//! can fail has been done when a [`Vm`] is returned; what was made before an error goes with the error.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::clocks::scale_tsc;
use super::life::Life;
use super::{Vm, VmDescription};
use crate::acpi;
use crate::boot::info::{InfoPage, OwnerId};
use crate::boot::{Entry, Image, start};
use crate::config::cli::ReceiveConfig;
use crate::config::{BALLOON_ID, Config, RNG_ID, VSOCK_ID};
use crate::console::Console;
use crate::devices::Devices;
use crate::error::{Error, FieldError, Result, host};
use crate::event::Events;
use crate::gate::Gate;
use crate::layout::{EVENT_GSI, SERIAL_GSI, TSS_ADDRESS};
use crate::memory::{Memory, enable_manual_protect};
use crate::stats::{BootTimes, Stats};
use crate::vcpu::cpuid::{self, CPUS_MAX};
use crate::vcpu::reset::as_firmware_does;
use crate::vcpu::state::missing_features;
use crate::vcpu::{Context, Vcpu};
use crate::virtio::Device;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::mmio::Transport;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vhost_user::blk::VhostUserBlk;
use crate::virtio::vhost_user::net::VhostUserNet;
use crate::virtio::vsock::Vsock;

/// How often making a VM is tried again after an interruption.
const CREATE_ATTEMPTS: u32 = 100;

/// KVM's side of a VM before its vCPU threads exist.
pub(super) struct Shell {
    pub(super) fd: VmFd,
    pub(super) vcpus: Vec<VcpuFd>,
    cpuid: CpuId,
    irqchip: bool,
}

impl Shell {
    fn new(kvm: &Kvm, memory: &Memory, irqchip: bool, cpus: u32) -> Result<Shell> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(crate::error::kvm("get CPUID"))?;
        let deadline = irqchip && kvm.check_extension(Cap::TscDeadlineTimer);
        Shell::with_cpuid(kvm, Some(memory), irqchip, cpuid::for_vm(&supported, cpus, deadline)?, cpus as usize)
    }

    /// `cpuid` is what all vCPUs are told; without memory the VM cannot run.
    pub(super) fn with_cpuid(
        kvm: &Kvm,
        memory: Option<&Memory>,
        irqchip: bool,
        cpuid: CpuId,
        cpus: usize,
    ) -> Result<Shell> {
        let max = kvm.get_max_vcpus().min(CPUS_MAX as usize);
        if cpus == 0 || cpus > max {
            return Err(Error::Config(vec![FieldError::new("cpus", format!("{cpus}: this host gives 1 to {max}"))]));
        }
        let fd = create_vm(kvm)?;
        enable_manual_protect(&fd)?;
        fd.set_tss_address(TSS_ADDRESS).map_err(crate::error::kvm("set TSS address"))?;
        if irqchip {
            fd.create_irq_chip().map_err(crate::error::kvm("create irqchip"))?;
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(pit).map_err(crate::error::kvm("create PIT"))?;
        }
        if let Some(memory) = memory {
            memory.register(&fd)?;
        }
        let mut vcpus = Vec::with_capacity(cpus);
        for id in 0..cpus as u32 {
            let vcpu = fd.create_vcpu(id.into()).map_err(crate::error::kvm("create vCPU"))?;
            vcpu.set_cpuid2(&cpuid::for_vcpu(&cpuid, id)?).map_err(crate::error::kvm("set CPUID"))?;
            if irqchip {
                as_firmware_does(&vcpu)?;
            }
            vcpus.push(vcpu);
        }
        Ok(Shell { fd, vcpus, cpuid, irqchip })
    }
}

/// Opens taps and images and puts the devices at their places: network devices first.
fn open_devices(
    config: &Config,
    shell: &Shell,
    memory: &Memory,
    gate: &Arc<Gate>,
    events: &Arc<Events>,
) -> Result<Vec<Transport>> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for (i, config) in config.nets.iter().enumerate() {
        if config.vhost_user.is_some() {
            devices.push(Box::new(VhostUserNet::open(config)?));
            continue;
        }
        let mut net = Net::open(config)?;
        net.use_kernel(config, memory, shell.irqchip)
            .map_err(|e| Error::Config(vec![FieldError::new(format!("nets[{i}].vhost"), e.to_string())]))?;
        devices.push(Box::new(net));
    }
    for disk in &config.disks {
        devices.push(match disk.vhost_user {
            Some(_) => Box::new(VhostUserBlk::open(disk)?),
            None => Box::new(Blk::open(disk)?),
        });
    }
    if let Some(rng) = &config.rng {
        devices.push(Box::new(Rng::new(RNG_ID, rng)?));
    }
    if let Some(balloon) = &config.balloon {
        devices.push(Box::new(Balloon::new(BALLOON_ID, balloon)?));
    }
    if let Some(vsock) = &config.vsock {
        devices.push(Box::new(Vsock::open(VSOCK_ID, vsock)?));
    }
    let place = |(index, device)| {
        Transport::new(device, index as u16, Some(&shell.fd), shell.irqchip, memory.clone(), gate.clone(), events)
    };
    devices.into_iter().enumerate().map(place).collect()
}

/// A new irqfd, where there is an interrupt controller.
fn irq(fd: &VmFd, irqchip: bool, gsi: u32) -> Result<Option<EventFd>> {
    if !irqchip {
        return Ok(None);
    }
    let irq = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
    fd.register_irqfd(&irq, gsi).map_err(crate::error::kvm("register irqfd"))?;
    Ok(Some(irq))
}

/// For the serial port.
pub(super) fn serial_irq(fd: &VmFd, irqchip: bool) -> Result<Option<EventFd>> {
    irq(fd, irqchip, SERIAL_GSI)
}

/// For ACPI's events.
pub(super) fn event_irq(fd: &VmFd, irqchip: bool) -> Result<Option<EventFd>> {
    irq(fd, irqchip, EVENT_GSI)
}

impl Vm {
    /// Builds a VM from its image, ready to start.
    pub fn boot(config: Config, owner: OwnerId, stats: Arc<Stats>) -> Result<Vm> {
        let kvm = open_kvm()?;
        let memory = new_memory(&config)?;
        let image = Image::load(&config.image, &memory, config.boot)?;
        let info = match &image.entry {
            Entry::Direct(start) => Some(InfoPage { address: start.boot_info }),
            Entry::Pvh(_) | Entry::Linux(_) => None,
        };
        // A guest that starts directly in ring 3 needs no interrupts, and has nothing to start another vCPU with.
        let irqchip = info.is_none();
        if !irqchip && config.cpus != 1 {
            let why =
                "an image that starts directly in ring 3 has one vCPU; boot it with \"boot\": \"pvh\" or give it 1";
            return Err(Error::Config(vec![FieldError::new("cpus", format!("{}: {why}", config.cpus))]));
        }
        let shell = Shell::new(&kvm, &memory, irqchip, config.cpus)?;
        let vm = Vm::assemble(config, owner, info, shell, memory, stats)?;
        vm.prepare_start(&image)?;
        Ok(vm)
    }

    /// The command line as the guest sees it: the user's words, then the devices.
    pub fn guest_cmdline(&self) -> String {
        start::announce(&self.config.cmdline, self.devices().virtio().len())
    }

    /// Registers and pages of a start.
    fn prepare_start(&self, image: &Image) -> Result<()> {
        let devices = self.devices().virtio().len();
        let vcpu = self.vcpu();
        start::prepare(&self.config, self.owner, image, devices, &self.memory, vcpu.fd(), &self.cpuid)
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
                    net.vhost = here.vhost;
                    net.vhost_user.clone_from(&here.vhost_user);
                }
                None => errors.push(FieldError::new(format!("nets[{i}].id"), format!("no tap for {} here", net.id))),
            }
        }
        // Where a socket is made on this host is not for the other to say.
        match (&mut config.vsock, &host.vsock) {
            (Some(vsock), Some(path)) => vsock.path.clone_from(path),
            (Some(_), None) => errors.push(FieldError::new("vsock.path", "no path here: give --vsock path=SOCKET")),
            (None, _) => {}
        }
        if !errors.is_empty() {
            return Err(Error::Config(errors));
        }
        config.serial.clone_from(&host.serial);
        config.arbiter = host.arbiter.or(config.arbiter);
        let memory = new_memory(&config)?;
        Vm::of_memory(&VmDescription { config, ..description.clone() }, owner, memory, stats)
    }

    /// Builds a VM around memory that is there, or will be: everything but its state.
    pub fn of_memory(description: &VmDescription, owner: OwnerId, memory: Memory, stats: Arc<Stats>) -> Result<Vm> {
        let config = description.config.clone();
        let kvm = open_kvm()?;
        let told = CpuId::from_entries(&description.cpuid).map_err(|e| Error::State(format!("CPUID: {e:?}")))?;
        let here = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(crate::error::kvm("get CPUID"))?;
        if let Some(missing) = missing_features(&told, &here) {
            return Err(Error::State(format!("this host's processor lacks what the guest was told of: {missing}")));
        }
        if !description.irqchip && config.cpus != 1 {
            return Err(Error::State(format!("{} vCPUs without interrupt controllers", config.cpus)));
        }
        let shell = Shell::with_cpuid(&kvm, Some(&memory), description.irqchip, told, config.cpus as usize)?;
        let mut scaled = false;
        // A guest with a clock page is told of another frequency there.
        if description.irqchip {
            for vcpu in &shell.vcpus {
                let here = vcpu.get_tsc_khz().map_err(crate::error::kvm("get TSC frequency"))?;
                scaled |= scale_tsc(vcpu, here, description.tsc_khz)?;
            }
        }
        let mut vm = Vm::assemble(config, owner, description.info, shell, memory, stats)?;
        vm.tsc_scaled = scaled;
        Ok(vm)
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
        if let Some(fd) = console.descriptor() {
            events.add_console(fd)?;
        }
        let virtio = open_devices(&config, &shell, &memory, &gate, &events)?;
        let serial_irq = serial_irq(&shell.fd, shell.irqchip)?;
        let acpi = acpi::Registers::new(event_irq(&shell.fd, shell.irqchip)?);
        let context = Context {
            devices: Arc::new(Mutex::new(Devices::new(console.clone(), serial_irq, acpi, virtio))),
            gate,
            events,
            ram: memory.ram().clone(),
            console,
            stats,
        };
        let tsc_khz = shell.vcpus[0].get_tsc_khz().map_err(crate::error::kvm("get TSC frequency"))?;
        let vcpus = shell
            .vcpus
            .into_iter()
            .enumerate()
            .map(|(i, fd)| Arc::new(Mutex::new(Vcpu::new(fd, i))))
            .collect::<Vec<_>>();
        BootTimes::reach(&context.stats.boot.built);
        Ok(Vm {
            config,
            owner,
            info,
            irqchip: shell.irqchip,
            cpuid: shell.cpuid,
            tsc_khz,
            tsc_scaled: false,
            msrs: OnceLock::new(),
            threads: Mutex::new(Vec::new()),
            life: Arc::new(Life::new(context.gate.clone(), vcpus.len())),
            io_stop: Arc::new(io_stop),
            copying: AtomicBool::new(false),
            context: Arc::new(context),
            vcpus,
            fd: shell.fd,
            memory,
        })
    }
}

fn new_memory(config: &Config) -> Result<Memory> {
    Memory::with_sharing(usize::try_from(config.memory.bytes()).unwrap_or(usize::MAX), config.shares_memory())
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

pub(super) fn open_kvm() -> Result<Kvm> {
    Kvm::new().map_err(|e| Error::Host {
        what: "/dev/kvm (the VMM needs KVM and the right to use it)".into(),
        source: io::Error::from_raw_os_error(e.errno()),
    })
}
