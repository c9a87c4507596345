//! All vCPUs and interrupt controllers as at power-on, in a VM that goes on existing.

use super::Vm;
use super::build::{Shell, open_kvm};
use super::state::save_irqchip;
use crate::error::Result;
use crate::vcpu::state as vcpu_state;

impl Vm {
    /// Resets the vCPUs and interrupt controllers, for a reboot: afterwards the first vCPU is ready for the registers of a
    /// start and the others wait to be started by it. Memory, devices and clocks are untouched. Only while the VM is stopped; on
    /// an error it cannot be used any more.
    pub fn reset_vcpus(&self) -> Result<()> {
        self.must_be_stopped()?;
        self.prepare_save()?;
        let Some(msrs) = self.msrs.get() else { return Ok(()) };
        // What new ones are like, KVM shows with new ones.
        let new = Shell::with_cpuid(&open_kvm()?, None, self.irqchip, self.cpuid.clone(), self.vcpus.len())?;
        for (mut vcpu, new) in self.lock_vcpus().into_iter().zip(&new.vcpus) {
            vcpu.reset_to_boot(&vcpu_state::save(new, msrs, self.irqchip)?)?;
        }
        if self.irqchip {
            self.load_chips(&save_irqchip(&new.fd)?)?;
        }
        Ok(())
    }
}
