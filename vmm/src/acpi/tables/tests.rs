//! The tables are read back as a guest does: from the root pointer on.

use super::*;
use crate::memory::HUGE_PAGE;

fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.ram().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A table with its header checked.
fn table(memory: &Memory, at: u64, signature: &[u8; 4]) -> Vec<u8> {
    let len = word(&read(memory, at, 8), 4) as usize;
    let bytes = read(memory, at, len);
    assert!(at >= RSDP && at + len as u64 <= ACPI_END);
    assert_eq!(&bytes[..4], signature);
    assert_eq!(sum(&bytes), 0, "checksum");
    bytes
}

struct Tables {
    fadt: Vec<u8>,
    madt: Vec<u8>,
    dsdt: Vec<u8>,
}

fn tables(machine: Machine) -> Tables {
    let memory = Memory::new(HUGE_PAGE).unwrap();
    write(&memory, machine).unwrap();
    let rsdp = read(&memory, RSDP, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((rsdp[15], sum(&rsdp[..20]), sum(&rsdp)), (2, 0, 0));
    let xsdt = table(&memory, long(&rsdp, 24), b"XSDT");
    let entries: Vec<u64> = (36..xsdt.len()).step_by(8).map(|at| long(&xsdt, at)).collect();
    let fadt = table(&memory, entries[0], b"FACP");
    let madt = table(&memory, entries[1], b"APIC");
    let dsdt = table(&memory, long(&fadt, 140), b"DSDT");
    assert_eq!(entries.len(), 2);
    Tables { fadt, madt, dsdt }
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    haystack.windows(needle.len()).filter(|w| *w == needle).count()
}

#[test]
fn fadt_says_hardware_reduced_with_sleep_and_reset_registers() {
    let fadt = tables(Machine { cpus: 1, devices: 0 }).fadt;
    let flags = word(&fadt, 112);
    for bit in [4, 5, 10, 20] {
        assert_ne!(flags & 1 << bit, 0, "flag {bit}");
    }
    let address = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], long(&fadt, at + 4));
    assert_eq!(address(116), (1, 8, 1, RESET_PORT.into()));
    assert_eq!(fadt[128], RESET_VALUE);
    assert_eq!(address(244), (1, 8, 1, SLEEP_CONTROL_PORT.into()));
    assert_eq!(address(256), (1, 8, 1, SLEEP_STATUS_PORT.into()));
    // neither legacy devices nor a keyboard controller
    assert_eq!(fadt[109] & 3, 0);
}

#[test]
fn madt_has_every_vcpu_and_the_ioapic() {
    for cpus in [1, 2, CPUS_MAX] {
        let madt = tables(Machine { cpus, devices: 0 }).madt;
        assert_eq!(word(&madt, 36), LOCAL_APIC);
        let mut rest = &madt[44..];
        let (mut ids, mut ioapics) = (Vec::new(), 0);
        while let [kind, len, ..] = *rest {
            match kind {
                0 => {
                    assert_eq!((rest[2], word(rest, 4)), (rest[3], 1));
                    ids.push(u32::from(rest[3]));
                }
                1 => {
                    assert_eq!((word(rest, 4), word(rest, 8)), (IOAPIC, 0));
                    ioapics += 1;
                }
                kind => panic!("structure {kind}"),
            }
            rest = &rest[len.into()..];
        }
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert_eq!(ioapics, 1);
    }
}

#[test]
fn dsdt_has_every_device_at_its_place() {
    for devices in [0, 1, 7, DEVICES_MAX] {
        let dsdt = tables(Machine { cpus: 1, devices }).dsdt;
        assert_eq!(count(&dsdt, b"LNRO0005"), devices);
        for index in 0..devices as u32 {
            // Memory32Fixed, read-write, then an extended interrupt: consumer, edge, one number
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((MMIO_BASE as u32 + index * 0x1000).to_le_bytes());
            resources.extend(0x1000u32.to_le_bytes());
            resources.extend([0x89, 6, 0, 3, 1]);
            resources.extend((GSI_BASE + index).to_le_bytes());
            assert_eq!(count(&dsdt, &resources), 1, "device {index} of {devices}");
        }
        for name in [&b"_S5_"[..], b"COM1", b"ACPI0013", b"VM_Gen_Counter", b"_EVT"] {
            assert_eq!(count(&dsdt, name), if name == b"VM_Gen_Counter" { 2 } else { 1 });
        }
        // the device and the notification
        assert_eq!(count(&dsdt, b"PWRB"), 2);
    }
}

#[test]
fn too_much_is_refused() {
    let memory = Memory::new(HUGE_PAGE).unwrap();
    for machine in [
        Machine { cpus: 0, devices: 0 },
        Machine { cpus: CPUS_MAX + 1, devices: 0 },
        Machine { cpus: 1, devices: DEVICES_MAX + 1 },
    ] {
        assert!(write(&memory, machine).is_err(), "{machine:?}");
    }
    assert_eq!(read(&memory, RSDP, 8), [0; 8]);
}
