//! Several vCPUs with KVM's interrupt controllers on /dev/kvm: a hand-made PVH image that starts a second processor and lives
//! on timer interrupts.

#![allow(clippy::unwrap_used)]

mod guest;

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state};
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::info::OwnerId;
use vmm::config::cli::ReceiveConfig;
use vmm::config::{BootMode, Config, MemorySize, OnReset, SerialOutput};
use vmm::stats::Stats;
use vmm::vcpu::End;
use vmm::vm::{Phase, Vm};

/// Counted by the second processor without end.
const SPINS: u64 = 0x9000;
/// 0xfd: the second processor jumps to the reset vector; any other but 0: it writes it to the keyboard controller's port.
const ORDER: u64 = 0x9008;
/// Times the first processor went on after a halt, and timer interrupts it took.
const WAKES: u64 = 0x30_4000;
const TICKS: u64 = 0x30_4008;
/// Times the image was started.
const STARTS: u64 = 0x30_4010;

// Protected mode without paging: builds a GDT and an IDT with the timer's vector, sends INIT and SIPI to APIC 1, whose
// first instruction is at 0x8000, and then halts between timer interrupts.
guest_code!(
    two_processors,
    "two_start",
    "two_end",
    "
    .code32
    mov esp, 0x300000
    call 2f
3:  .long 6f - 3b, 7f - 3b, 8f - 7f
2:  pop ebp
    mov dword ptr [0x301008], 0x0000ffff
    mov dword ptr [0x30100c], 0x00cf9b00
    mov dword ptr [0x301010], 0x0000ffff
    mov dword ptr [0x301014], 0x00cf9300
    mov word ptr [0x301020], 0x17
    mov dword ptr [0x301022], 0x301000
    lgdt [0x301020]
    mov eax, [ebp]
    add eax, ebp
    mov edx, eax
    and edx, 0xffff0000
    or edx, 0x8e00
    and eax, 0xffff
    or eax, 0x80000
    mov dword ptr [0x302200], eax        // vector 0x40
    mov dword ptr [0x302204], edx
    mov word ptr [0x303000], 0x7ff
    mov dword ptr [0x303002], 0x302000
    lidt [0x303000]
    inc dword ptr [0x304010]             // STARTS
    mov esi, [ebp + 4]
    add esi, ebp
    mov edi, 0x8000
    mov ecx, [ebp + 8]
    rep movsb
    mov dword ptr [0xfee000f0], 0x1ff    // the APIC is on
    mov dword ptr [0xfee00310], 0x01000000
    mov dword ptr [0xfee00300], 0x4500   // INIT to APIC 1
    mov dword ptr [0xfee00310], 0x01000000
    mov dword ptr [0xfee00300], 0x4608   // SIPI: 0x8000
    mov dword ptr [0xfee003e0], 0xb
    mov dword ptr [0xfee00320], 0x20040  // timer: periodic, vector 0x40
    mov dword ptr [0xfee00380], 2000000
4:  inc dword ptr [0x304000]             // WAKES
    sti
    hlt
    jmp 4b
6:  inc dword ptr [0x304008]             // TICKS
    mov dword ptr [0xfee000b0], 0
    add esp, 12                          // not iret: KVM cannot emulate it here, where it emulates all of ring 0
    jmp 4b
    .code16
7:  cli
    xor ax, ax
    mov ds, ax
9:  inc dword ptr [0x9000]               // SPINS
    mov al, byte ptr [0x9008]            // ORDER
    test al, al
    jz 9b
    cmp al, 0xfd
    je 5f
    out 0x64, al
    jmp 9b
5:  .byte 0xea, 0xf0, 0xff, 0x00, 0xf0   // jmp F000:FFF0, where a BIOS begins
8:  .code64
"
);

fn config(dir: &Path, cpus: u32) -> Config {
    let image = dir.join("image");
    std::fs::write(&image, guest::pvh_image(two_processors())).unwrap();
    let mut config = Config::for_image(image);
    config.memory = MemorySize::from_bytes(8 << 20);
    config.serial = SerialOutput::File(dir.join("console"));
    config.cpus = cpus;
    config.on_reset = OnReset::Exit;
    config
}

fn start(config: Config) -> (Vm, mpsc::Receiver<End>) {
    let vm = Vm::boot(config, OwnerId::random().unwrap(), Arc::new(Stats::default())).unwrap();
    let (tx, rx) = mpsc::channel();
    vm.start(move |end| tx.send(end.clone()).unwrap()).unwrap();
    (vm, rx)
}

fn count(vm: &Vm, at: u64) -> u32 {
    vm.memory().ram().read_obj(GuestAddress(at)).unwrap()
}

fn counts(vm: &Vm) -> [u32; 3] {
    [SPINS, WAKES, TICKS].map(|at| count(vm, at))
}

/// Waits until both processors have gone on.
fn both_go_on(vm: &Vm) {
    let before = counts(vm);
    let start = Instant::now();
    while counts(vm).iter().zip(before).any(|(now, before)| *now <= before) {
        assert!(start.elapsed() < Duration::from_secs(20), "{before:?} {:?} {:?}", counts(vm), vm.end());
        std::thread::yield_now();
    }
}

fn empty(vm: &Vm) -> Vm {
    let host = ReceiveConfig {
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
    Vm::receive(&vm.describe(), &host, OwnerId::random().unwrap(), Arc::new(Stats::default())).unwrap()
}

#[test]
fn a_second_processor_starts_and_both_pause_and_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, end) = start(config(dir.path(), 2));
    both_go_on(&vm);
    for _ in 0..30 {
        vm.pause().unwrap();
        assert_eq!(vm.phase(), Phase::Paused);
        assert!(vm.last_exit_ns() >= vm.last_entry_ns());
        let stopped = counts(&vm);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(counts(&vm), stopped);
        vm.resume().unwrap();
        both_go_on(&vm);
    }
    assert_eq!(vm.vcpu_threads().count(), 2);
    let stats = vm.stats().clone();
    assert!(stats.exits[0].interrupted.get() > 0 && stats.exits[1].interrupted.get() > 0);
    // pauses and resumptions from several sides at once end in one or the other, and nobody waits for ever
    std::thread::scope(|s| {
        for n in 0..4 {
            let vm = &vm;
            s.spawn(move || {
                for _ in 0..50 {
                    let _ = if n % 2 == 0 { vm.pause() } else { vm.resume() };
                }
            });
        }
    });
    vm.resume().unwrap();
    both_go_on(&vm);
    vm.stop();
    assert_eq!(end.recv().unwrap(), End::Stopped);
    assert_eq!(vm.phase(), Phase::Ended);
    assert!(vm.pause().is_err() && vm.resume().is_err());
}

#[test]
fn the_end_comes_from_any_processor_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, end) = start(config(dir.path(), 2));
    both_go_on(&vm);
    vm.memory().ram().write_obj(0xfeu8, GuestAddress(ORDER)).unwrap();
    assert_eq!(end.recv_timeout(Duration::from_secs(20)).unwrap(), End::Reset);
    assert_eq!((vm.phase(), vm.end()), (Phase::Ended, Some(End::Reset)));
    assert!(end.recv().is_err(), "the end is told once");
}

/// What must be the same after a state was set and read again; the rest runs on.
fn still(lapic: &kvm_lapic_state) -> Vec<i8> {
    const CURRENT_COUNT: usize = 0x390;
    let mut regs = lapic.regs.to_vec();
    regs[CURRENT_COUNT..CURRENT_COUNT + 4].fill(0);
    regs
}

#[test]
fn both_processors_go_on_in_another_vm() {
    let dir = tempfile::tempdir().unwrap();
    // the third one is never started
    let (vm, _end) = start(config(dir.path(), 3));
    both_go_on(&vm);
    vm.prepare_save().unwrap();
    vm.pause().unwrap();
    vm.quiesce().unwrap();
    let state = vm.save().unwrap();
    assert_eq!(state.vcpus.len(), 3);
    assert_eq!(state.vcpus[2].mp_state.mp_state, KVM_MP_STATE_UNINITIALIZED);
    assert!(state.vcpus[1].regs.rip < 0x100 && state.vcpus[1].sregs.cs.base == 0x8000);

    let there = empty(&vm);
    there.pause().unwrap();
    there.start(|_| {}).unwrap();
    assert_eq!(there.phase(), Phase::Paused);
    let mut memory = vec![0; vm.memory().size()];
    vm.memory().ram().read_slice(&mut memory, GuestAddress(0)).unwrap();
    there.memory().ram().write_slice(&memory, GuestAddress(0)).unwrap();
    there.load(&state).unwrap();

    let again = there.save().unwrap();
    for (a, b) in state.vcpus.iter().zip(&again.vcpus) {
        assert_eq!(a.regs, b.regs);
        assert_eq!(a.sregs, b.sregs);
        assert_eq!((&a.xsave, a.xcrs, a.debug, a.mp_state), (&b.xsave, b.xcrs, b.debug, b.mp_state));
        assert_eq!(a.events, b.events);
        assert_eq!(still(&a.lapic.unwrap()), still(&b.lapic.unwrap()));
        let changed: Vec<_> = a.msrs.iter().zip(&b.msrs).filter(|(a, b)| a != b).map(|(a, _)| a.0).collect();
        assert!(changed.iter().all(|m| *m == vmm::vcpu::state::MSR_TSC), "{changed:x?}");
    }
    let (a, b) = (state.clocks.as_ref().unwrap(), again.clocks.as_ref().unwrap());
    assert!(b.kvmclock_ns > a.kvmclock_ns && b.real_ns > a.real_ns);
    // kvmclock has gone on by the real time that has passed
    let apart = (b.kvmclock_ns - a.kvmclock_ns).abs_diff(b.real_ns - a.real_ns);
    assert!(apart < 50_000_000, "{apart} ns apart");

    let stopped = counts(&vm);
    assert_eq!(counts(&there), stopped);
    there.take_over(state.clock, None).unwrap();
    there.resume_devices();
    there.resume().unwrap();
    both_go_on(&there);
    assert_eq!(counts(&vm), stopped);
    // and what was left behind can go on too
    vm.resume_devices();
    vm.resume().unwrap();
    both_go_on(&vm);

    // a state does not fit a VM with fewer
    vm.pause().unwrap();
    let mut fewer = state.clone();
    fewer.vcpus.pop();
    assert!(vm.load(&fewer).unwrap_err().to_string().contains("2 vCPUs instead of 3"));
    fewer.irqchip = None;
    assert!(vm.load(&fewer).is_err());
}

#[test]
fn thirty_two_processors_pause_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, end) = start(config(dir.path(), 32));
    both_go_on(&vm);
    for _ in 0..5 {
        vm.pause().unwrap();
        let stopped = counts(&vm);
        assert_eq!(counts(&vm), stopped);
        vm.resume().unwrap();
        both_go_on(&vm);
    }
    vm.pause().unwrap();
    for (index, vcpu) in vm.vcpus().iter().enumerate() {
        let vcpu = vcpu.lock().unwrap();
        assert_eq!(vcpu.index(), index);
        let cpuid = vcpu.fd().get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        let leaf1 = cpuid.as_slice().iter().find(|e| e.function == 1).unwrap();
        assert_eq!(leaf1.ebx >> 16, (index as u32) << 8 | 32, "APIC id, and how many there are");
        assert_eq!(vcpu.fd().get_lapic().unwrap().regs[0x23] as usize, index);
    }
    vm.stop();
    assert_eq!(end.recv().unwrap(), End::Stopped);
}

#[test]
fn processors_begin_again_after_a_reset() {
    const TIMES: u32 = 40;
    let dir = tempfile::tempdir().unwrap();
    let (vm, end) = start(config(dir.path(), 3));
    both_go_on(&vm);
    for n in 1..=TIMES {
        vm.reset().unwrap();
        assert_eq!((vm.phase(), vm.stats().resets()), (Phase::Running, n.into()));
        both_go_on(&vm);
        assert_eq!(count(&vm, STARTS), 1, "memory is new");
    }
    // one that is paused stays so
    vm.pause().unwrap();
    vm.reset().unwrap();
    assert_eq!((vm.phase(), counts(&vm)), (Phase::Paused, [0; 3]));
    for index in [1, 2] {
        let state = vm.vcpus()[index].lock().unwrap().fd().get_mp_state().unwrap();
        assert_eq!(state.mp_state, KVM_MP_STATE_UNINITIALIZED);
    }
    vm.resume().unwrap();
    both_go_on(&vm);
    // pauses, resumptions and resets from several sides at once: nobody waits for ever
    std::thread::scope(|s| {
        for n in 0..6 {
            let vm = &vm;
            s.spawn(move || {
                for _ in 0..20 {
                    let _ = match n % 3 {
                        0 => vm.pause(),
                        1 => vm.resume(),
                        _ => vm.reset(),
                    };
                }
            });
        }
    });
    vm.resume().unwrap();
    both_go_on(&vm);
    vm.stop();
    assert_eq!(end.recv().unwrap(), End::Stopped);
    assert!(vm.reset().is_err());
}

#[test]
fn any_processor_may_ask_for_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 2);
    config.on_reset = OnReset::Auto;
    let (vm, _end) = start(config);
    assert_eq!(vm.config().on_reset, OnReset::Reboot, "what it comes to");
    for n in 1..=5 {
        both_go_on(&vm);
        let order = if n % 2 == 0 { 0xfeu8 } else { 0xfd };
        vm.memory().ram().write_obj(order, GuestAddress(ORDER)).unwrap();
        let start = Instant::now();
        while vm.stats().resets() < n {
            assert!(start.elapsed() < Duration::from_secs(20), "{n}: {:?}", vm.end());
            std::thread::yield_now();
        }
    }
    both_go_on(&vm);
}

#[test]
fn a_direct_start_has_one_vcpu() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 2);
    std::fs::write(&config.image, guest::image(two_processors())).unwrap();
    let boot = |config: Config| Vm::boot(config, OwnerId::random().unwrap(), Arc::new(Stats::default()));
    let Err(error) = boot(config.clone()) else { panic!("two vCPUs in a direct start") };
    assert!(error.to_string().starts_with("cpus: 2"), "{error}");
    config.boot = BootMode::Pvh;
    let Err(error) = boot(config.clone()) else { panic!("there is no PVH note") };
    assert!(error.to_string().contains("PVH"), "{error}");
    for cpus in [0, 33] {
        config.cpus = cpus;
        assert!(config.validate().unwrap_err().to_string().contains("cpus"));
    }
}
