//! Entropy source, balloon and vsock, driven by a guest on /dev/kvm: a few instructions that do the stores of a driver from a
//! table, ring, and park until something was used.

#![allow(clippy::unwrap_used)]

mod guest;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, mpsc};

use vm_memory::{Bytes, GuestAddress};
use vmm::boot::info::OwnerId;
use vmm::config::{BalloonConfig, Config, MemorySize, RngConfig, SerialOutput, VsockConfig};
use vmm::stats::Stats;
use vmm::vcpu::End;
use vmm::virtio::mmio::MMIO_BASE;
use vmm::vm::Vm;

// A table of (address, value) follows the code; address 0 ends it. Then the guest parks until the word at WATCHED is not zero.
guest_code!(
    stores,
    "stores_start",
    "stores_end",
    "
    mov r15, [rdi + 24]
    lea rsi, [rip + 9f]
2:  mov rax, [rsi]
    test rax, rax
    jz 3f
    mov ecx, [rsi + 8]
    mov dword ptr [rax], ecx
    add rsi, 16
    jmp 2b
3:  mov ebx, 0x500000
4:  cmp dword ptr [rbx], 0
    jne 5f
    mov rax, -1
    mov [r15], rax
    mov rax, [rbx + 8]
    cmp word ptr [rax + 2], 0
    je 4b
5:  mov dword ptr [r15 + 0x10], 42
6:  jmp 6b
9:
"
);

/// Here the guest finds the address of the used ring it waits for (at + 8), or is told to end at once.
const WATCHED: u64 = 0x50_0000;
const RINGS: u64 = 0x60_0000;
const DATA: u64 = 0x70_0000;
const WRITE: u32 = 2;

const fn rings(queue: u64) -> u64 {
    RINGS + queue * 0x3000
}

/// The stores of a driver, in order.
#[derive(Default)]
struct Driver(Vec<(u64, u32)>);

impl Driver {
    fn put(&mut self, address: u64, value: u32) {
        self.0.push((address, value));
    }

    fn reg(&mut self, offset: u64, value: u32) {
        self.put(MMIO_BASE + offset, value);
    }

    fn bytes(&mut self, address: u64, bytes: &[u8]) {
        for (i, word) in bytes.as_chunks::<4>().0.iter().enumerate() {
            self.put(address + 4 * i as u64, u32::from_le_bytes(*word));
        }
    }

    /// Negotiates, sets up `queues` queues of 8 entries, goes.
    fn start(&mut self, features: u32, queues: u64) {
        for status in [1, 3] {
            self.reg(0x70, status);
        }
        for (word, value) in [(0, features), (1, 1)] {
            self.reg(0x24, word);
            self.reg(0x20, value);
        }
        self.reg(0x70, 11);
        for queue in 0..queues {
            self.reg(0x30, queue as u32);
            self.reg(0x38, 8);
            for (i, offset) in [0x80, 0x90, 0xa0].into_iter().enumerate() {
                self.reg(offset, (rings(queue) + 0x1000 * i as u64) as u32);
                self.reg(offset + 4, 0);
            }
            self.reg(0x44, 1);
        }
        self.reg(0x70, 15);
    }

    /// Offers one buffer, the first of its queue, and rings.
    fn offer(&mut self, queue: u64, address: u64, len: u32, flags: u32) {
        let (desc, avail) = (rings(queue), rings(queue) + 0x1000);
        self.put(desc, address as u32);
        self.put(desc + 8, len);
        self.put(desc + 12, flags);
        self.put(avail, 1 << 16);
        self.reg(0x50, queue as u32);
    }

    /// The used ring the guest waits for before it ends.
    fn wait_for(&mut self, queue: u64) {
        self.put(WATCHED + 8, (rings(queue) + 0x2000) as u32);
    }

    fn code(&self) -> Vec<u8> {
        let mut code = stores().to_vec();
        for (address, value) in self.0.iter().chain([&(0, 0)]) {
            code.extend(address.to_le_bytes());
            code.extend(u64::from(*value).to_le_bytes());
        }
        code
    }
}

fn config(dir: &Path, driver: &Driver) -> Config {
    let image = dir.join("image");
    std::fs::write(&image, guest::image(&driver.code())).unwrap();
    let mut config = Config::for_image(image);
    config.memory = MemorySize::from_bytes(8 << 20);
    config.serial = SerialOutput::None;
    config
}

fn run(mut config: Config) -> (Vm, mpsc::Receiver<End>) {
    config.validate().unwrap();
    let vm = Vm::boot(config, OwnerId::random().unwrap(), Arc::new(Stats::default())).unwrap();
    let (tx, rx) = mpsc::channel();
    vm.start(move |end| tx.send(end.clone()).unwrap()).unwrap();
    (vm, rx)
}

fn read(vm: &Vm, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    vm.memory().ram().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_guest_gets_random_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = Driver::default();
    driver.wait_for(0);
    driver.start(0, 1);
    driver.offer(0, DATA, 4096, WRITE);
    let mut config = config(dir.path(), &driver);
    config.rng = Some(RngConfig::default());
    let (vm, end) = run(config);
    assert_eq!(end.recv().unwrap(), End::Exit(42));
    let bytes = read(&vm, DATA, 4097);
    // All 256 values: chance of a miss below one in ten thousand for each.
    let kinds = bytes[..4096].iter().collect::<std::collections::HashSet<_>>().len();
    assert!(kinds > 200 && bytes[4096] == 0, "{kinds}");
}

#[test]
fn what_a_guest_reports_is_the_hosts_and_the_target_changes_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = Driver::default();
    driver.wait_for(4);
    driver.put(DATA, 0x5555_5555);
    driver.put(DATA + 4096, 0x6666_6666);
    // VIRTIO_BALLOON_F_STATS_VQ, _REPORTING
    driver.start(1 << 1 | 1 << 5, 5);
    driver.offer(4, DATA, 4096, WRITE);
    let mut config = config(dir.path(), &driver);
    config.balloon = Some(BalloonConfig { target: MemorySize::from_bytes(1 << 20), ..Default::default() });
    let (vm, end) = run(config);
    assert_eq!(end.recv().unwrap(), End::Exit(42));
    assert_eq!((read(&vm, DATA, 4), read(&vm, DATA + 4096, 4)), (vec![0; 4], vec![0x66; 4]));
    let info = vm.devices().balloon_info().unwrap();
    assert_eq!((info.target, info.reported), (1 << 20, 4096));
    vm.devices().set_balloon(2 << 20).unwrap();
    let mut target = [0; 4];
    vm.devices().mmio_read(MMIO_BASE + 0x100, &mut target, vm.stats());
    assert_eq!(u32::from_le_bytes(target), 512);
    let e = vm.devices().set_balloon(8 << 20).unwrap_err().to_string();
    assert!(e.contains("target"), "{e}");
}

#[test]
fn a_guest_connects_to_a_program_of_the_host_and_sends() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("v_1234")).unwrap();
    let packet = |op: u16, len: u32| {
        let mut header = Vec::new();
        header.extend(3u64.to_le_bytes());
        header.extend(2u64.to_le_bytes());
        for word in [9, 1234, len, u32::from(op) << 16 | 1, 0, 65_536, 0] {
            header.extend(u32::to_le_bytes(word));
        }
        header
    };
    let mut driver = Driver::default();
    driver.wait_for(0);
    driver.bytes(DATA, &packet(1, 0));
    driver.start(0, 3);
    driver.offer(1, DATA, 44, 0);
    driver.offer(0, DATA + 0x1000, 4096, WRITE);
    let mut config = config(dir.path(), &driver);
    config.vsock = Some(VsockConfig { cid: 3, path: dir.path().join("v") });
    let (vm, end) = run(config);
    let (mut host, _) = listener.accept().unwrap();
    assert_eq!(end.recv().unwrap(), End::Exit(42));
    // VIRTIO_VSOCK_OP_RESPONSE, from 2:1234 to 3:9
    let answer = read(&vm, DATA + 0x1000, 44);
    assert_eq!(answer[..8], 2u64.to_le_bytes());
    assert_eq!((&answer[16..20], &answer[20..24]), (&1234u32.to_le_bytes()[..], &9u32.to_le_bytes()[..]));
    assert_eq!(answer[28..32], [1, 0, 2, 0]);
    // the VM's end is the stream's
    drop(vm);
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    assert!(host.write_all(&[0]).is_err());
    assert!(UnixStream::connect(dir.path().join("v")).is_err());
}
