//! From the first ring-3 instruction to the image's `async fn main`.
//!
//! `early_mark` on the command line makes ring 3 print one character before it does anything else: under any VMM the host can
//! take the time there.
//!
//! Owns the entry points the ELF notes and the shim name, and the order in which the parts of the run time come up:
//! boot information, console, heap, clock, random numbers, devices, executor.
//! Always true: whatever goes wrong on the way is said on the console and ends the VM with a status of its own.
use super::MainFuture;
use crate::{Env, boot, cmdline::Cmdline, console, exec, heap, identity, platform, time, virtio};
use alloc::string::String;
use core::arch::naked_asm;
use guest_abi::exit_status;

unsafe extern "Rust" {
    // Defined by entry! in the image.
    safe fn outrigger_main(env: Env) -> MainFuture;
}

/// First ring-3 instruction when our VMM starts the image. rdi = boot info.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn r3_start_direct() -> ! {
    naked_asm!("xor esi, esi", "jmp {start}", start = sym r3_start)
}

/// First ring-3 instruction after the shim. rdi = PVH start info.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn r3_start_pvh() -> ! {
    naked_asm!("mov esi, 1", "jmp {start}", start = sym r3_start)
}

#[unsafe(naked)]
unsafe extern "C" fn r3_start() -> ! {
    naked_asm!(
        "mov esp, {top}", // 16-byte aligned before the call, as the ABI wants
        "xor ebp, ebp",
        "cld",
        "call {main}",
        "ud2",
        top = const crate::ring0::STACK.end,
        main = sym rust_start,
    )
}

extern "C" fn rust_start(info: u64, pvh: u32) -> ! {
    // SAFETY: the first thing ring 3 does, once, with what the VMM or the shim passed in.
    let boot = match unsafe { boot::discover(info, pvh != 0) } {
        Ok(boot) => boot,
        Err(e) => {
            crate::println!("cannot start: {e}");
            platform::exit(exit_status::FAILED)
        }
    };
    platform::boot_mark(1);
    if boot.cmdline.split_ascii_whitespace().any(|word| word == "early_mark") {
        platform::print(b"^");
    }
    // SAFETY: once, before the first allocation; nothing else uses memory past the image.
    let free_pages = unsafe { heap::init(boot.memory_size) };
    boot::tell(free_pages);
    let cmdline = Cmdline::parse(&boot.cmdline);
    platform::configure(&cmdline);
    console::init(&cmdline);
    time::init();
    identity::init(cmdline.number("vm_id"));
    match start(&boot, cmdline) {
        Ok(()) => platform::exit(exit_status::OK),
        Err(e) => {
            crate::println!("failed: {e}");
            platform::exit(exit_status::FAILED)
        }
    }
}

fn start(boot: &boot::Boot, cmdline: Cmdline) -> Result<(), String> {
    log::debug!("{} MiB, {:?}, command line \"{}\"", boot.memory_size >> 20, boot.start, cmdline.text());
    exec::init(&cmdline);
    let found = virtio::probe(&cmdline).map_err(|e| alloc::format!("{e}"))?;
    let env = Env { cmdline, nets: found.nets, disks: found.disks, memory_size: boot.memory_size };
    exec::block_on(outrigger_main(env))
}
