//! Who this VM is and what its CPU can do: from the boot-info page, or a stand-in under a foreign VMM.
use crate::boot;
use crate::local::local;
use core::arch::x86_64::__cpuid_count;
use core::cell::Cell;
use guest_abi::Identity;

/// Bits of [`cpu_features`]: leaf 1 ECX.
const RDRAND: u32 = 1 << 30;
/// Tries of RDRAND before it is given up.
const RDRAND_TRIES: u32 = 10;

local! {
    /// Where there is no boot-info page.
    static OWN: Cell<Option<Identity>> = Cell::new(None);
}

/// The identity as it is now: read afresh, since a port rewrites it.
pub fn identity() -> Identity {
    match boot::page() {
        // SAFETY: mapped for the life of the image; the VMM writes it only while the vCPU is stopped; any bit
        // pattern is an Identity.
        Some(page) => unsafe { (&raw const (*page).identity).read_volatile() },
        None => OWN.with(|o| o.get().unwrap_or_default()),
    }
}

/// Gives the VM an id where no VMM of ours does (`vm_id=` on the command line).
pub(crate) fn init(vm_id: Option<u64>) {
    if boot::page().is_none() {
        OWN.with(|o| o.set(Some(Identity { vm_id: vm_id.unwrap_or(0), ..Identity::default() })));
    }
}

/// Stores the ownership epoch, for the VMM to read on a port.
pub fn store_epoch(epoch: u64) {
    match boot::page() {
        // SAFETY: as above; an aligned 8-byte store.
        Some(page) => unsafe { (&raw mut (*page).identity.epoch).write_volatile(epoch) },
        None => OWN.with(|o| o.set(Some(Identity { epoch, ..o.get().unwrap_or_default() }))),
    }
}

/// CPU features the image may use: leaf 1 ECX, leaf 1 EDX, leaf 7.0 EBX, leaf 7.0 ECX.
pub fn cpu_features() -> [u32; 4] {
    match boot::page() {
        // SAFETY: as above.
        Some(page) => unsafe { (&raw const (*page).cpu_features).read_volatile() },
        None => {
            let one = __cpuid_count(1, 0);
            let seven = __cpuid_count(7, 0);
            [one.ecx, one.edx, seven.ebx, seven.ecx]
        }
    }
}

/// A hardware random number, if the CPU has one to give.
pub(crate) fn rdrand() -> Option<u64> {
    if cpu_features()[0] & RDRAND == 0 {
        return None;
    }
    (0..RDRAND_TRIES).find_map(|_| {
        let (value, ok): (u64, u8);
        // SAFETY: the CPU has the instruction; it touches only the two registers and flags.
        unsafe { core::arch::asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack)) };
        (ok != 0).then_some(value)
    })
}
