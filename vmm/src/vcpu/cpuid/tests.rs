use super::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    entry(0, 0, [max, word(0), word(8), word(4)])
}

fn host(vendor_leaf: kvm_cpuid_entry2) -> CpuId {
    CpuId::from_entries(&[
        vendor_leaf,
        entry(1, 0, [0x1234, 0x3740_0800, 0x8020_0001, 0x1fab_fbff]),
        entry(4, 0, [0xfc00_4121, 1, 2, 3]),
        entry(4, 2, [0xfc00_4143, 1, 2, 3]),
        entry(4, 3, [0xfc1f_c163, 1, 2, 3]),
        entry(4, 4, [0, 0, 0, 0]),
        entry(0xb, 0, [1, 2, 0x100, 0x37]),
        entry(0xb, 1, [7, 64, 0x201, 0x37]),
        entry(0x1f, 0, [1, 2, 0x100, 0x37]),
        entry(0x8000_0001, 0, [0, 0, 0x40_0000, 0]),
        entry(0x8000_0008, 0, [0x3030, 7, 0x703f, 9]),
        entry(0x8000_001d, 0, [0x4121, 0, 0, 0]),
        entry(0x8000_001d, 3, [0xc163, 0, 0, 0]),
        entry(0x8000_001e, 0, [0x37, 0x11b, 0x301, 0]),
        entry(0x8000_0026, 0, [1, 2, 3, 4]),
    ])
    .unwrap()
}

fn get(list: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let e = list.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap();
    [e.eax, e.ebx, e.ecx, e.edx]
}

#[test]
fn an_intel_package_of_six() {
    let vm = for_vm(&host(vendor(b"GenuineIntel", 0x1f)), 6, true).unwrap();
    let vcpu = for_vcpu(&vm, 5).unwrap();
    // eight APIC ids, id 5, line size as it was; HTT; hypervisor, TSC deadline and what there was
    assert_eq!(get(&vcpu, 1, 0), [0x1234, 0x0508_0800, 0x8120_0001, 0x1fab_fbff]);
    assert_eq!(get(&vcpu, 4, 0)[0], 7 << 26 | 0x121, "L1 is a core's own");
    assert_eq!(get(&vcpu, 4, 2)[0], 7 << 26 | 0x143, "L2 is a core's own");
    assert_eq!(get(&vcpu, 4, 3)[0], 7 << 26 | 7 << 14 | 0x163, "L3 is everybody's");
    assert_eq!(get(&vcpu, 4, 4), [0; 4]);
    for function in [0xb, 0x1f] {
        assert_eq!(get(&vcpu, function, 0), [0, 1, 0x100, 5]);
        assert_eq!(get(&vcpu, function, 1), [3, 6, 0x201, 5]);
        assert_eq!(get(&vcpu, function, 2), [0, 0, 2, 5]);
    }
    assert_eq!(get(&vcpu, 0x8000_0008, 0), [0x3030, 7, 0x703f, 9], "reserved on this vendor");
    assert!(vm.as_slice().iter().all(|e| e.function != 0x8000_0026));
}

#[test]
fn an_amd_package_of_three() {
    let vm = for_vm(&host(vendor(b"AuthenticAMD", 0xd)), 3, true).unwrap();
    let vcpu = for_vcpu(&vm, 2).unwrap();
    assert_eq!(get(&vcpu, 1, 0)[1], 0x0203_0800);
    assert_eq!(get(&vcpu, 0x8000_0001, 0)[2], 0x40_0002);
    assert_eq!(get(&vcpu, 0x8000_0008, 0), [0x3030, 7, 0x2002, 9], "two bits of core id, three cores");
    assert_eq!(get(&vcpu, 0x8000_001d, 0)[0], 0x121);
    assert_eq!(get(&vcpu, 0x8000_001d, 3)[0], 2 << 14 | 0x163);
    assert_eq!(get(&vcpu, 0x8000_001e, 0), [2, 2, 0, 0]);
    assert!(vm.as_slice().iter().all(|e| e.function != 0x1f), "beyond the last leaf");
}

#[test]
fn one_is_alone() {
    let vm = for_vm(&host(vendor(b"GenuineIntel", 0x1f)), 1, false).unwrap();
    assert_eq!(get(&vm, 1, 0), [0x1234, 0x0001_0800, 0x8020_0001, 0x0fab_fbff]);
    assert_eq!(get(&vm, 0xb, 1), [0, 1, 0x201, 0]);
    assert_eq!(for_vcpu(&vm, 0).unwrap().as_slice(), vm.as_slice());
}

#[test]
fn what_a_foreign_list_lacks_is_not_missed() {
    for entries in [vec![], vec![entry(1, 0, [u32::MAX; 4])], vec![entry(0, 0, [u32::MAX; 4]); 3]] {
        let list = CpuId::from_entries(&entries).unwrap();
        assert_eq!(for_vcpu(&list, 31).unwrap().as_slice().len(), entries.len());
        for_vm(&list, CPUS_MAX, true).unwrap();
    }
}
