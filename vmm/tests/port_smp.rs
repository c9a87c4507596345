//! Ports of a guest with two vCPUs that need each other, between real `vmm` processes that share one processor: the least
//! favourable place for threads that must run by turns.
#![allow(clippy::unwrap_used)]

mod guest;
mod port_support;

use port_support::{Lab, Vmm, eventually};

// Protected mode without paging: starts APIC 1 at 0x8000. The two take turns: the first makes an even count odd and the second
// an odd one even, and each spins until it is its turn. The first says a dot on the console every 32 turns.
guest_code!(
    by_turns,
    "turns_start",
    "turns_end",
    "
    .code32
    mov esp, 0x300000
    call 2f
3:  .long 7f - 3b, 8f - 7f
2:  pop ebp
    mov esi, [ebp]
    add esi, ebp
    mov edi, 0x8000
    mov ecx, [ebp + 4]
    rep movsb
    mov dword ptr [0xfee000f0], 0x1ff    // the APIC is on
    mov dword ptr [0xfee00310], 0x01000000
    mov dword ptr [0xfee00300], 0x4500   // INIT to APIC 1
    mov dword ptr [0xfee00310], 0x01000000
    mov dword ptr [0xfee00300], 0x4608   // SIPI: 0x8000
4:  mov eax, dword ptr [0x9000]
    test al, 1
    jnz 4b
    test al, 31
    jnz 5f
    mov edx, 0x3f8
    mov al, 0x2e
    out dx, al
5:  inc dword ptr [0x9000]
    jmp 4b
    .code16
7:  cli
    xor ax, ax
    mov ds, ax
9:  mov al, byte ptr [0x9000]
    test al, 1
    jz 9b
    inc dword ptr [0x9000]
    jmp 9b
8:  .code64
"
);

/// Gives all threads of the process, and those they start, one processor.
fn pin(vmm: &Vmm) {
    for task in std::fs::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap() {
        let thread = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: all-zero is a valid set; the call reads it.
        let rc = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(0, &mut set);
            libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set)
        };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Waits until both vCPUs have had their turns.
fn goes_on(vmm: &Vmm) {
    let said = || std::fs::metadata(&vmm.console).map_or(0, |m| m.len());
    let before = said();
    eventually("both vCPUs have had their turns", || (said() > before + 2).then_some(()));
}

/// Without the sandbox: where root may not set limits (in some containers) only that lets threads have real-time priority, in
/// which this once stood still for ever.
#[test]
fn vcpus_that_wait_for_each_other_on_one_processor() {
    let lab = Lab::new(0);
    let image = lab.dir.path().join("image");
    std::fs::write(&image, guest::pvh_image(by_turns())).unwrap();
    let mut here =
        lab.spawn("boot", &["--image", image.to_str().unwrap(), "--memory", "8M", "--cpus", "2", "--no-sandbox"]);
    pin(&here);
    goes_on(&here);
    for port in 4000..4006 {
        let there = lab.spawn(
            &format!("receive{port}"),
            &["--receive", &format!("127.0.0.1:{port}"), "--no-sandbox", "--poison-skipped"],
        );
        pin(&there);
        let status = here.wait_port(here.port_to(port));
        assert_eq!(status["state"], "completed", "{status}");
        assert!(here.wait().success());
        goes_on(&there);
        here = there;
    }
}
