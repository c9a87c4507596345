//! A vCPU as it is at power-on.
//!
//! KVM has no call that resets a vCPU. What it makes of a new one is read from a new one, in a VM of its own that never runs
//! ([`crate::vm::Vm::reset`]), and set in the old one. The local APIC's LINT0 of the first vCPU is already connected to
//! the PICs by KVM; the others wait for INIT and SIPI.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::Vcpu;
use super::state::{self, Tsc, VcpuState};
use crate::error::{Error, Result, kvm};

const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets what firmware would have set before an operating system starts: string instructions are fast, memory is cached.
pub(crate) fn as_firmware_does(fd: &VcpuFd) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let list = |entries: &[kvm_msr_entry]| Msrs::from_entries(entries).map_err(|e| Error::State(format!("{e:?}")));
    let mut misc = list(&[entry(MSR_MISC_ENABLE, 0)])?;
    let known = fd.get_msrs(&mut misc).map_err(kvm("get MSRs"))? == 1;
    let misc = misc.as_slice().first().map_or(0, |m| m.data);
    let mut wanted = vec![entry(MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK)];
    if known {
        wanted.push(entry(MSR_MISC_ENABLE, misc | FAST_STRINGS));
    }
    let set = fd.set_msrs(&list(&wanted)?).map_err(kvm("set MSRs"))?;
    if set < wanted.len() {
        // Guests run without, a little slower at worst.
        log::debug!("MSR {:#x} cannot be set before the start", wanted[set].index);
    }
    Ok(())
}

impl Vcpu {
    /// Makes the vCPU what `new` was read from: one of the same number and CPUID that has never run. Its TSC goes on.
    pub fn reset_to_boot(&mut self, new: &VcpuState) -> Result<()> {
        state::restore(&self.fd, new, Tsc::Keep)
    }
}
