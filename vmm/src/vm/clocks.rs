//! The clocks of a guest that has KVM's: kvmclock and the time stamp counters.
//!
//! Always true: they go on from where they were by the real time that has passed, never back, and stay as far apart from each
//! other as they were. (After a direct start the guest has a clock page instead: [`crate::boot::info`].)
//!
//! A guest's TSC is the host's plus an offset. Where KVM tells the offsets they are carried over, as the kernel's
//! documentation of KVM_VCPU_TSC_OFFSET says, so all vCPUs stay exactly together; else each TSC is set to its value
//! plus what has passed, and KVM makes those equal that are almost so.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clock_data,
    kvm_device_attr,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::Vm;
use crate::boot::info::host_real_ns;
use crate::error::{Error, Result, kvm};
use crate::vcpu::state::Tsc;

/// Largest difference of two frequencies that the clocks' own corrections even out, in parts per million (as in KVM).
const TSC_TOLERANCE_PPM: u64 = 250;
/// Most time that is believed to have passed since a state was saved: a century. Beyond it a clock is wrong.
const ELAPSED_MAX_NS: u64 = 100 * 365 * 86_400 * 1_000_000_000;

/// The calls kvm-ioctls lacks for vCPUs.
mod ioctl {
    #![allow(missing_docs)]
    use super::{KVMIO, kvm_device_attr};
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

/// What was read at one instant, as good as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClocksState {
    /// kvmclock.
    pub kvmclock_ns: u64,
    /// The host's TSC.
    pub host_tsc: u64,
    /// The host's CLOCK_REALTIME.
    pub real_ns: u64,
    /// What the vCPUs' TSCs are ahead of the host's, modulo 2^64; empty where KVM does not tell.
    pub tsc_offsets: Vec<u64>,
}

impl Vm {
    /// Reads the clocks; they run on.
    pub(super) fn save_clocks(&self) -> Result<ClocksState> {
        let vcpus = self.lock_vcpus();
        let offsets = vcpus.iter().map(|v| tsc_offset(v.fd())).collect::<Option<Vec<u64>>>();
        let tsc_offsets = if self.tsc_scaled { Vec::new() } else { offsets.unwrap_or_default() };
        let now = Instant::read(&self.fd)?;
        Ok(ClocksState { kvmclock_ns: now.kvmclock_ns, host_tsc: now.tsc, real_ns: now.real_ns, tsc_offsets })
    }

    /// Sets kvmclock and, where KVM takes offsets, the TSCs; else says how far the TSCs' saved values are behind.
    pub(super) fn load_clocks(&self, saved: &ClocksState) -> Result<Tsc> {
        let elapsed = host_real_ns().saturating_sub(saved.real_ns);
        if elapsed > ELAPSED_MAX_NS {
            return Err(Error::State(format!(
                "was saved {} s ago: one of the clocks is wrong",
                elapsed / 1_000_000_000
            )));
        }
        let clock = saved.kvmclock_ns.saturating_add(elapsed);
        self.fd.set_clock(&kvm_clock_data { clock, ..Default::default() }).map_err(kvm("set clock"))?;
        let vcpus = self.lock_vcpus();
        if saved.tsc_offsets.len() != vcpus.len() || self.tsc_scaled {
            return Ok(Tsc::Advance(ticks(elapsed, self.tsc_khz)));
        }
        let now = Instant::read(&self.fd)?;
        let passed = ticks(now.kvmclock_ns.saturating_sub(saved.kvmclock_ns), self.tsc_khz);
        for (vcpu, offset) in vcpus.iter().zip(&saved.tsc_offsets) {
            let offset = offset.wrapping_add(saved.host_tsc).wrapping_add(passed).wrapping_sub(now.tsc);
            if !set_tsc_offset(vcpu.fd(), offset) {
                return Ok(Tsc::Advance(ticks(elapsed, self.tsc_khz)));
            }
        }
        Ok(Tsc::Keep)
    }

    /// Before the vCPUs go on: a Linux guest does not take the pause for a hang.
    pub(super) fn tell_of_pause(&self) {
        if self.irqchip {
            for vcpu in self.lock_vcpus() {
                // Refused by KVM when the guest has no kvmclock.
                let _ = vcpu.fd().kvmclock_ctrl();
            }
        }
    }
}

/// Gives a vCPU that has not run the frequency a guest was told, if the host's is not near enough. Says whether it has.
pub(super) fn scale_tsc(fd: &VcpuFd, host_khz: u32, guest_khz: u32) -> Result<bool> {
    let apart = u64::from(host_khz.abs_diff(guest_khz)) * 1_000_000;
    if guest_khz == 0 || apart <= u64::from(host_khz) * TSC_TOLERANCE_PPM {
        return Ok(false);
    }
    let refused = |_| {
        Error::State(format!("the guest's TSC has {guest_khz} kHz, this host's {host_khz}, and it cannot scale it"))
    };
    fd.set_tsc_khz(guest_khz).map_err(refused)?;
    Ok(true)
}

/// Nanoseconds in ticks of a counter.
fn ticks(ns: u64, khz: u32) -> u64 {
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

/// kvmclock, and the host's clocks at the same instant.
struct Instant {
    kvmclock_ns: u64,
    tsc: u64,
    real_ns: u64,
}

impl Instant {
    /// KVM reads all three together where the host's own clock is its TSC.
    fn read(vm: &VmFd) -> Result<Instant> {
        let clock = vm.get_clock().map_err(kvm("get clock"))?;
        let (tsc, real_ns) = (host_tsc(), host_real_ns());
        Ok(Instant {
            kvmclock_ns: clock.clock,
            tsc: if clock.flags & KVM_CLOCK_HOST_TSC != 0 { clock.host_tsc } else { tsc },
            real_ns: if clock.flags & KVM_CLOCK_REALTIME != 0 { clock.realtime } else { real_ns },
        })
    }
}

fn host_tsc() -> u64 {
    // SAFETY: every processor with KVM has the instruction, and Linux leaves it to user space.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: value as u64 }
}

fn tsc_offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = attribute(&mut offset);
    // SAFETY: the attribute names a u64 that the kernel fills, which lives on.
    let rc = unsafe { ioctl_with_ref(fd, ioctl::KVM_GET_DEVICE_ATTR(), &attribute) };
    (rc == 0).then_some(offset)
}

fn set_tsc_offset(fd: &VcpuFd, mut offset: u64) -> bool {
    let attribute = attribute(&mut offset);
    // SAFETY: the attribute names a u64 that the kernel reads, which lives on.
    let rc = unsafe { ioctl_with_ref(fd, ioctl::KVM_SET_DEVICE_ATTR(), &attribute) };
    rc == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_do_not_overflow() {
        assert_eq!(ticks(1_000_000_000, 2_500_000), 2_500_000_000);
        assert_eq!(ticks(ELAPSED_MAX_NS, 3_000_000), ELAPSED_MAX_NS * 3);
    }
}
