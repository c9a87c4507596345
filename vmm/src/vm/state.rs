//! The state of a VM apart from the VM: what is saved, ported and restored.
//!
//! Two parts. [`VmDescription`] is all that is needed to build a VM that can take the state, and does not change while the VM
//! runs: it is sent long before the VM is stopped. [`VmState`] is everything that is not memory, and exists only while the vCPUs
//! are stopped and the devices are quiesced.
//!
//! Giving a VM away: [`Vm::describe`], [`Vm::prepare_save`]; then `devices().stop_input()`, [`Vm::pause`], [`Vm::quiesce`],
//! [`Vm::save`]. If it is to go on here after all: [`Vm::resume_devices`], [`Vm::resume`].
//! Taking one: [`Vm::receive`], [`Vm::pause`] and [`Vm::start`] (so that the threads exist), memory, [`Vm::load`], then
//! [`Vm::take_over`], [`Vm::resume_devices`], [`Vm::resume`].

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_cpuid_entry2, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::build::{event_irq, serial_irq};
use super::clocks::ClocksState;
use super::{Phase, Vm};
use crate::boot::info::{ClockState, InfoPage, OwnerId};
use crate::config::Config;
use crate::devices::DevicesState;
use crate::error::{Error, Result, kvm};
use crate::vcpu::state::{self as vcpu_state, MsrList, Tsc, VcpuState};

/// What a VM is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmDescription {
    /// Its configuration; taps and paths are the source's.
    pub config: Config,
    /// Whether KVM has interrupt controllers for it (not after a direct start).
    pub irqchip: bool,
    /// Its boot-info page, after a direct start.
    pub info: Option<InfoPage>,
    /// Frequency of its TSC in kHz; 0: not known.
    #[serde(default)]
    pub tsc_khz: u32,
    /// What the guest was told of the processor ([`crate::vcpu::cpuid::for_vm`]).
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

/// Interrupt controllers and timer in KVM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct IrqchipState {
    /// Both PICs and the IOAPIC.
    pub chips: Vec<kvm_irqchip>,
    /// PIT.
    pub pit: kvm_pit_state2,
}

/// Everything but memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, where KVM has them.
    pub irqchip: Option<IrqchipState>,
    /// What the guest's clocks said, where there are interrupt controllers.
    pub clocks: Option<ClocksState>,
    /// Devices.
    pub devices: DevicesState,
    /// What the guest's clocks said, after a direct start.
    pub clock: Option<ClockState>,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Vm {
    /// What this VM is made of.
    pub fn describe(&self) -> VmDescription {
        VmDescription {
            config: self.config.clone(),
            irqchip: self.irqchip,
            info: self.info,
            tsc_khz: self.tsc_khz,
            cpuid: self.cpuid.as_slice().to_vec(),
        }
    }

    /// Does what [`Vm::save`] would otherwise do while the guest stands still. The vCPUs must be stopped for an instant
    /// for it: the VM is paused and resumed if it runs.
    pub fn prepare_save(&self) -> Result<()> {
        if self.msrs.get().is_some() {
            return Ok(());
        }
        let running = self.phase() == Phase::Running;
        if running {
            self.pause()?;
        }
        let result = MsrList::probe(self.vcpu().fd(), &self.msrs_named, self.irqchip).map(|list| {
            let _ = self.msrs.set(list);
        });
        if running {
            self.resume()?;
        }
        result
    }

    /// Completes what the devices have begun; they do nothing more until [`Vm::resume_devices`]. The VM must be paused.
    pub fn quiesce(&self) -> Result<()> {
        self.must_be_stopped()?;
        self.devices().quiesce();
        Ok(())
    }

    /// Ends [`Vm::quiesce`] and `stop_input`; what waited is delivered now.
    pub fn resume_devices(&self) {
        self.devices().resume();
    }

    /// Everything but memory. The VM must be paused and quiesced.
    pub fn save(&self) -> Result<VmState> {
        self.must_be_stopped()?;
        self.prepare_save()?;
        let Some(msrs) = self.msrs.get() else { return Err(Error::State("no list of MSRs".into())) };
        let vcpus = self.lock_vcpus();
        // Clocks first: what follows takes its time, and they run on.
        let clock = self.info.map(|i| i.clock(&self.memory, vcpus[0].fd())).transpose()?;
        drop(vcpus);
        let clocks = if self.irqchip { Some(self.save_clocks()?) } else { None };
        let vcpus = self.lock_vcpus();
        Ok(VmState {
            clock,
            clocks,
            vcpus: vcpus.iter().map(|v| vcpu_state::save(v.fd(), msrs, self.irqchip)).collect::<Result<_>>()?,
            irqchip: if self.irqchip { Some(save_irqchip(&self.fd)?) } else { None },
            devices: self.devices().save(),
        })
    }

    /// Takes over everything but memory, which must be here already (queues are checked against it). The devices stay quiesced.
    /// On an error this VM cannot be used any more.
    pub fn load(&self, state: &VmState) -> Result<()> {
        self.must_be_stopped()?;
        if state.irqchip.is_some() != self.irqchip
            || state.clocks.is_some() != self.irqchip
            || state.clock.is_some() != self.info.is_some()
        {
            return Err(Error::State("is of a VM started in another way".into()));
        }
        if state.vcpus.len() != self.vcpus.len() {
            return Err(Error::State(format!("{} vCPUs instead of {}", state.vcpus.len(), self.vcpus.len())));
        }
        // In this order: a vCPU's timers are set by its clocks, its local APIC takes what the interrupt controllers
        // send at once, and they what the devices do.
        let tsc = match &state.clocks {
            Some(clocks) => self.load_clocks(clocks)?,
            None => Tsc::Keep,
        };
        for (vcpu, state) in self.lock_vcpus().iter().zip(&state.vcpus) {
            vcpu_state::restore(vcpu.fd(), state, tsc)?;
        }
        if let Some(irqchip) = &state.irqchip {
            self.load_chips(irqchip)?;
        }
        // An irqfd stays registered when its descriptor is closed only until then; the new one replaces it.
        let serial_irq = serial_irq(&self.fd, self.irqchip)?;
        let event_irq = event_irq(&self.fd, self.irqchip)?;
        self.devices().restore(&state.devices, serial_irq, event_irq)
    }

    /// Makes the loaded VM this process's: writes owner and epoch (`None` leaves it) in the boot-info page and continues
    /// the clock. Just before [`Vm::resume_devices`] and [`Vm::resume`].
    pub fn take_over(&self, clock: Option<ClockState>, epoch: Option<u64>) -> Result<()> {
        self.must_be_stopped()?;
        let Some(info) = self.info else { return Ok(()) };
        let mut identity = info.identity(&self.memory)?;
        let OwnerId(owner) = self.owner;
        identity.owner = owner;
        identity.epoch = epoch.unwrap_or(identity.epoch);
        identity.entropy = crate::boot::info::random()?;
        info.set_identity(&self.memory, identity)?;
        match clock {
            Some(clock) => info.continue_clock(&self.memory, self.vcpu().fd(), clock),
            None => Ok(()),
        }
    }

    pub(super) fn must_be_stopped(&self) -> Result<()> {
        match self.phase() {
            Phase::Paused | Phase::Created => Ok(()),
            Phase::Running => Err(Error::Conflict("the VM runs; pause it first".into())),
            Phase::Ended => Err(Error::Conflict("the VM has ended".into())),
        }
    }

    pub(super) fn load_chips(&self, state: &IrqchipState) -> Result<()> {
        for chip in state.chips.iter().filter(|c| CHIPS.contains(&c.chip_id)) {
            self.fd.set_irqchip(chip).map_err(kvm("set irqchip"))?;
        }
        self.fd.set_pit2(&state.pit).map_err(kvm("set PIT"))
    }
}

pub(super) fn save_irqchip(vm: &VmFd) -> Result<IrqchipState> {
    let mut chips = Vec::new();
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(kvm("get irqchip"))?;
        chips.push(chip);
    }
    Ok(IrqchipState { chips, pit: vm.get_pit2().map_err(kvm("get PIT"))? })
}
