//! Counters of the whole process, read by the control interface while everything runs.

mod histogram;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::checkpoint::CheckpointReport;
use crate::error::Result;
use crate::metrics::Exposition;
use crate::vcpu::cpuid::CPUS_MAX;
use crate::vm::ResetCause;
pub use histogram::{Histogram, Reading};

/// A counter that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Exits of one vCPU by reason.
#[derive(Debug, Default)]
pub struct ExitStats {
    /// Stores to the platform device.
    pub platform: Counter,
    /// Accesses to virtio registers.
    pub mmio: Counter,
    /// Accesses to ports.
    pub pio: Counter,
    /// Halts (only without an interrupt controller).
    pub halt: Counter,
    /// Signals.
    pub interrupted: Counter,
    /// A vCPU that waits to be started was looked at again.
    pub waiting: Counter,
    /// All else.
    pub other: Counter,
}

impl ExitStats {
    /// Adds them for the vCPU with this number.
    pub fn metrics(&self, vcpu: usize, out: &mut Exposition) {
        let vcpu = vcpu.to_string();
        for (reason, counter) in [
            ("platform", &self.platform),
            ("mmio", &self.mmio),
            ("pio", &self.pio),
            ("halt", &self.halt),
            ("interrupted", &self.interrupted),
            ("waiting", &self.waiting),
            ("other", &self.other),
        ] {
            let labels = [("vcpu", vcpu.as_str()), ("reason", reason)];
            out.counter("vmm_vcpu_exits_total", "Exits from the guest to this process.", &labels, counter);
        }
    }
}

/// What became of exits.
#[derive(Debug, Default)]
pub struct VcpuStats {
    /// Parks.
    pub parks: Counter,
    /// Parks in which the vCPU thread slept.
    pub slept: Counter,
    /// Accesses to addresses where there is nothing.
    pub unclaimed: Counter,
}

impl VcpuStats {
    /// Adds them. Only guests that have one vCPU park.
    pub fn metrics(&self, out: &mut Exposition) {
        let vcpu = [("vcpu", "0")];
        out.counter("vmm_vcpu_parks_total", "Times the guest had nothing to do.", &vcpu, &self.parks);
        out.counter("vmm_vcpu_sleeps_total", "Parks in which the vCPU thread slept.", &vcpu, &self.slept);
        let help = "Accesses of the guest to addresses where nothing is.";
        out.counter("vmm_unclaimed_accesses_total", help, &[], &self.unclaimed);
    }
}

/// Milestones, in microseconds since the process began; 0: not reached.
#[derive(Debug, Default)]
pub struct BootTimes {
    /// An instance was asked for.
    pub asked: AtomicU64,
    /// All resources are there.
    pub built: AtomicU64,
    /// First KVM_RUN.
    pub run: AtomicU64,
    /// The guest's marks (guest_abi::platform::BOOT_MARK), first time of 1, 2 and 3.
    pub marks: [AtomicU64; 3],
}

impl BootTimes {
    /// Adds those that were reached.
    pub fn metrics(&self, out: &mut Exposition) {
        for (milestone, us) in [
            ("asked", &self.asked),
            ("built", &self.built),
            ("run", &self.run),
            ("first_instruction", &self.marks[0]),
            ("serving", &self.marks[1]),
            ("prepared", &self.marks[2]),
        ] {
            let us = us.load(Ordering::Relaxed);
            if us != 0 {
                let labels = [("milestone", milestone)];
                let help = "From the start of the process to a milestone of the guest's boot.";
                out.gauge("vmm_boot_seconds", help, &labels, us as f64 / 1e6);
            }
        }
    }

    /// Sets a milestone to now, if it was not reached before.
    pub fn reach(milestone: &AtomicU64) {
        let _ = milestone.compare_exchange(0, since_start_us().max(1), Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Checkpoints of the VM.
#[derive(Debug, Default)]
pub struct CheckpointStats {
    /// Those on the disk.
    pub completed: Counter,
    /// Those that came to nothing.
    pub failed: Counter,
    /// Of the last one: bytes, and microseconds from the order to the end and of the pause.
    last: [AtomicU64; 3],
}

impl CheckpointStats {
    /// Counts one.
    pub fn count(&self, result: &Result<CheckpointReport>) {
        let Ok(report) = result else { return self.failed.inc() };
        let figures = [report.bytes, report.elapsed_us, report.pause_us.unwrap_or(0)];
        self.last.iter().zip(figures).for_each(|(slot, figure)| slot.store(figure, Ordering::Relaxed));
        self.completed.inc();
    }

    /// Adds them.
    pub fn metrics(&self, out: &mut Exposition) {
        for (result, counter) in [("completed", &self.completed), ("failed", &self.failed)] {
            out.counter("vmm_checkpoints_total", "Checkpoints of the VM.", &[("result", result)], counter);
        }
        if self.completed.get() > 0 {
            let [bytes, elapsed, pause] = [0, 1, 2].map(|i| self.last[i].load(Ordering::Relaxed) as f64);
            out.gauge("vmm_checkpoint_bytes", "What the last checkpoint has written.", &[], bytes);
            out.gauge("vmm_checkpoint_seconds", "How long the last checkpoint took.", &[], elapsed / 1e6);
            let help = "How long no vCPU ran in the last checkpoint.";
            out.gauge("vmm_checkpoint_pause_seconds", help, &[], pause / 1e6);
        }
    }
}

/// Everything that is counted outside the devices.
#[derive(Debug, Default)]
pub struct Stats {
    /// Exits, by number of the vCPU.
    pub exits: [ExitStats; CPUS_MAX as usize],
    /// All vCPUs.
    pub vcpu: VcpuStats,
    /// Boot.
    pub boot: BootTimes,
    /// Resets, in the order of [`ResetCause::ALL`].
    resets: [Counter; ResetCause::ALL.len()],
    /// Checkpoints.
    pub checkpoints: CheckpointStats,
}

impl Stats {
    /// A reset has taken place. Gives how many there have been.
    pub fn count_reset(&self, cause: ResetCause) -> u64 {
        self.resets[cause as usize].inc();
        self.resets()
    }

    /// Resets of the VM in this process.
    pub fn resets(&self) -> u64 {
        self.resets.iter().map(Counter::get).sum()
    }

    /// Adds the resets.
    pub fn reset_metrics(&self, out: &mut Exposition) {
        for (cause, counter) in ResetCause::ALL.iter().zip(&self.resets) {
            out.counter("vmm_resets_total", "Times the VM began again.", &[("cause", cause.name())], counter);
        }
    }
}

static START: OnceLock<Instant> = OnceLock::new();

/// Remembers when the process began; the first call counts.
pub fn process_starts() {
    START.get_or_init(Instant::now);
}

/// Microseconds since the process began.
pub fn since_start_us() -> u64 {
    START.get_or_init(Instant::now).elapsed().as_micros() as u64
}
