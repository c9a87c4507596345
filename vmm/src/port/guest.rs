//! What a port does with a VM: the only module of porting that knows how a VM is built.
//!
//! Owns the names and versions of the sections a VM's state is sent in, and is kept in in a checkpoint. Always true: a section is decoded only when its
//! name is expected and its version known; what it says is checked by the part it is for.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::message::{
    CpuLeaf, Description, Hello, Ownership, Reason, ReasonCode, Stamp, VERSION_MAX, VERSION_MIN, feature,
};
use migration::ownership::{Epoch, OwnerId};
use migration::section::{Section, Sections};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::dead::LeftOut;
use super::faults;
use super::frames::NetFrame;
use super::lull;
use super::stamp;
use super::transfer::{self, Arrived};
use crate::boot::info::{OwnerId as VmmId, random};
use crate::config::cli::ReceiveConfig;
use crate::config::{DISK_QUEUES_MAX, DISKS_MAX, NETS_MAX};
use crate::devices::DevicesState;
use crate::error::{Error, Result, host};
use crate::memory::MEMORY_MAX;
use crate::schedule::Urgent;
use crate::stats::Stats;
use crate::virtio::Progress;
use crate::virtio::blk::Flusher;
use crate::vm::{Phase, Vm, VmDescription, VmState};

/// Version of every section, so far.
const VERSION: u32 = 1;
const CHIPS: &str = "chips";
const CLOCKS: &str = "clocks";
const CLOCK: &str = "clock";
const SERIAL: &str = "serial";
const ACPI: &str = "acpi";
const DIGEST: &str = "digest";
const OWNER: &str = "owner";
/// Frames thrown away at once, at most: what a tap holds.
const STALE_MAX: usize = 1024;
/// How long an image's lock is waited for by a destination: the source has given it up, another may have been quicker.
const TAKE_PATIENCE: Duration = Duration::from_millis(100);
/// How often it is tried.
pub(super) const TAKE_PAUSE: Duration = Duration::from_millis(2);
/// Memory of the host that is never given to a guest that arrives.
const HOST_RESERVE: u64 = 64 << 20;

/// A VM that is on its way here.
pub(super) struct Incoming {
    /// The VM, without its state.
    pub vm: Arc<Vm>,
    state: Option<VmState>,
}

/// First message about a VM.
pub(super) fn hello(vm: &Vm, ownership: Ownership) -> Result<Hello> {
    Ok(Hello {
        min_version: VERSION_MIN,
        max_version: VERSION_MAX,
        required: 0,
        offered: feature::OFFERED,
        port: [u64::from_le_bytes(random()?), u64::from_le_bytes(random()?)],
        vm_id: vm.config().vm_id,
        owner: OwnerId(vm.owner().0),
        ownership,
        epoch: Epoch(epoch(vm)),
        memory_size: vm.memory().size() as u64,
        ticket: Vec::new(),
    })
}

/// What the VM to be ported is made of. Also does beforehand what saving needs.
pub(super) fn describe(vm: &Vm) -> Result<Description> {
    let mut description = vm.describe();
    for disk in &mut description.config.disks {
        if disk.vhost_user.is_some() {
            return Err(Error::Conflict(outside(&disk.id)));
        }
        // The destination may have another working directory.
        if let Ok(path) = std::path::absolute(&disk.path) {
            disk.path = path;
        }
    }
    description.images = vm.devices().disks().map(|disk| disk.identity()).collect::<Result<_>>()?;
    self::description(vm, description)
}

fn outside(disk: &str) -> String {
    format!("{disk}: a disk that another process serves (vhost-user) cannot be ported")
}

/// The same in the form it is sent or kept in.
pub(crate) fn description(vm: &Vm, mut description: VmDescription) -> Result<Description> {
    // Where this host keeps its keys is nothing to another.
    description.config.tls = None;
    vm.prepare_save()?;
    let leaf = |e: &kvm_bindings::kvm_cpuid_entry2| CpuLeaf {
        function: e.function,
        index: e.index,
        flags: e.flags,
        registers: [e.eax, e.ebx, e.ecx, e.edx],
    };
    Ok(Description {
        memory_size: vm.memory().size() as u64,
        vcpus: description.config.cpus,
        tsc_khz: vm.tsc_khz(),
        cpu: description.cpuid.iter().map(leaf).collect(),
        config: serde_json::to_vec(&VmDescription { cpuid: Vec::new(), ..description })
            .map_err(|e| Error::State(e.to_string()))?,
    })
}

/// Stops feeding receive queues, then the vCPUs; gives the instant of the last exit of the last of them. Their threads become
/// urgent when they have been told: a guest that goes on computing must not be.
pub(crate) fn pause(vm: &Vm, urgent: &mut Vec<Urgent>) -> Result<Stamp> {
    vm.devices().stop_input();
    vm.order_pause();
    urgent.extend(vm.vcpu_threads().filter_map(Urgent::vcpu));
    vm.pause()?;
    let now = stamp::now();
    let since = now.mono_ns.saturating_sub(vm.last_exit_ns());
    Ok(Stamp { mono_ns: now.mono_ns - since, real_ns: now.real_ns.saturating_sub(since), ..now })
}

/// The devices finish what they have begun.
pub(crate) fn quiesce(vm: &Vm) -> Result<()> {
    vm.quiesce()
}

/// Writes out what the disks' images lack: not held by anything, while the guest runs, so that little is left for the pause.
pub(super) fn flush_disks(vm: &Vm) -> Result<()> {
    let flushers = vm.devices().disks().map(|disk| disk.flusher()).collect::<Result<Vec<_>>>()?;
    flushers.iter().flatten().try_for_each(Flusher::flush).map_err(host("flushing disks before the pause"))
}

/// Locks the disks' images and looks into them, which the source has given up before it sent its state.
pub(super) fn take_images(vm: &Vm) -> Result<()> {
    let begin = Instant::now();
    loop {
        match vm.take_images() {
            Err(_) if begin.elapsed() < TAKE_PATIENCE => std::thread::sleep(TAKE_PAUSE),
            result => return result,
        }
    }
}

/// Everything but memory, and the epoch the guest has.
pub(crate) fn save(vm: &Vm) -> Result<(Sections, Epoch)> {
    let state = vm.save()?;
    let mut sections = Sections::new();
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        put(&mut sections, &vcpu_name(index), vcpu)?;
    }
    if let Some(irqchip) = &state.irqchip {
        put(&mut sections, CHIPS, irqchip)?;
    }
    if let Some(clocks) = &state.clocks {
        put(&mut sections, CLOCKS, clocks)?;
    }
    if let Some(clock) = &state.clock {
        put(&mut sections, CLOCK, clock)?;
    }
    put(&mut sections, SERIAL, &state.devices.serial)?;
    put(&mut sections, ACPI, &state.devices.acpi)?;
    for device in &state.devices.virtio {
        put(&mut sections, &virtio_name(&device.id), device)?;
    }
    Ok((sections, Epoch(epoch(vm))))
}

/// Adds a digest of memory, but for what was left out, to the state.
pub(super) fn add_digest(vm: &Vm, left_out: &LeftOut, sections: &mut Sections) -> Result<()> {
    put(sections, DIGEST, &transfer::digest(vm.memory(), left_out)?)
}

/// Adds who runs the VM, as in its ownership record: only checkpoints need that.
pub(crate) fn add_owner(vm: &Vm, sections: &mut Sections) -> Result<()> {
    put(sections, OWNER, &vm.owner().0)
}

/// Who ran the VM when the checkpoint was taken.
pub(crate) fn owner(sections: &Sections) -> Result<OwnerId> {
    take(sections, OWNER).map(OwnerId)
}

/// The guest goes on here: with a new epoch if one was won, and with the frames that were taken from its taps meanwhile.
pub(crate) fn resume(vm: &Vm, epoch: Option<Epoch>, frames: Vec<NetFrame>) {
    if vm.phase() == Phase::Ended {
        return;
    }
    let result = epoch.map_or(Ok(()), |e| vm.take_over(None, Some(e.0)));
    if let Err(e) = result {
        log::error!("the guest does not learn its epoch: {e}");
    }
    for frame in frames {
        inject(vm, &frame);
    }
    vm.resume_devices();
    if let Err(e) = vm.resume() {
        log::error!("the guest does not go on: {e}");
    }
}

/// Number of network devices.
pub(super) fn nets(vm: &Vm) -> u32 {
    vm.config().nets.len() as u32
}

/// Descriptors of the taps.
pub(super) fn taps(vm: &Vm) -> Vec<RawFd> {
    vm.devices().nets().flat_map(|n| n.tap_fds().collect::<Vec<_>>()).collect()
}

/// Takes frames that wait in a tap.
pub(super) fn take_frames(vm: &Vm, device: u32, max: usize) -> Vec<Vec<u8>> {
    match vm.devices().nets().nth(device as usize).map(|n| n.take_frames(max)) {
        Some(Ok(frames)) => frames,
        Some(Err(e)) => {
            log::warn!("{e}");
            Vec::new()
        }
        None => Vec::new(),
    }
}

/// Delivers a frame to the guest, before anything from its tap.
pub(super) fn inject(vm: &Vm, frame: &NetFrame) {
    let mut devices = vm.devices();
    let result = match devices.nets().nth(frame.device as usize) {
        Some(net) => net.inject_frames(vec![frame.bytes.clone()]),
        None => Err(Error::State(format!("a frame for network device {}, which there is not", frame.device))),
    };
    match result {
        Ok(()) => while devices.process_all() == Progress::More {},
        Err(e) => log::warn!("a forwarded frame is lost: {e}"),
    }
}

/// Holds all taps back: the guest gets injected frames only.
pub(super) fn hold_taps(vm: &Vm) {
    vm.devices().nets().for_each(|net| net.hold_tap(true));
}

/// Ends [`hold_taps`] for a device, with the frames `is_new` accepts of those that are in the tap.
pub(super) fn open_tap(vm: &Vm, device: u32, mut is_new: impl FnMut(&[u8]) -> bool) {
    let mut devices = vm.devices();
    let Some(net) = devices.nets().nth(device as usize) else { return };
    // What finds no room waits in the tap; it came last, so the source has not forwarded it.
    let opened = net.take_frames(net.room()).and_then(|mut frames| {
        frames.retain(|frame| is_new(frame));
        net.inject_frames(frames)
    });
    if let Err(e) = opened {
        log::warn!("frames are lost: {e}");
    }
    net.hold_tap(false);
    while devices.process_all() == Progress::More {}
}

/// MACs of the guest, by device.
pub(super) fn macs(vm: &Vm) -> Vec<[u8; 6]> {
    vm.devices().nets().map(|n| n.mac().0).collect()
}

/// Throws away what is in the taps: it came by flooding, and went to the source as well.
pub(super) fn discard_frames(vm: &Vm) {
    for net in vm.devices().nets() {
        let result = net.take_frames(STALE_MAX);
        log::trace!("discarded {:?} frames", result.map(|f| f.len()));
    }
}

/// Tells the switches where the guest's addresses are now.
pub(crate) fn announce(vm: &Vm) {
    for net in vm.devices().nets() {
        if let Err(e) = net.announce() {
            log::warn!("{e}");
        }
    }
}

/// The same once more, unless the VM has been told to stop since: it may be somewhere else already.
pub(super) fn announce_again(vm: &Vm) {
    for net in vm.devices().nets().filter(|net| net.takes_input()) {
        if let Err(e) = net.announce() {
            log::debug!("{e}");
        }
    }
}

/// The epoch in the guest's boot-info page; 0 for guests without one.
pub(crate) fn epoch(vm: &Vm) -> u64 {
    vm.info().and_then(|info| info.identity(vm.memory()).ok()).map_or(0, |identity| identity.epoch)
}

/// Most guest memory this host can give.
pub(super) fn memory_available(config: &ReceiveConfig) -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let free = kib.map_or(MEMORY_MAX, |k| (k << 10).saturating_sub(HOST_RESERVE));
    free.min(MEMORY_MAX).min(config.memory_max.map_or(u64::MAX, |m| m.bytes()))
}

/// Makes everything for a VM that is to arrive.
pub(super) fn build(
    description: &Description,
    config: &ReceiveConfig,
    owner: VmmId,
    stats: &Arc<Stats>,
) -> std::result::Result<Incoming, Reason> {
    let vm = decode(description).map_err(|e| Reason::new(ReasonCode::Protocol, e.to_string()))?;
    for disk in &vm.config.disks {
        if disk.vhost_user.is_some() {
            return Err(Reason::new(ReasonCode::Device, outside(&disk.id)));
        }
        // Without, the image would be locked at once, and not be the source's.
        if vm.images.iter().filter(|i| i.id == disk.id).count() != 1 {
            return Err(Reason::new(ReasonCode::Device, format!("{}: the source does not say which image", disk.id)));
        }
    }
    let vm = Vm::receive(&vm, config, owner, stats.clone()).map_err(|e| {
        let code = match e {
            Error::Memory(_) => ReasonCode::Memory,
            Error::State(_) => ReasonCode::Cpu,
            _ => ReasonCode::Device,
        };
        Reason::new(code, e.to_string())
    })?;
    let vm = Arc::new(vm);
    vm.prepare_save().map_err(|e| Reason::new(ReasonCode::Internal, e.to_string()))?;
    Ok(Incoming { vm, state: None })
}

/// Reads what a VM is made of.
pub(crate) fn decode(description: &Description) -> Result<VmDescription> {
    let mut vm: VmDescription =
        serde_json::from_slice(&description.config).map_err(|e| Error::State(format!("machine configuration: {e}")))?;
    if vm.config.memory.bytes() != description.memory_size || description.vcpus != vm.config.cpus {
        return Err(Error::State("the configuration is of another VM".into()));
    }
    let disks = &vm.config.disks;
    if vm.config.nets.len() > NETS_MAX || disks.len() > DISKS_MAX || disks.iter().any(|d| d.queues > DISK_QUEUES_MAX) {
        return Err(Error::State("more devices or queues than there can be".into()));
    }
    vm.cpuid = description
        .cpu
        .iter()
        .map(|leaf| {
            let [eax, ebx, ecx, edx] = leaf.registers;
            kvm_bindings::kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags: leaf.flags,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        })
        .collect();
    Ok(vm)
}

/// Sets the state of vCPUs and devices.
pub(super) fn load(incoming: &mut Incoming, sections: &Sections, arrived: &Arrived) -> Result<()> {
    let memory = incoming.vm.memory();
    if has(sections, DIGEST) {
        let (there, here): (u64, u64) = (take(sections, DIGEST)?, transfer::digest(memory, arrived.left_out())?);
        if there != here {
            return Err(Error::State(format!("memory differs: digest {here:#018x} here, {there:#018x} at the source")));
        }
    }
    if faults::poisons_skipped() {
        log::info!("{} pages that were skipped are poisoned", arrived.poison(memory)?);
    }
    let state = decode_state(&incoming.vm, sections)?;
    incoming.vm.load(&state)?;
    incoming.state = Some(state);
    Ok(())
}

/// Reads the state of a VM that is made of what `vm` is.
pub(crate) fn decode_state(vm: &Vm, sections: &Sections) -> Result<VmState> {
    let mut virtio = Vec::new();
    for device in vm.devices().virtio() {
        virtio.push(take(sections, &virtio_name(device.device().id()))?);
    }
    Ok(VmState {
        vcpus: (0..vm.vcpus().len()).map(|i| take(sections, &vcpu_name(i))).collect::<Result<_>>()?,
        irqchip: has(sections, CHIPS).then(|| take(sections, CHIPS)).transpose()?,
        clocks: has(sections, CLOCKS).then(|| take(sections, CLOCKS)).transpose()?,
        clock: has(sections, CLOCK).then(|| take(sections, CLOCK)).transpose()?,
        devices: DevicesState { serial: take(sections, SERIAL)?, acpi: take(sections, ACPI)?, virtio },
    })
}

/// Epoch, clock, devices, vCPU: the guest runs here.
pub(super) fn start(incoming: &Incoming, epoch: Option<Epoch>) -> Result<()> {
    let clock = incoming.state.as_ref().and_then(|s| s.clock);
    incoming.vm.take_over(clock, epoch.map(|e| e.0))?;
    lull::end(&incoming.vm);
    incoming.vm.resume_devices();
    incoming.vm.resume()
}

/// When the first vCPU entered the guest, if it has.
pub(crate) fn entered(vm: &Vm) -> Option<Stamp> {
    let at = vm.last_entry_ns();
    (at != 0).then(|| {
        let now = stamp::now();
        let since = now.mono_ns.saturating_sub(at);
        Stamp { mono_ns: at, real_ns: now.real_ns.saturating_sub(since), ..now }
    })
}

fn vcpu_name(index: usize) -> String {
    format!("vcpu{index}")
}

fn virtio_name(id: &str) -> String {
    // An id has at most ID_MAX letters; the longest name of a section is as long.
    format!("v/{id}").chars().take(migration::section::NAME_MAX).collect()
}

fn has(sections: &Sections, name: &str) -> bool {
    sections.iter().any(|s| s.name == name)
}

fn put(sections: &mut Sections, name: &str, value: &impl Serialize) -> Result<()> {
    let bytes = postcard::to_allocvec(value).map_err(|e| Error::State(format!("section {name}: {e}")))?;
    sections.push(Section { name: name.to_owned(), version: VERSION, bytes }).map_err(|e| Error::State(e.to_string()))
}

fn take<T: DeserializeOwned>(sections: &Sections, name: &str) -> Result<T> {
    let section = sections.get(name, VERSION).map_err(|e| Error::State(e.to_string()))?;
    match postcard::take_from_bytes(&section.bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(Error::State(format!("section {name}: {} bytes too many", rest.len()))),
        Err(e) => Err(Error::State(format!("section {name}: {e}"))),
    }
}
