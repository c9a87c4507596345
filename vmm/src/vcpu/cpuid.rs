//! What a guest is told of its processors: KVM's offer, with the topology of this VM.
//!
//! One package of n cores with one thread each; the APIC id of vCPU i is i. Always true: all vCPUs are told the same but for
//! their APIC ids, so the description of a VM carries one list ([`for_vm`]), and each host makes the vCPUs' own from it
//! ([`for_vcpu`]). A list that came from another host is hostile: nothing here depends on leaves being there.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use crate::error::{Error, Result};
pub use crate::layout::CPUS_MAX;

/// Leaf 1, ECX: the TSC-deadline mode of the local APIC's timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX, AMD: the logical processors of leaf 1 are cores.
const CMP_LEGACY: u32 = 1 << 1;
const VENDORS_AMD: [&[u8; 12]; 2] = [b"AuthenticAMD", b"HygonGenuine"];
/// Leaves of the topology: levels of the processor by APIC id.
const EXTENDED_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// The same in AMD's own form; Linux takes it before the others, so none is better than a wrong one.
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;
/// Cache level from which all cores share one.
const SHARED_CACHE: u32 = 3;

/// The list for a VM: `supported` is KVM's offer, `deadline` whether KVM's local APIC has the TSC-deadline timer.
pub fn for_vm(supported: &CpuId, cpus: u32, deadline: bool) -> Result<CpuId> {
    let entries = supported.as_slice();
    let basic_max = leaf(entries, 0).map_or(0, |e| e.eax);
    let amd = leaf(entries, 0).is_some_and(is_amd);
    let mut out: Vec<kvm_cpuid_entry2> = entries
        .iter()
        .filter(|e| !EXTENDED_TOPOLOGY.contains(&e.function) && e.function != AMD_EXTENDED_TOPOLOGY)
        .copied()
        .collect();
    let ids = cpus.next_power_of_two();
    for e in &mut out {
        match e.function {
            1 => {
                e.ecx = set(e.ecx, TSC_DEADLINE, deadline) | HYPERVISOR;
                e.edx = set(e.edx, HTT, cpus > 1);
                e.ebx = e.ebx & 0xff00_ffff | (if amd { cpus } else { ids }) << 16;
            }
            // Cache parameters; type 0 ends the list.
            4 if e.eax & 0x1f != 0 => e.eax = e.eax & 0x3fff | sharing(e.eax, ids) << 14 | (ids - 1) << 26,
            0x8000_001d if e.eax & 0x1f != 0 => e.eax = e.eax & !(0xfff << 14) | sharing(e.eax, cpus) << 14,
            0x8000_0001 if amd => e.ecx = set(e.ecx, CMP_LEGACY, cpus > 1),
            0x8000_0008 if amd => e.ecx = e.ecx & !0xf0ff | (cpus - 1) | ids.trailing_zeros() << 12,
            _ => {}
        }
    }
    for function in EXTENDED_TOPOLOGY {
        let there = function == 0xb || leaf(entries, function).is_some();
        if there && function <= basic_max {
            out.extend(extended_topology(function, cpus));
        }
    }
    list(&for_apic(out, 0))
}

/// The list for one vCPU of a VM.
pub fn for_vcpu(vm: &CpuId, apic_id: u32) -> Result<CpuId> {
    list(&for_apic(vm.as_slice().to_vec(), apic_id))
}

fn for_apic(mut entries: Vec<kvm_cpuid_entry2>, apic_id: u32) -> Vec<kvm_cpuid_entry2> {
    let amd = leaf(&entries, 0).is_some_and(is_amd);
    for e in &mut entries {
        match e.function {
            1 => e.ebx = e.ebx & 0x00ff_ffff | apic_id << 24,
            0xb | 0x1f => e.edx = apic_id,
            // Core id is the APIC id, one thread a core, node 0 of one.
            0x8000_001e if amd => (e.eax, e.ebx, e.ecx) = (apic_id, apic_id, 0),
            _ => {}
        }
    }
    entries
}

/// Threads level, core level, end.
fn extended_topology(function: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, shift, processors, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        ..Default::default()
    };
    let shift = cpus.next_power_of_two().trailing_zeros();
    [level(0, 0, 1, THREAD), level(1, shift, cpus, CORE), level(2, 0, 0, 0)]
}

/// Logical processors that share this cache, less one.
fn sharing(cache: u32, all: u32) -> u32 {
    if cache >> 5 & 7 >= SHARED_CACHE { all - 1 } else { 0 }
}

fn leaf(entries: &[kvm_cpuid_entry2], function: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| e.function == function)
}

fn is_amd(leaf0: &kvm_cpuid_entry2) -> bool {
    let vendor = [leaf0.ebx, leaf0.edx, leaf0.ecx].map(u32::to_le_bytes);
    VENDORS_AMD.iter().any(|v| v[..] == *vendor.as_flattened())
}

fn set(word: u32, bits: u32, on: bool) -> u32 {
    if on { word | bits } else { word & !bits }
}

fn list(entries: &[kvm_cpuid_entry2]) -> Result<CpuId> {
    let too_many = |_| Error::State(format!("CPUID: {} leaves, at most {KVM_MAX_CPUID_ENTRIES}", entries.len()));
    CpuId::from_entries(entries).map_err(too_many)
}

#[cfg(test)]
mod tests;
