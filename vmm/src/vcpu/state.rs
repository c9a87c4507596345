//! The state of a vCPU, apart from the vCPU.
//!
//! Read and set only while no vCPU of the VM runs, after [`super::Vcpu::run`] returned for a kick. The TSC's value is among the
//! registers, but is not what a VM's clocks are continued from, where there is something better ([`Tsc`]): the clock page of
//! a direct start is rewritten instead (a guest may read the host's TSC, whatever KVM was told), and KVM may take offsets.
//!
//! The order is the kernel's: what state the vCPU is in is read first and its events last, for to read the one
//! completes an INIT or SIPI under way and may change the other; segments with the APIC's base are set before the APIC, the APIC
//! and the TSC before the deadline of the APIC's timer.

use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, kvm};

/// IA32_TIME_STAMP_COUNTER.
pub const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: what it starts depends on the TSC and the local APIC.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Most model-specific registers of a state.
pub const MSRS_MAX: usize = 512;
/// Most registers read or set by one call.
const MSRS_BATCH: usize = KVM_MAX_MSR_ENTRIES;
/// Registers that belong to the host's side of paravirtual features, or that KVM gives but does not take back.
const NOT_SAVED: [u32; 1] = [
    0x4000_0000, // Hyper-V guest OS id: setting it to zero again is refused in some orders
];
/// Polling of the host when the guest halts: matters only where KVM halts it.
const MSR_POLL_CONTROL: u32 = 0x4b56_4d05;
/// Memory types, which KVM has but does not name: eight variable ranges, eleven fixed ones, the default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// What becomes of the TSC when a state is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tsc {
    /// It is left as it is.
    Keep,
    /// It is set to its saved value and so many ticks.
    Advance(u64),
}

/// Registers and the like of one vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers.
    pub sregs: kvm_sregs,
    /// FPU, SSE, AVX: the XSAVE area in words, without the zeroes at its end.
    pub xsave: Vec<u32>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Pending events.
    pub events: kvm_vcpu_events,
    /// Running or halted.
    pub mp_state: kvm_mp_state,
    /// Model-specific registers: index and value.
    pub msrs: Vec<(u32, u64)>,
    /// Local APIC, where KVM has it.
    pub lapic: Option<kvm_lapic_state>,
}

/// Which model-specific registers this host can save: found out once, before anything is in a hurry.
#[derive(Debug, Clone)]
pub struct MsrList(Vec<u32>);

impl MsrList {
    /// Those that KVM names. To be asked while a VM is built: later /dev/kvm may be out of reach.
    pub fn named(kvm_fd: &Kvm) -> Result<Vec<u32>> {
        Ok(kvm_fd.get_msr_index_list().map_err(kvm("get MSR list"))?.as_slice().to_vec())
    }

    /// Those of the named that can be read from this vCPU; `system`: also those that only an operating system sets.
    pub fn probe(fd: &VcpuFd, named: &[u32], system: bool) -> Result<MsrList> {
        let wanted = |i: &u32| !NOT_SAVED.contains(i) && (system || *i != MSR_POLL_CONTROL);
        let mut left: Vec<u32> = named.iter().copied().filter(wanted).collect();
        if system {
            let more: Vec<u32> = MTRRS.into_iter().flatten().filter(|i| !left.contains(i)).collect();
            left.extend(more);
        }
        left.truncate(MSRS_MAX);
        let mut good = Vec::new();
        while !left.is_empty() {
            let asked = left.len().min(MSRS_BATCH);
            let n = read_batch(fd, &left[..asked])?.len();
            good.extend(left.drain(..n));
            if n < asked {
                left.remove(0); // the one KVM stopped at
            }
        }
        Ok(MsrList(good))
    }
}

/// Reads all of `indices`, which could be read before.
fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut out = Vec::with_capacity(indices.len());
    for batch in indices.chunks(MSRS_BATCH) {
        let got = read_batch(fd, batch)?;
        if let Some(missing) = batch.get(got.len()) {
            return Err(Error::State(format!("MSR {missing:#x} cannot be read any more")));
        }
        out.extend(got);
    }
    Ok(out)
}

/// Reads as many of `indices` as KVM gives before the first it refuses.
fn read_batch(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
    let entries: Vec<_> = indices.iter().map(|i| kvm_msr_entry { index: *i, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| Error::State(format!("{e:?}")))?;
    let n = fd.get_msrs(&mut msrs).map_err(kvm("get MSRs"))?;
    Ok(msrs.as_slice()[..n].iter().map(|m| (m.index, m.data)).collect())
}

/// Reads everything.
pub fn save(fd: &VcpuFd, msrs: &MsrList, lapic: bool) -> Result<VcpuState> {
    let mp_state = fd.get_mp_state().map_err(kvm("get MP state"))?;
    let xsave = fd.get_xsave().map_err(kvm("get XSAVE"))?;
    let used = xsave.region.iter().rposition(|w| *w != 0).map_or(0, |i| i + 1);
    Ok(VcpuState {
        mp_state,
        regs: fd.get_regs().map_err(kvm("get regs"))?,
        sregs: fd.get_sregs().map_err(kvm("get sregs"))?,
        xsave: xsave.region[..used].to_vec(),
        xcrs: fd.get_xcrs().map_err(kvm("get XCRs"))?,
        debug: fd.get_debug_regs().map_err(kvm("get debug registers"))?,
        lapic: if lapic { Some(fd.get_lapic().map_err(kvm("get LAPIC"))?) } else { None },
        msrs: read(fd, &msrs.0)?,
        events: fd.get_vcpu_events().map_err(kvm("get vCPU events"))?,
    })
}

/// Sets everything.
pub fn restore(fd: &VcpuFd, state: &VcpuState, tsc: Tsc) -> Result<()> {
    let mut xsave = kvm_xsave::default();
    if state.xsave.len() > xsave.region.len() || state.msrs.len() > MSRS_MAX {
        return Err(Error::State("vCPU state larger than it can be".into()));
    }
    xsave.region[..state.xsave.len()].copy_from_slice(&state.xsave);
    fd.set_mp_state(state.mp_state).map_err(kvm("set MP state"))?;
    fd.set_regs(&state.regs).map_err(kvm("set regs"))?;
    fd.set_sregs(&state.sregs).map_err(kvm("set sregs"))?;
    // SAFETY: the area is a whole `kvm_xsave`, and no dynamically enabled feature, which would need more, is ever enabled.
    unsafe { fd.set_xsave(&xsave) }.map_err(kvm("set XSAVE"))?;
    fd.set_xcrs(&state.xcrs).map_err(kvm("set XCRs"))?;
    fd.set_debug_regs(&state.debug).map_err(kvm("set debug registers"))?;
    if let Some(lapic) = &state.lapic {
        fd.set_lapic(lapic).map_err(kvm("set LAPIC"))?;
    }
    set_msrs(fd, &state.msrs, tsc)?;
    fd.set_vcpu_events(&state.events).map_err(kvm("set vCPU events"))
}

/// KVM stops at the first register it refuses; a zero that it does not take is none either, anything else is an error.
fn set_msrs(fd: &VcpuFd, msrs: &[(u32, u64)], tsc: Tsc) -> Result<()> {
    let entry = |(index, data): &(u32, u64)| {
        let data = match (*index, tsc) {
            (MSR_TSC, Tsc::Keep) => return None,
            (MSR_TSC, Tsc::Advance(ticks)) => data.wrapping_add(ticks),
            _ => *data,
        };
        Some(kvm_msr_entry { index: *index, data, ..Default::default() })
    };
    let mut entries: Vec<_> = msrs.iter().filter_map(entry).collect();
    entries.sort_by_key(|e| e.index == MSR_TSC_DEADLINE);
    let mut left = &entries[..];
    while !left.is_empty() {
        let asked = left.len().min(MSRS_BATCH);
        let batch = Msrs::from_entries(&left[..asked]).map_err(|e| Error::State(format!("{e:?}")))?;
        let n = fd.set_msrs(&batch).map_err(kvm("set MSRs"))?.min(asked);
        left = &left[n..];
        if n < asked
            && let Some((refused, rest)) = left.split_first()
        {
            if refused.data != 0 {
                return Err(Error::State(format!("MSR {:#x} = {:#x} is refused here", refused.index, refused.data)));
            }
            left = rest;
        }
    }
    Ok(())
}

/// Features of the processor a guest has been told of that are not here: `None` if all are.
pub fn missing_features(told: &CpuId, here: &CpuId) -> Option<String> {
    // Leaves whose registers are sets of features.
    const LEAVES: [(u32, u32, &str); 6] = [
        (0x4000_0001, 0, "CPUID 40000001 (KVM)"),
        (7, 1, "CPUID 7.1"),
        (1, 0, "CPUID 1"),
        (7, 0, "CPUID 7.0"),
        (0x8000_0001, 0, "CPUID 80000001"),
        (0xd, 0, "CPUID D.0 (XCR0)"),
    ];
    // Bits that say what the OS has switched on, or that `cpuid::for_vm` sets whatever the processor can do.
    const LEAF1_ECX_OTHER: u32 = 1 << 24 | 1 << 27 | 1 << 31;
    const LEAF1_EDX_OTHER: u32 = 1 << 28;
    const AMD_ECX_OTHER: u32 = 1 << 1;
    for (function, index, name) in LEAVES {
        let find = |c: &CpuId| {
            c.as_slice().iter().find(|e| e.function == function && e.index == index).map_or(
                [0; 3],
                |e| match function {
                    1 => [0, e.ecx & !LEAF1_ECX_OTHER, e.edx & !LEAF1_EDX_OTHER],
                    7 if index == 1 => [e.eax, 0, 0],
                    7 => [e.ebx, e.ecx, e.edx],
                    0xd | 0x4000_0001 => [e.eax, 0, 0],
                    _ => [0, e.ecx & !AMD_ECX_OTHER, e.edx],
                },
            )
        };
        for (told, here) in find(told).into_iter().zip(find(here)) {
            if told & !here != 0 {
                return Some(format!("{name}: {:#x}", told & !here));
            }
        }
    }
    None
}
