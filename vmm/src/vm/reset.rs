//! A VM begins again, in the same process.
//!
//! Owns what a reset needs ([`Restart`]), apart from the VM, so that a vCPU's thread can carry it out: it opens nothing. Order:
//! devices (what they have begun is waited for; those the kernel serves are taken back), vCPUs and interrupt controllers, then
//! memory, all of which becomes zero and is filled as at the first start. Always true: no vCPU is in the guest meanwhile and
//! nobody copies memory by the dirty log ([`super::life`]), so nothing of what ran before reaches what runs afterwards but what
//! lies outside of the machine: disks, frames that wait in taps, typed text that was not taken. Clocks run on; a guest with
//! a boot-info page begins with time 0 and without an epoch, as at a first start; the VM generation id stays.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use schemars::JsonSchema;
use serde::Serialize;

use super::Vm;
use super::build::Shell;
use super::state::{load_chips, save_irqchip};
use crate::acpi::generation;
use crate::boot::info::{InfoPage, OwnerId};
use crate::boot::start::{self, Start};
use crate::boot::{BootFiles, Entry, Image};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::notice::{self, Notice};
use crate::vcpu::state::{self as vcpu_state, MsrList};
use crate::vcpu::{Context, End, Vcpu};

/// Who wants a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResetCause {
    /// The guest, in order.
    Guest,
    /// A processor of the guest could not go on.
    TripleFault,
    /// The operator.
    Operator,
}

impl ResetCause {
    /// All of them.
    pub const ALL: [ResetCause; 3] = [ResetCause::Guest, ResetCause::TripleFault, ResetCause::Operator];

    /// As in JSON and metrics.
    pub fn name(self) -> &'static str {
        match self {
            ResetCause::Guest => "guest",
            ResetCause::TripleFault => "triple_fault",
            ResetCause::Operator => "operator",
        }
    }

    /// Of an end that is a reset where a VM begins again.
    pub(super) fn of_end(end: &End) -> Option<ResetCause> {
        match end {
            End::Reset => Some(ResetCause::Guest),
            End::TripleFault => Some(ResetCause::TripleFault),
            _ => None,
        }
    }
}

/// See the module.
pub(super) struct Restart {
    kvm: Arc<Kvm>,
    files: Arc<BootFiles>,
    config: Arc<Config>,
    owner: OwnerId,
    info: Option<InfoPage>,
    irqchip: bool,
    cpuid: CpuId,
    msrs: Arc<OnceLock<MsrList>>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    fd: Arc<VmFd>,
    memory: Memory,
    context: Arc<Context>,
}

impl Restart {
    /// Of a VM that has something to begin from.
    pub(super) fn of(vm: &Vm) -> Option<Restart> {
        Some(Restart {
            kvm: vm.kvm.clone(),
            files: vm.files.clone()?,
            config: vm.config.clone(),
            owner: vm.owner,
            info: vm.info,
            irqchip: vm.irqchip,
            cpuid: vm.cpuid.clone(),
            msrs: vm.msrs.clone(),
            vcpus: vm.vcpus.clone(),
            fd: vm.fd.clone(),
            memory: vm.memory.clone(),
            context: vm.context.clone(),
        })
    }

    /// Everything as at the first start. On an error the VM cannot be used any more.
    pub(super) fn perform(&self, cause: ResetCause) -> Result<()> {
        log::info!("the VM begins again: {}", cause.name());
        // A machine without ACPI has none; what is there then is not looked at.
        let generation = generation::read(&self.memory)?;
        let devices = {
            let mut devices = self.context.devices();
            devices.reset()?;
            devices.virtio().len()
        };
        self.reset_vcpus()?;
        self.memory.clear()?;
        let image = Image::load(&self.files.image, &self.memory, self.config.boot)?;
        let info = match &image.entry {
            Entry::Direct(start) => Some(InfoPage { address: start.boot_info }),
            Entry::Pvh(_) | Entry::Linux(_) => None,
        };
        if info != self.info {
            return Err(Error::Image {
                path: self.files.image.path().to_owned(),
                reason: "is not started as the image the VM was made for".into(),
            });
        }
        let start = Start { config: &self.config, files: &self.files, owner: self.owner, devices, cpuid: &self.cpuid };
        let first = self.vcpus[0].lock().unwrap_or_else(PoisonError::into_inner);
        start::prepare(&start, &image, &self.memory, first.fd(), Some(generation))?;
        self.context.gate.pass();
        self.context.gate.set_at_rest(false);
        let count = self.context.stats.count_reset(cause);
        notice::publish(Notice::Reset { cause, resets: count });
        Ok(())
    }

    /// The first vCPU is ready for the registers of a start and the others wait to be started by it.
    fn reset_vcpus(&self) -> Result<()> {
        let mut vcpus: Vec<_> = self.vcpus.iter().map(|v| v.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        if self.msrs.get().is_none() {
            let _ = self.msrs.set(MsrList::probe(&self.kvm, vcpus[0].fd(), self.irqchip)?);
        }
        let Some(msrs) = self.msrs.get() else { return Ok(()) };
        // What new ones are like, KVM shows with new ones.
        let new = Shell::with_cpuid(&self.kvm, None, self.irqchip, self.cpuid.clone(), vcpus.len())?;
        for (vcpu, new) in vcpus.iter_mut().zip(&new.vcpus) {
            vcpu.reset_to_boot(&vcpu_state::save(new, msrs, self.irqchip)?)?;
        }
        if self.irqchip {
            load_chips(&self.fd, &save_irqchip(&new.fd)?)?;
        }
        Ok(())
    }
}

impl Vm {
    /// The VM begins again, running or paused as it is; waits until it has. An error while somebody copies its memory, and for a VM
    /// that this process has no image of.
    pub fn reset(&self) -> Result<()> {
        if self.files.is_none() {
            let why = "this process has no image to begin the VM from again: it arrived without --image";
            return Err(Error::Conflict(why.into()));
        }
        self.life.reset()
    }

    /// Whether a reset is wanted: whoever copies the VM's memory must give that up, the reset waits for it.
    pub fn is_to_be_reset(&self) -> bool {
        self.life.is_to_be_reset()
    }
}
