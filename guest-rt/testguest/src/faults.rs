//! Every way to die: each must be reported and end the VM with its own status.
use alloc::{format, string::String, vec::Vec};
use core::arch::asm;
use core::hint::black_box;

/// Recursion without end.
#[inline(never)]
fn deep(n: u64) -> u64 {
    let frame = black_box([n; 64]);
    if n == u64::MAX {
        return 0;
    }
    deep(n + 1) + frame[(n % 64) as usize]
}

/// Dies in the named way.
pub fn cause(kind: &str) -> Result<(), String> {
    match kind {
        "panic" => panic!("asked to panic"),
        "bounds" => {
            let v: Vec<u32> = black_box(alloc::vec![1, 2, 3]);
            Err(format!("read {}", v[black_box(1 << 20)]))
        }
        "stack" => Err(format!("{}", deep(0))),
        "null" => {
            // SAFETY: none: the fault is the purpose.
            let value = unsafe { black_box(8 as *const u32).read_volatile() };
            Err(format!("read {value} from a null pointer"))
        }
        "ring0" => write_to(0x10_0000),
        "low" => write_to(0x8000),
        "text" => write_to(0x40_0000),
        "rodata" => write_to(0x60_0000),
        "heap-exec" => {
            let code = alloc::vec![0xc3u8; 16];
            // SAFETY: none: the fault is the purpose.
            unsafe { core::mem::transmute::<*const u8, extern "C" fn()>(code.as_ptr())() };
            Err("executed the heap".into())
        }
        "undefined" => {
            // SAFETY: none: the fault is the purpose.
            unsafe { asm!("ud2") };
            Err("executed ud2".into())
        }
        "privileged" => {
            // SAFETY: none: the fault is the purpose.
            unsafe { asm!("mov {}, cr3", out(reg) _) };
            Err("read CR3".into())
        }
        "divide" => {
            // SAFETY: none: the fault is the purpose.
            unsafe {
                asm!("xor edx, edx", "mov eax, 1", "xor ecx, ecx", "div ecx", out("eax") _, out("ecx") _, out("edx") _)
            };
            Err("divided by zero".into())
        }
        "oom" => {
            let mut all: Vec<Vec<u8>> = Vec::new();
            loop {
                all.push(black_box(alloc::vec![1; 1 << 20]));
            }
        }
        other => Err(format!("no test {other:?}")),
    }
}

fn write_to(address: u64) -> Result<(), String> {
    // SAFETY: none: the fault is the purpose.
    unsafe { (black_box(address) as *mut u32).write_volatile(1) };
    Err(format!("wrote to {address:#x}"))
}
