//! A virtual machine: its parts put together, its life.
//!
//! Owns KVM's VM, the memory, the devices, the threads. Life: built (by [`Vm::boot`] or [`Vm::receive`]), started,
//! then running and paused in turn, ended. Built means that everything that can fail has been done.

mod build;
pub mod clocks;
mod copy;
mod io;
mod life;
mod power;
mod reset;
pub mod state;
mod throttle;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::BootFiles;
use crate::boot::info::{InfoPage, OwnerId};
use crate::checkpoint::lineage::{Broken, Lineage};
use crate::config::Config;
use crate::devices::Devices;
use crate::memory::Memory;
use crate::stats::Stats;
use crate::vcpu::state::MsrList;
use crate::vcpu::{Context, Vcpu};
#[cfg(test)]
pub(crate) use build::create_vm;
pub use copy::CopyClaim;
use life::Life;
pub use life::Phase;
pub use reset::ResetCause;
pub use state::{VmDescription, VmState};
pub use throttle::Throttle;

/// A virtual machine. Fields are dropped in this order: what uses memory before memory.
pub struct Vm {
    config: Arc<Config>,
    owner: OwnerId,
    info: Option<InfoPage>,
    irqchip: bool,
    cpuid: CpuId,
    tsc_khz: u32,
    /// KVM gives the guest another frequency than the host's.
    tsc_scaled: bool,
    msrs: Arc<OnceLock<MsrList>>,
    /// What a reset begins from.
    files: Option<Arc<BootFiles>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    life: Arc<Life>,
    io_stop: Arc<(AtomicBool, EventFd)>,
    lineage: Mutex<std::result::Result<Lineage, Broken>>,
    context: Arc<Context>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    kvm: Arc<Kvm>,
    fd: Arc<VmFd>,
    memory: Memory,
}

impl Vm {
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

    /// The vCPUs, by number; to lock one waits for ever unless the VM is paused, not started or ended.
    pub fn vcpus(&self) -> &[Arc<Mutex<Vcpu>>] {
        &self.vcpus
    }

    /// The vCPU that starts first.
    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        // There is always one: `build` makes at least one.
        self.vcpus[0].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All vCPUs, locked.
    pub(crate) fn lock_vcpus(&self) -> Vec<MutexGuard<'_, Vcpu>> {
        self.vcpus.iter().map(|v| v.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Wakes a guest that is parked, so that it looks around.
    pub fn wake(&self) {
        self.context.gate.signal();
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
