//! The machine below: our VMM's platform device, or what a PC has instead.
//!
//! Owns parking, the raw console, the end of the VM. With the platform device each is one store. Without it
//! (QEMU's microvm and other VMMs): a 16550 UART at port 0x3f8; HLT in ring 0 with the LAPIC's one-shot timer,
//! never longer than [`MAX_HALT_NS`], so that no device interrupt is needed; the end is QEMU's `isa-debug-exit`
//! if the command line names its port (`debug_exit=0xf4`; QEMU ends with status `2 × ours + 1`), else a reset by the
//! keyboard controller or a triple fault (QEMU with `-no-reboot` ends with status 0, whatever ours was).
use crate::cmdline::Cmdline;
use crate::ring0::gate;
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};
use guest_abi::platform as reg;

/// Longest halt under a foreign VMM: devices are polled at least this often.
pub const MAX_HALT_NS: u64 = 1_000_000;
/// Shortest halt: below it the two switches of ring cost more.
const MIN_HALT_NS: u64 = 2_000;
const UART: u16 = 0x3f8;
/// Polls of the UART's line status before a byte is sent anyway.
const UART_PATIENCE: u32 = 100_000;

/// Base of the platform device; 0 where there is none.
static BASE: AtomicU64 = AtomicU64::new(0);
/// Port of QEMU's isa-debug-exit; 0 where there is none.
static DEBUG_EXIT: AtomicU16 = AtomicU16::new(0);

pub(crate) fn use_device(base: u64) {
    BASE.store(base, Relaxed);
    if base == 0 {
        use_legacy();
    }
}

pub(crate) fn use_legacy() {
    // 8n1, no interrupts, FIFO on. The speed means nothing to a VMM.
    outb(UART + 1, 0);
    outb(UART + 3, 3);
    outb(UART + 2, 1);
}

pub(crate) fn configure(cmdline: &Cmdline) {
    if let Some(port) = cmdline.number("debug_exit").and_then(|p| u16::try_from(p).ok()) {
        DEBUG_EXIT.store(port, Relaxed);
    }
}

/// Whether a park makes the VMM look at all queues, so that no doorbell is needed before it.
pub(crate) fn park_looks_at_queues() -> bool {
    BASE.load(Relaxed) != 0
}

fn register<T>(base: u64, offset: u64) -> *mut T {
    (base + offset) as *mut T
}

/// Waits until a device has something, or about `ns` nanoseconds (`u64::MAX`: no limit). May return early.
pub(crate) fn park(ns: u64) {
    match BASE.load(Relaxed) {
        0 => {
            let ticks = ns.clamp(MIN_HALT_NS, MAX_HALT_NS);
            // SAFETY: halts in ring 0 and comes back; changes no memory of ours.
            unsafe { call_gate(ticks as u32, gate::HALT) };
        }
        // SAFETY: the platform device's register; a store parks the vCPU.
        base => unsafe { register::<u64>(base, reg::PARK).write_volatile(ns) },
    }
}

/// Tells the VMM how far the image is: 2 = serving.
pub fn boot_mark(mark: u32) {
    let base = BASE.load(Relaxed);
    if base != 0 {
        // SAFETY: the platform device's register.
        unsafe { register::<u32>(base, reg::BOOT_MARK).write_volatile(mark) }
    }
}

/// Prints bytes on the console: one exit under our VMM.
pub(crate) fn print(bytes: &[u8]) {
    let base = BASE.load(Relaxed);
    if base == 0 {
        for &b in bytes {
            if b == b'\n' {
                uart_put(b'\r');
            }
            uart_put(b);
        }
        return;
    }
    for chunk in bytes.chunks(usize::from(u16::MAX)) {
        let value = (chunk.len() as u64) << 48 | chunk.as_ptr() as u64;
        // SAFETY: an empty asm block that may read memory: what the VMM reads has been written before.
        unsafe { asm!("", options(nostack, preserves_flags)) };
        // SAFETY: the platform device's register; memory is mapped one to one.
        unsafe { register::<u64>(base, reg::CONSOLE).write_volatile(value) }
    }
}

fn uart_put(byte: u8) {
    let mut patience = UART_PATIENCE;
    while inb(UART + 5) & 0x20 == 0 && patience > 0 {
        patience -= 1;
    }
    outb(UART, byte);
}

/// Ends the VM with a status (see [`guest_abi::exit_status`]).
pub fn exit(status: u32) -> ! {
    let base = BASE.load(Relaxed);
    if base != 0 {
        // SAFETY: the platform device's register; the VM stops.
        unsafe { register::<u32>(base, reg::EXIT).write_volatile(status) }
    }
    let port = DEBUG_EXIT.load(Relaxed);
    if port != 0 {
        // SAFETY: the port the command line names for this purpose.
        unsafe { asm!("out dx, eax", in("dx") port, in("eax") status, options(nomem, nostack, preserves_flags)) };
    }
    // A PC without that is reset: by the keyboard controller if there is one, else by a triple fault.
    outb(0x64, 0xfe);
    loop {
        // SAFETY: resets the machine.
        unsafe { call_gate(0, gate::RESET) };
    }
}

/// Starts the LAPIC timer, without interrupt.
pub(crate) fn lapic_start(ticks: u32) {
    // SAFETY: touches nothing but the LAPIC.
    unsafe { call_gate(ticks, gate::LAPIC_START) };
}

/// The LAPIC timer's current count.
pub(crate) fn lapic_count() -> u32 {
    // SAFETY: touches nothing but the LAPIC.
    unsafe { call_gate(0, gate::LAPIC_COUNT) }
}

pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: the TSS opens ports to 0x3ff where there is no platform device; those used here are of PC devices that
    // touch no memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

pub(crate) fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for outb.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The gate into ring 0: an undefined instruction that the shim knows by its address.
#[unsafe(naked)]
unsafe extern "C" fn call_gate(_argument: u32, _operation: u32) -> u32 {
    naked_asm!("mov eax, esi", ".globl r3_gate_insn", "r3_gate_insn: ud2", "ret")
}
