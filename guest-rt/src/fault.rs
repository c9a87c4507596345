//! Panics and ring-3 faults: say what happened, in a form a person can use, and end the VM. Never hangs.
//!
//! Owns the panic handler, the entry ring 0 resumes ring 3 at after an exception, and the backtrace.
//! The backtrace is found by looking through the stack for return addresses into .text that follow a call
//! instruction, since the images are built without frame pointers: it may hold stale entries, it misses none.
//! The last line is a command that turns the addresses into functions and lines of the source.
//! Survives: a fault or panic while reporting one (a short line, then the end), a broken stack pointer.
use crate::{console::LineBuffer, platform, ring0};
use core::arch::{asm, naked_asm};
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use guest_abi::exit_status;

/// Most return addresses printed.
const MAX_FRAMES: usize = 24;
/// Most of the stack looked through, in words.
const MAX_WORDS: u64 = 8192;

/// Reports under way: more than one is a fault while reporting a fault.
static DEPTH: AtomicU32 = AtomicU32::new(0);

/// General registers in the order `r3_fault_entry` pushes them, last first.
#[repr(C)]
struct Registers {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
}

/// Ring 0 resumes ring 3 here after an exception, on the fault stack, all general registers as they were.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn r3_fault_entry() -> ! {
    naked_asm!(
        "push rax", "push rbx", "push rcx", "push rdx", "push rsi", "push rdi", "push rbp",
        "push r8", "push r9", "push r10", "push r11", "push r12", "push r13", "push r14", "push r15",
        "mov rdi, rsp",
        "xor ebp, ebp",
        "cld",
        "and rsp, -16",
        "call {report}",
        "ud2",
        report = sym report_fault,
    )
}

extern "C" fn report_fault(r: &Registers) -> ! {
    let depth = DEPTH.fetch_add(1, Relaxed);
    let [vector, error, rip, rflags, rsp, cr2] = [0, 1, 2, 3, 4, 5].map(|i: usize| ring0::R0_FAULT[i].load(Relaxed));
    if depth > 1 {
        platform::exit(exit_status::FAULT);
    }
    let mut line = LineBuffer::new();
    let _ = writeln!(
        line,
        "FAULT {} (vector {vector}, error {error:#x}) at {rip:#x}, address {cr2:#x}{}",
        name(vector),
        if vector == 14 { hint(cr2) } else { "" }
    );
    if depth > 0 {
        drop(line);
        platform::exit(exit_status::FAULT);
    }
    let _ = writeln!(line, "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}", r.rax, r.rbx, r.rcx, r.rdx);
    let _ = writeln!(line, "  rsi {:016x} rdi {:016x} rbp {:016x} rsp {rsp:016x}", r.rsi, r.rdi, r.rbp);
    let _ = writeln!(line, "  r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}", r.r8, r.r9, r.r10, r.r11);
    let _ = writeln!(line, "  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}", r.r12, r.r13, r.r14, r.r15);
    let _ = writeln!(line, "  rflags {rflags:#x}");
    drop(line);
    backtrace(Some(rip), rsp);
    platform::exit(exit_status::FAULT)
}

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range",
        6 => "undefined instruction",
        7 => "no FPU",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack segment",
        13 => "general protection",
        14 => "page fault",
        16 => "x87",
        17 => "alignment",
        18 => "machine check",
        19 => "SIMD",
        _ => "exception",
    }
}

/// The page that is not mapped below the stack.
fn stack_guard() -> core::ops::Range<u64> {
    ring0::STACK.start - 0x1000..ring0::STACK.start
}

/// What a bad address most likely means.
fn hint(address: u64) -> &'static str {
    match address {
        0..0x1000 => " (null pointer)",
        a if stack_guard().contains(&a) => " (stack overflow)",
        _ => "",
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let depth = DEPTH.fetch_add(1, Relaxed);
    if depth > 1 {
        platform::exit(exit_status::PANIC);
    }
    let mut line = LineBuffer::new();
    let _ = writeln!(line, "PANIC {info}");
    drop(line);
    if depth == 0 {
        let rsp: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
        backtrace(None, rsp);
    }
    platform::exit(exit_status::PANIC)
}

/// Prints what looks like return addresses from `rsp` up.
fn backtrace(rip: Option<u64>, rsp: u64) {
    let mut frames = [0u64; MAX_FRAMES];
    let mut count = 0;
    if let Some(rip) = rip {
        frames[0] = rip;
        count = 1;
    }
    let stack = ring0::STACK;
    // After an overflow RSP is just below the stack.
    let rsp = if stack_guard().contains(&rsp) { stack.start } else { rsp };
    if rsp.is_multiple_of(8) && stack.contains(&rsp) {
        let end = stack.end.min(rsp.saturating_add(8 * MAX_WORDS));
        for at in (rsp..end).step_by(8) {
            // SAFETY: inside the mapped stack, aligned.
            let word = unsafe { (at as *const u64).read_volatile() };
            if count < MAX_FRAMES && follows_call(word) {
                frames[count] = word;
                count += 1;
            }
        }
    }
    let mut line = LineBuffer::new();
    let _ = writeln!(line, "backtrace, innermost first (from a scan of the stack: some entries may be stale):");
    for frame in &frames[..count] {
        let _ = writeln!(line, "  {frame:#x}");
    }
    let _ = write!(line, "for names and lines: addr2line -Cfipe IMAGE");
    for (i, frame) in frames[..count].iter().enumerate() {
        // A return address may already belong to the next function or line.
        let _ = write!(line, " {:#x}", if i == 0 && rip.is_some() { *frame } else { frame - 1 });
    }
    let _ = writeln!(line);
}

/// Whether an address in .text follows a call instruction.
fn follows_call(address: u64) -> bool {
    unsafe extern "C" {
        static __text_start: u8;
        static __text_end: u8;
    }
    let (start, end) = (&raw const __text_start as u64, &raw const __text_end as u64);
    if address < start + 8 || address >= end {
        return false;
    }
    // SAFETY: within .text, which ring 3 may read.
    let before = |n: u64| unsafe { ((address - n) as *const u8).read_volatile() };
    // call rel32; call r/m64 (ff /2) of 2, 3, 4, 6 and 7 bytes
    let indirect = |n: u64| before(n) == 0xff && before(n - 1) & 0x38 == 0x10;
    before(5) == 0xe8 || [2, 3, 4, 6, 7].into_iter().any(indirect)
}

// Referenced by landing pads of the precompiled core and alloc, which were built to unwind; never run.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    platform::exit(exit_status::PANIC)
}
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
