//! The ACPI tables (ACPI 6.5, chapter 5): RSDP, XSDT, FADT, MADT and a DSDT with the devices.
//!
//! Always true: a table lies at the address that points to it, within [`RSDP`] … [`ACPI_END`]; nothing is written if they do not
//! all fit.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt,
    Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Return,
    Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use super::{Event, RESET_VALUE, SLEEP_TYPE_OFF};
use crate::error::{Error, Result};
use crate::layout::{
    ACPI_END, CPUS_MAX, DEVICES_MAX, EVENT_GSI, EVENT_PORT, GENERATION_ID, GSI_BASE, IOAPIC, LOCAL_APIC, MMIO_BASE,
    MMIO_SIZE, RESET_PORT, RSDP, SERIAL_GSI, SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::memory::Memory;

const OEM: [u8; 6] = *b"OUTRIG";
const OEM_TABLE: [u8; 8] = *b"OUTRIGGR";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this.
const ALIGN: u64 = 64;
const HEADER: u32 = 36;
const DSDT_REVISION: u8 = 2;
/// Boot architecture flags of the FADT: there is no VGA, no MSI for devices, no PCIe ASPM, no CMOS clock; and, by their
/// absence, no legacy devices and no keyboard controller, so that a guest does not wait for them.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
/// Notifications: the state of a button, or of the generation id, has changed.
const NOTIFY: u8 = 0x80;

/// What the tables describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// vCPUs; their APIC ids are 0 and up.
    pub cpus: u32,
    /// virtio devices.
    pub devices: usize,
}

/// Writes all tables; the root pointer is at [`RSDP`].
pub fn write(memory: &Memory, machine: Machine) -> Result<()> {
    if machine.cpus == 0 || machine.cpus > CPUS_MAX || machine.devices > DEVICES_MAX {
        return Err(Error::Memory(format!(
            "ACPI tables for {machine:?}: at most {CPUS_MAX} vCPUs, {DEVICES_MAX} devices"
        )));
    }
    let mut tables = Vec::new();
    let mut next = RSDP + ALIGN;
    let mut place = |bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(ALIGN);
        tables.push((at, bytes));
        at
    };
    let dsdt = place(dsdt(machine.devices));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(machine.cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    if next > ACPI_END {
        return Err(Error::Memory(format!("ACPI tables end at {next:#x}, beyond {ACPI_END:#x}")));
    }
    tables.push((RSDP, bytes(&Rsdp::new(OEM, xsdt))));
    for (at, bytes) in tables {
        memory.ram().write_slice(&bytes, GuestAddress(at)).map_err(|e| Error::Memory(e.to_string()))?;
    }
    Ok(())
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // These two: there are no such buttons in fixed hardware, the DSDT has what there is.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    bytes(&fadt.finalize())
}

fn madt(cpus: u32) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    bytes(&madt)
}

fn dsdt(devices: usize) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut body = Vec::new();
    body.extend(bytes(&Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF, &ZERO]))));
    let (serial, power, generation, events) = (serial(), power_button(), generation_id(), events());
    let virtio: Vec<_> = (0..devices).map(virtio).collect();
    let mut children: Vec<&dyn Aml> = vec![&serial, &power, &generation, &events];
    children.extend(virtio.iter().map(|v| v as &dyn Aml));
    body.extend(bytes(&Scope::new("_SB_".into(), children)));
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// Bytes of AML that were made where their parts were at hand.
struct Ready(Vec<u8>);

impl Aml for Ready {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Ready {
    Ready(bytes(&Device::new(name.into(), children)))
}

/// All interrupts here are edges.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn virtio(index: usize) -> Ready {
    // `write` has bounded the index: this is below the platform page.
    let base = (MMIO_BASE + index as u64 * MMIO_SIZE) as u32;
    let memory = Memory32Fixed::new(true, base, MMIO_SIZE as u32);
    let irq = interrupt(GSI_BASE + index as u32);
    device(
        &format!("V{index:03}"),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u32)),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &irq])),
        ],
    )
}

fn serial() -> Ready {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let irq = interrupt(SERIAL_GSI);
    device(
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &irq])),
        ],
    )
}

fn power_button() -> Ready {
    device("PWRB", vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)])
}

fn generation_id() -> Ready {
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    device(
        "VGEN",
        vec![
            // The first is what Linux knows, the second what the specification asks for.
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Method::new("ADDR".into(), 0, false, vec![&Return::new(&Package::new(vec![&low, &high]))]),
        ],
    )
}

/// The Generic Event Device (ACPI 6.5, 5.6.9): reads what has happened and notifies whom it concerns.
fn events() -> Ready {
    let irq = interrupt(EVENT_GSI);
    let field = Field::new(
        "EREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESEL", 32)],
    );
    let on = |event: Event, whom: &str| {
        let (local, bit) = (Local(0), event as u32);
        let bit = And::new(&ZERO, &local, &bit);
        Ready(bytes(&If::new(&bit, vec![&Notify::new(&Path::new(whom), &NOTIFY)])))
    };
    let (power, generation) = (on(Event::PowerButton, "\\_SB_.PWRB"), on(Event::Generation, "\\_SB_.VGEN"));
    let (local, register) = (Local(0), Path::new("ESEL"));
    let read = Store::new(&local, &register);
    device(
        "GED_",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq])),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &EVENT_PORT, &4u8),
            &field,
            &Method::new("_EVT".into(), 1, true, vec![&read, &power, &generation]),
        ],
    )
}

#[cfg(test)]
mod tests;
