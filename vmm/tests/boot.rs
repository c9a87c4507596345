//! Boots images on /dev/kvm.

#![allow(clippy::unwrap_used)]

mod guest;

use std::path::Path;
use std::sync::{Arc, mpsc};

use vmm::boot::info::OwnerId;
use vmm::config::{Config, MemorySize, SerialOutput};
use vmm::stats::Stats;
use vmm::vcpu::End;
use vmm::vm::{Phase, Vm};

guest_code!(
    hello,
    "hello_start",
    "hello_end",
    "
    mov r15, [rdi + 24]              // platform_base
    mov dword ptr [r15 + 0x14], 1    // BOOT_MARK
    lea rax, [rip + 2f]
    mov rcx, 5 << 48
    or rax, rcx
    mov [r15 + 8], rax               // CONSOLE
    mov ebx, 3
4:  mov eax, 1000000
    mov [r15], rax                   // PARK for 1 ms
    dec ebx
    jnz 4b
    mov eax, [rdi + 12]              // cmdline_len
    lea rcx, [rdi + 160]
    shl rax, 48
    or rax, rcx
    mov [r15 + 8], rax               // CONSOLE: the command line
    mov dword ptr [r15 + 0x10], 42   // EXIT
3:  jmp 3b
2:  .ascii \"hello\"
"
);

guest_code!(
    spin_and_park,
    "spin_start",
    "spin_end",
    "
    mov r15, [rdi + 24]
    mov dword ptr [r15 + 0x14], 2
    mov rbx, 0x300000
2:  inc qword ptr [rbx]
    test dword ptr [rbx], 0xfffff
    jnz 2b
    mov rax, -1
    cmp dword ptr [rbx + 8], 0
    je 2b
    mov [r15], rax                   // PARK for ever
    jmp 2b
"
);

guest_code!(
    triple_fault,
    "fault_start",
    "fault_end",
    "
    ud2
"
);

fn config(dir: &Path, code: &[u8]) -> Config {
    let image = dir.join("image");
    std::fs::write(&image, guest::image(code)).unwrap();
    let mut config = Config::for_image(image);
    config.memory = MemorySize::from_bytes(8 << 20);
    config.serial = SerialOutput::File(dir.join("console"));
    config
}

fn start(config: Config) -> (Vm, mpsc::Receiver<End>) {
    let vm = Vm::boot(config, OwnerId::random().unwrap(), Arc::new(Stats::default())).unwrap();
    let (tx, rx) = mpsc::channel();
    vm.start(move |end| tx.send(end.clone()).unwrap()).unwrap();
    (vm, rx)
}

#[test]
fn direct_start_prints_parks_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), hello());
    config.cmdline = " world".into();
    let (vm, end) = start(config);
    assert_eq!(end.recv().unwrap(), End::Exit(42));
    assert_eq!(vm.phase(), Phase::Ended);
    assert_eq!(std::fs::read_to_string(dir.path().join("console")).unwrap(), "hello world");
    assert_eq!(vm.stats().vcpu.parks.get(), 3);
    assert!(vm.stats().boot.marks[0].load(std::sync::atomic::Ordering::Relaxed) > 0);
    assert!(vm.resume().is_err());
}

#[test]
fn a_fault_ends_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (_vm, end) = start(config(dir.path(), triple_fault()));
    assert_eq!(end.recv().unwrap(), End::TripleFault);
}

#[test]
fn pause_and_resume_spinning_and_parked() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, end) = start(config(dir.path(), spin_and_park()));
    use vm_memory::{Bytes, GuestAddress};
    let count = || vm.memory().ram().read_obj::<u64>(GuestAddress(0x30_0000)).unwrap();
    for _ in 0..50 {
        vm.pause().unwrap();
        assert_eq!(vm.phase(), Phase::Paused);
        let n = count();
        std::thread::yield_now();
        assert_eq!(count(), n);
        vm.resume().unwrap();
        while count() == n {
            std::thread::yield_now();
        }
    }
    // from now on the guest parks for ever after each round
    vm.memory().ram().write_obj(1u32, GuestAddress(0x30_0008)).unwrap();
    while vm.stats().vcpu.slept.get() == 0 {
        std::thread::yield_now();
    }
    for _ in 0..50 {
        let slept = vm.stats().vcpu.slept.get();
        vm.pause().unwrap();
        vm.resume().unwrap();
        while vm.stats().vcpu.slept.get() == slept {
            std::thread::yield_now();
        }
    }
    vm.stop();
    assert_eq!(end.recv().unwrap(), End::Stopped);
}

/// Counts in memory, and where the boot-info page says which generation its clock is.
const COUNT: u64 = 0x30_0000;

fn count(vm: &Vm) -> u64 {
    use vm_memory::{Bytes, GuestAddress};
    vm.memory().ram().read_obj(GuestAddress(COUNT)).unwrap()
}

#[test]
fn a_saved_vm_goes_on_in_another() {
    use vm_memory::{Bytes, GuestAddress};
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), spin_and_park());
    config.vm_id = 77;
    let (vm, _end) = start(config);
    while count(&vm) == 0 {
        std::thread::yield_now();
    }
    assert!(vm.save().is_err(), "a running VM cannot be saved");
    vm.prepare_save().unwrap();
    vm.memory().start_dirty_log(vm.fd()).unwrap();
    let before = count(&vm);
    while count(&vm) == before {
        std::thread::yield_now();
    }
    // the page of the counter is dirty, and clean once cleared with the vCPU stopped
    vm.pause().unwrap();
    let dirty = vm.memory().guest_dirty(vm.fd()).unwrap();
    let bit = |bitmap: &[u64], at: u64| bitmap[(at >> 18) as usize] >> (at >> 12 & 63) & 1;
    assert_eq!(bit(&dirty, COUNT), 1);
    assert_eq!(bit(&dirty, 0x60_0000), 0);
    vm.memory().clear_guest_dirty(vm.fd(), &dirty).unwrap();
    assert!(vm.memory().guest_dirty(vm.fd()).unwrap().iter().all(|w| *w == 0));
    assert!(vm.memory().clear_guest_dirty(vm.fd(), &dirty[1..]).is_err());
    vm.memory().ram().write_obj(0u8, GuestAddress(0x60_0000)).unwrap();
    let own = vm.memory().take_own_dirty();
    assert_eq!(bit(&own, 0x60_0000), 1);
    assert_eq!(bit(&vm.memory().take_own_dirty(), 0x60_0000), 0);
    vm.resume().unwrap();
    let before = count(&vm);
    while count(&vm) == before {
        std::thread::yield_now();
    }
    vm.pause().unwrap();
    assert_eq!(bit(&vm.memory().guest_dirty(vm.fd()).unwrap(), COUNT), 1);
    vm.memory().stop_dirty_log(vm.fd()).unwrap();

    vm.quiesce().unwrap();
    let state = vm.save().unwrap();
    let description = vm.describe();
    let host = vmm::config::cli::ReceiveConfig {
        listen: "127.0.0.1:1".parse().unwrap(),
        nets: Vec::new(),
        disks: Vec::new(),
        arbiter: None,
        tls: vmm::config::TlsConfig::Off,
        serial: SerialOutput::None,
        memory_max: None,
        vsock: None,
        image: None,
        initrd: None,
    };
    let owner = OwnerId::random().unwrap();
    let there = Vm::receive(&description, &host, owner, Arc::new(Stats::default())).unwrap();
    there.pause().unwrap();
    there.start(|_| {}).unwrap();
    let mut memory = vec![0; vm.memory().size()];
    vm.memory().ram().read_slice(&mut memory, GuestAddress(0)).unwrap();
    there.memory().ram().write_slice(&memory, GuestAddress(0)).unwrap();
    there.load(&state).unwrap();
    assert_eq!(count(&there), count(&vm));
    there.take_over(state.clock, Some(5)).unwrap();
    there.resume_devices();
    there.resume().unwrap();
    let stopped_at = count(&vm);
    while count(&there) < stopped_at + 1_000_000 {
        std::thread::yield_now();
    }
    assert_eq!(count(&vm), stopped_at);
    let identity = there.info().unwrap().identity(there.memory()).unwrap();
    assert_eq!((identity.vm_id, identity.epoch, identity.owner), (77, 5, owner.0));
    there.pause().unwrap();
    let clock = there.info().unwrap().clock(there.memory(), there.vcpu().fd()).unwrap();
    let saved = state.clock.unwrap();
    assert_eq!(clock.generation, saved.generation + 1);
    assert!(clock.mono_ns > saved.mono_ns && clock.real_ns > saved.real_ns);
    // and the one left behind can still go on
    vm.resume_devices();
    vm.resume().unwrap();
    while count(&vm) == stopped_at {
        std::thread::yield_now();
    }
}
