//! A driver for tests: sets up and works queues of a device on its transport, from the host's side of guest memory.

use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::Transport;
use super::{Device, F_VERSION_1};
use crate::event::Events;
use crate::gate::Gate;
use crate::memory::{HUGE_PAGE, Memory};

/// Queue `n` has its rings here, one page each.
pub const fn rings(n: u64) -> u64 {
    0x1_0000 + n * 0x4000
}
/// Memory for buffers.
pub const DATA: u64 = 0x10_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const STATUS_NEEDS_RESET: u32 = 64;

pub struct Bench {
    pub transport: Transport,
    pub memory: Memory,
    pub gate: Arc<Gate>,
    pub events: Arc<Events>,
    _vm: VmFd,
    avail: Vec<u16>,
    seen: Vec<u16>,
    next_desc: Vec<u16>,
}

pub fn memory() -> Memory {
    Memory::new(2 * HUGE_PAGE).unwrap()
}

impl Bench {
    pub fn new(device: Box<dyn Device>) -> Bench {
        Bench::with_memory(device, memory())
    }

    pub fn with_memory(device: Box<dyn Device>, memory: Memory) -> Bench {
        let vm = crate::vm::create_vm(&Kvm::new().unwrap()).unwrap();
        let gate = Arc::new(Gate::new().unwrap());
        let events = Arc::new(Events::new().unwrap());
        let queues = device.queue_sizes().len();
        let transport = Transport::new(device, 0, Some(&vm), false, memory.clone(), gate.clone(), &events).unwrap();
        let zeros = || vec![0; queues];
        Bench { transport, memory, gate, events, _vm: vm, avail: zeros(), seen: zeros(), next_desc: zeros() }
    }

    pub fn reg(&self, offset: u64) -> u32 {
        let mut b = [0; 4];
        self.transport.read(offset, &mut b);
        u32::from_le_bytes(b)
    }

    pub fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn status(&self) -> u32 {
        self.reg(0x70)
    }

    /// Acknowledges, negotiates `features` and VERSION_1, sets up `queues` queues, goes.
    pub fn start(&mut self, features: u64, queues: u64) {
        let features = features | F_VERSION_1;
        self.set(0x70, 1);
        self.set(0x70, 3);
        for word in 0..2 {
            self.set(0x24, word);
            self.set(0x20, (features >> (32 * word)) as u32);
        }
        self.set(0x70, 11);
        assert_eq!(self.status(), 11);
        for n in 0..queues {
            self.set(0x30, n as u32);
            let size = self.reg(0x34);
            self.set(0x38, size);
            for (i, offset) in [0x80u64, 0x90, 0xa0].into_iter().enumerate() {
                let at = rings(n) + 0x1000 * i as u64;
                self.set(offset, at as u32);
                self.set(offset + 4, (at >> 32) as u32);
            }
            self.set(0x44, 1);
            assert_eq!(self.reg(0x44), 1);
        }
        self.set(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    /// After a reset: as [`Bench::start`], with rings as empty as in the beginning.
    pub fn restart(&mut self, features: u64, queues: u64) {
        for n in 0..queues {
            self.write(rings(n), &[0; 0x3000]);
        }
        for of in [&mut self.avail, &mut self.seen, &mut self.next_desc] {
            of.fill(0);
        }
        self.start(features, queues);
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.ram().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.ram().read_slice(&mut b, GuestAddress(at)).unwrap();
        b
    }

    /// Writes one descriptor.
    pub fn desc(&self, queue: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = rings(queue) + 16 * u64::from(index);
        self.write(at, &addr.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// Makes a head available.
    pub fn offer(&mut self, queue: u64, head: u16) {
        let n = self.avail[queue as usize];
        let size = self.queue_size();
        self.write(rings(queue) + 0x1000 + 4 + 2 * u64::from(n % size), &head.to_le_bytes());
        self.avail[queue as usize] = n.wrapping_add(1);
        self.write(rings(queue) + 0x1000 + 2, &n.wrapping_add(1).to_le_bytes());
    }

    fn queue_size(&self) -> u16 {
        self.transport.device().queue_sizes().first().copied().unwrap()
    }

    /// Offers a chain of (address, length, flags without NEXT); returns its head.
    pub fn chain(&mut self, queue: u64, pieces: &[(u64, u32, u16)]) -> u16 {
        let size = self.queue_size();
        let head = self.next_desc[queue as usize];
        for (i, (addr, len, flags)) in pieces.iter().enumerate() {
            let index = (head + i as u16) % size;
            let last = i + 1 == pieces.len();
            self.desc(queue, index, *addr, *len, flags | if last { 0 } else { NEXT }, (index + 1) % size);
        }
        self.next_desc[queue as usize] = (head + pieces.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    /// What was used since the last call: head and length.
    pub fn used(&mut self, queue: u64) -> Vec<(u32, u32)> {
        let at = rings(queue) + 0x2000;
        let idx = u16::from_le_bytes(self.read(at + 2, 2).try_into().unwrap());
        let mut out = Vec::new();
        while self.seen[queue as usize] != idx {
            let slot = u64::from(self.seen[queue as usize] % self.queue_size());
            let e = self.read(at + 4 + 8 * slot, 8);
            out.push((u32::from_le_bytes(e[..4].try_into().unwrap()), u32::from_le_bytes(e[4..].try_into().unwrap())));
            self.seen[queue as usize] = self.seen[queue as usize].wrapping_add(1);
        }
        out
    }

    /// Serves events until something was used in `queue`.
    pub fn wait_used(&mut self, queue: u64) -> Vec<(u32, u32)> {
        self.transport.process();
        loop {
            let used = self.used(queue);
            if !used.is_empty() {
                return used;
            }
            assert_eq!(self.status() & STATUS_NEEDS_RESET, 0, "broken");
            for _ in self.events.io.wait(None).iter() {
                self.transport.event();
            }
        }
    }
}

/// A small generator with a seed, so that what fails can be run again.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
