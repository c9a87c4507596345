//! Building a VM: for a first start, or empty for one that will arrive.
//!
//! Owns the order in which KVM's VM, its vCPUs, the devices and the state of the first start come about. Always true: whatever
//! can fail has been done when a [`Vm`] is returned; what was made before an error goes with the error.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::clocks::scale_tsc;
use super::life::Life;
use super::{Vm, VmDescription};
use crate::acpi;
use crate::boot::info::{InfoPage, OwnerId};
use crate::boot::start::{self, Start};
use crate::boot::{BootFiles, Entry, Image};
use crate::checkpoint::lineage::Broken;
use crate::config::cli::ReceiveConfig;
use crate::config::{BALLOON_ID, Config, OnReset, RNG_ID, VSOCK_ID};
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
use crate::virtio::blk::identity::Identity;
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
    images: &[Identity],
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
        devices.push(match (&disk.vhost_user, images.iter().find(|i| i.id == disk.id)) {
            (Some(_), _) => Box::new(VhostUserBlk::open(disk)?),
            (None, Some(there)) => Box::new(Blk::open_for_port(disk, there)?),
            (None, None) => Box::new(Blk::open(disk)?),
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
    pub fn boot(mut config: Config, owner: OwnerId, stats: Arc<Stats>) -> Result<Vm> {
        let kvm = open_kvm()?;
        let memory = new_memory(&config)?;
        let files = BootFiles::open(&config.image, config.initrd.as_deref())?;
        let image = Image::load(&files.image, &memory, config.boot)?;
        config.on_reset = config.on_reset.of_image(image.wants_announcements);
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
        let vm = Vm::assemble(config, owner, info, kvm, Some(files), shell, memory, stats, &[])?;
        vm.prepare_start(&image)?;
        Ok(vm)
    }

    /// The command line as the guest sees it: the user's words, then the devices.
    pub fn guest_cmdline(&self) -> String {
        start::announce(&self.config.cmdline, self.devices().virtio().len())
    }

    /// Registers and pages of a start.
    fn prepare_start(&self, image: &Image) -> Result<()> {
        let Some(files) = &self.files else { return Err(Error::State("nothing to start from".into())) };
        let devices = self.devices().virtio().len();
        let start = Start { config: &self.config, files, owner: self.owner, devices, cpuid: &self.cpuid };
        start::prepare(&start, image, &self.memory, self.vcpu().fd(), None)
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
        for disk in &mut config.disks {
            if let Some(here) = host.disks.iter().find(|h| h.id == disk.id) {
                disk.path.clone_from(&here.path);
                disk.direct = here.direct;
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
        let files = host.image.as_deref().map(|image| BootFiles::open(image, host.initrd.as_deref())).transpose()?;
        if let Some(image) = &host.image {
            config.image.clone_from(image);
            config.initrd.clone_from(&host.initrd);
        }
        config.serial.clone_from(&host.serial);
        config.arbiter = host.arbiter.or(config.arbiter);
        config.tls = Some(host.tls.clone());
        let memory = new_memory(&config)?;
        Vm::arrive(description, config, memory, files, owner, stats)
    }

    /// Builds a VM that is to take a state, from what the description says, on this host as `config` says.
    pub fn arrive(
        description: &VmDescription,
        config: Config,
        memory: Memory,
        files: Option<BootFiles>,
        owner: OwnerId,
        stats: Arc<Stats>,
    ) -> Result<Vm> {
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
        let mut vm =
            Vm::assemble(config, owner, description.info, kvm, files, shell, memory, stats, &description.images)?;
        vm.tsc_scaled = scaled;
        Ok(vm)
    }

    #[allow(clippy::too_many_arguments)]
    fn assemble(
        config: Config,
        owner: OwnerId,
        info: Option<InfoPage>,
        kvm: Kvm,
        files: Option<BootFiles>,
        shell: Shell,
        memory: Memory,
        stats: Arc<Stats>,
        images: &[Identity],
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
        let virtio = open_devices(&config, &shell, &memory, &gate, &events, images)?;
        let serial_irq = serial_irq(&shell.fd, shell.irqchip)?;
        let acpi = acpi::Registers::new(event_irq(&shell.fd, shell.irqchip)?);
        let context = Context {
            devices: Arc::new(Mutex::new(Devices::new(console.clone(), serial_irq, acpi, virtio))),
            gate,
            events,
            ram: memory.ram().clone(),
            console,
            stats,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            looks: Default::default(),
        };
        let tsc_khz = shell.vcpus[0].get_tsc_khz().map_err(crate::error::kvm("get TSC frequency"))?;
        let vcpus = shell
            .vcpus
            .into_iter()
            .enumerate()
            .map(|(i, fd)| Arc::new(Mutex::new(Vcpu::new(fd, i))))
            .collect::<Vec<_>>();
        BootTimes::reach(&context.stats.boot.built);
        let reboots = config.on_reset == OnReset::Reboot && files.is_some();
        if config.on_reset == OnReset::Reboot && files.is_none() {
            log::info!("a reset ends this VM: there is no image here to begin it from (--image)");
        }
        Ok(Vm {
            config: Arc::new(config),
            owner,
            info,
            irqchip: shell.irqchip,
            cpuid: shell.cpuid,
            tsc_khz,
            tsc_scaled: false,
            msrs: Arc::default(),
            files: files.map(Arc::new),
            threads: Mutex::new(Vec::new()),
            life: Arc::new(Life::new(context.gate.clone(), vcpus.len(), reboots)),
            io_stop: Arc::new(io_stop),
            lineage: Mutex::new(Err(Broken::NotBegun)),
            context: Arc::new(context),
            vcpus,
            kvm: Arc::new(kvm),
            fd: Arc::new(shell.fd),
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

/// The only version of KVM's interface there has been since 2007; its documentation asks to refuse any other.
const KVM_API_VERSION: i32 = 12;

fn open_kvm() -> Result<Kvm> {
    let failed = |source| Error::Host { what: "/dev/kvm (the VMM needs KVM and the right to use it)".into(), source };
    let kvm = Kvm::new().map_err(|e| failed(io::Error::from_raw_os_error(e.errno())))?;
    // Whatever lies there can be opened; only KVM answers this.
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        ..0 => Err(failed(io::Error::other("this is not KVM's device"))),
        other => Err(failed(io::Error::other(format!("KVM's interface has version {other}, not {KVM_API_VERSION}")))),
    }
}
