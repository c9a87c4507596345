//! A device behind its registers and queues, driven by a hostile driver.
//!
//! An input is a program: each byte that is read says what the driver, or the world outside, does next. Asserted besides what
//! every target is: a device has looked at everything after a bounded number of turns; whatever the driver did, the state can
//! be saved, and a new device takes it over.

pub mod balloon;
pub mod blk;
pub mod net;
pub mod rng;
pub mod state;
pub mod vsock;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm::event::Events;
use vmm::gate::Gate;
use vmm::memory::{HUGE_PAGE, Memory};
use vmm::metrics::Exposition;
use vmm::virtio::mmio::{Transport, TransportState};
use vmm::virtio::{Device, F_VERSION_1, Progress};

use crate::input::Input;
use crate::mutate::Random;

/// Things done in one input at most.
const STEPS_MAX: usize = 256;
/// Turns until a device must have looked at everything.
const TURNS_MAX: usize = 20_000;
/// Rings of queue `n`, one page each.
const fn rings(n: usize) -> u64 {
    0x1_0000 + n as u64 * 0x4000
}
/// Headers and small things.
const DATA: u64 = 0x10_0000;
/// Buffers.
const BUFFERS: u64 = 0x14_0000;
const MEMORY: usize = 2 * HUGE_PAGE;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

thread_local! {
    static SERVED: Cell<u64> = const { Cell::new(0) };
}

/// How many requests the devices of this thread's inputs have served: whether inputs reach them at all.
pub fn served() -> u64 {
    SERVED.get()
}

/// What is particular about a device.
pub trait Subject {
    /// Makes it anew, as the process does.
    fn make(&mut self) -> Box<dyn Device>;
    /// A header of a request, more or less right.
    fn header(&mut self, input: &mut Input<'_>) -> Vec<u8>;
    /// Something happens outside: a frame comes, a program connects, the operator orders something.
    fn outside(&mut self, input: &mut Input<'_>, device: &mut dyn Device) {
        let _ = (input, device);
    }
}

/// Programs to begin with. Any bytes are one; these are long enough to lead somewhere.
fn programs() -> Vec<Vec<u8>> {
    let program = |n: usize| {
        let mut random = Random::new(n as u64);
        (0..64 * (n + 1)).map(|_| (random.number() >> 24) as u8).collect()
    };
    (0..12).map(program).collect()
}

/// The machine around a device.
struct Machine {
    transport: Transport,
    memory: Memory,
    events: Arc<Events>,
    sizes: Vec<u16>,
    avail: Vec<u16>,
    next: Vec<u16>,
}

fn assemble(device: Box<dyn Device>, memory: &Memory) -> (Transport, Arc<Events>) {
    let (Ok(gate), Ok(events)) = (Gate::new(), Events::new()) else { panic!("no descriptors") };
    let events = Arc::new(events);
    match Transport::new(device, 0, None, false, memory.clone(), Arc::new(gate), &events) {
        Ok(transport) => (transport, events),
        Err(e) => panic!("{e}"),
    }
}

impl Machine {
    fn new(device: Box<dyn Device>) -> Machine {
        let Ok(memory) = Memory::new(MEMORY) else { panic!("no memory") };
        let sizes = device.queue_sizes().to_vec();
        let (transport, events) = assemble(device, &memory);
        let zeros = vec![0; sizes.len()];
        Machine { transport, memory, events, sizes, avail: zeros.clone(), next: zeros }
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn reg(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // What lies outside is not written.
        let _ = self.memory.ram().write_slice(bytes, GuestAddress(at));
    }

    /// Sets the device up as a driver does that takes the offered features in `wanted`.
    fn start(&mut self, wanted: u64) {
        self.set(0x70, 0);
        self.avail.fill(0);
        self.next.fill(0);
        let mut offered = 0;
        for word in [1, 0] {
            self.set(0x14, word);
            offered = offered << 32 | u64::from(self.reg(0x10));
        }
        let features = offered & wanted | F_VERSION_1;
        self.set(0x70, 3);
        for word in 0..2 {
            self.set(0x24, word);
            self.set(0x20, (features >> (32 * word)) as u32);
        }
        self.set(0x70, 11);
        for n in 0..self.sizes.len() {
            self.write(rings(n), &[0; 0x3000]);
            self.set(0x30, n as u32);
            self.set(0x38, u32::from(self.sizes[n]));
            for (i, offset) in [0x80, 0x90, 0xa0].into_iter().enumerate() {
                self.set(offset, (rings(n) + 0x1000 * i as u64) as u32);
                self.set(offset + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    fn descriptor(&self, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let bytes = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.write(at, &bytes);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let (n, size) = (self.avail[queue], self.sizes[queue]);
        self.write(rings(queue) + 0x1004 + 2 * u64::from(n % size), &head.to_le_bytes());
        self.avail[queue] = n.wrapping_add(1);
        self.write(rings(queue) + 0x1002, &n.wrapping_add(1).to_le_bytes());
    }

    /// Offers a chain as it should be, or in an indirect table.
    fn chain(&mut self, queue: usize, pieces: &[(u64, u32, u16)], indirect: bool) {
        let (head, size) = (self.next[queue], self.sizes[queue]);
        let count = pieces.len() as u16;
        let table = BUFFERS - 0x4000 + u64::from(head % 16) * 0x400;
        for (i, (addr, len, flags)) in (0..).zip(pieces) {
            let more = if i + 1 == count { 0 } else { NEXT };
            match indirect {
                true => self.descriptor(table + 16 * u64::from(i), (*addr, *len, flags | more, i + 1)),
                false => {
                    let at = (head + i) % size;
                    self.descriptor(rings(queue) + 16 * u64::from(at), (*addr, *len, flags | more, (at + 1) % size));
                }
            }
        }
        if indirect {
            let at = rings(queue) + 16 * u64::from(head);
            self.descriptor(at, (table, 16 * u32::from(count), INDIRECT, 0));
        }
        self.next[queue] = (head + if indirect { 1 } else { count }) % size;
        self.offer(queue, head);
    }

    fn used(&self) -> u64 {
        let index = |n| self.memory.ram().read_obj::<u16>(GuestAddress(rings(n) + 0x2002)).unwrap_or(0);
        (0..self.sizes.len()).map(index).map(u64::from).sum()
    }

    fn process(&mut self) {
        let before = self.used();
        for _ in 0..TURNS_MAX {
            if self.transport.process() == Progress::Done {
                SERVED.set(SERVED.get() + self.used().saturating_sub(before).min(16));
                return;
            }
        }
        panic!("the device never comes to an end");
    }

    /// What is ready outside reaches the device.
    fn events(&mut self) {
        for _ in 0..4 {
            let ready = self.events.io.wait(Some(Duration::ZERO));
            if ready.is_empty() {
                return;
            }
            for _ in ready.iter() {
                self.transport.event();
            }
            self.process();
        }
    }

    /// Saves the device and puts a new one in its place.
    fn replace(self, subject: &mut dyn Subject) -> Machine {
        let Machine { mut transport, memory, events, sizes, avail, next } = self;
        transport.quiesce();
        let state = transport.save();
        drop((transport, events));
        let bytes = postcard::to_allocvec(&state).unwrap_or_else(|e| panic!("state cannot be encoded: {e}"));
        let read: TransportState = postcard::from_bytes(&bytes).unwrap_or_else(|e| panic!("state cannot be read: {e}"));
        assert_eq!(read, state);
        let (mut transport, events) = assemble(subject.make(), &memory);
        if let Err(e) = transport.restore(&read) {
            panic!("what a driver did cannot be restored: {e}");
        }
        transport.resume();
        Machine { transport, memory, events, sizes, avail, next }
    }

    fn address(&self, input: &mut Input<'_>) -> u64 {
        match input.below(8) {
            0 => input.value(),
            1 => (MEMORY as u64).wrapping_sub(u64::from(input.u8())),
            2 => rings(input.below(self.sizes.len())) + u64::from(input.u16()),
            3 => DATA + u64::from(input.u16()),
            _ => BUFFERS + u64::from(input.u16()) * 0x20,
        }
    }

    fn length(input: &mut Input<'_>) -> u32 {
        match input.below(8) {
            0 => input.value() as u32,
            1 => 0,
            2 => u32::from(input.u8()),
            3 => u32::from(input.u16()),
            n => 512 << (n - 4),
        }
    }

    fn step(mut self, input: &mut Input<'_>, subject: &mut dyn Subject) -> Machine {
        match input.below(20) {
            // A register, any width.
            0 => {
                let offset = input.value() % 0x1000;
                let n = input.below(9);
                let mut bytes = input.bytes(n).to_vec();
                self.transport.read(offset, &mut bytes);
                self.transport.write(offset, &bytes);
            }
            // A register there is.
            1 => {
                let offset = input.one_of(&[
                    0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
                ]);
                let value = input.value() as u32;
                self.set(offset, value);
            }
            2 => {
                for offset in (0..0x110).step_by(4) {
                    self.reg(offset);
                }
                let mut config = [0; 64];
                self.transport.read(0x100 + u64::from(input.u8()), &mut config);
            }
            3 => {
                let value = input.value();
                self.transport.write(0x100 + u64::from(input.u8()), &value.to_le_bytes()[..1 << input.below(4)]);
            }
            4 => self.start(if input.below(2) == 0 { u64::MAX } else { input.u64() }),
            // A descriptor, a head, an index: anything.
            5 => {
                let queue = input.below(self.sizes.len());
                let at = rings(queue) + 16 * u64::from(input.u16() % self.sizes[queue]);
                let what = (self.address(input), Self::length(input), input.u16(), input.u16());
                self.descriptor(at, what);
            }
            6 => {
                let (queue, head) = (input.below(self.sizes.len()), input.u16());
                self.offer(queue, head);
            }
            7 => {
                let queue = input.below(self.sizes.len());
                self.avail[queue] = self.avail[queue].wrapping_add(input.value() as u16);
                self.write(rings(queue) + 0x1002, &self.avail[queue].to_le_bytes());
            }
            8 => {
                let at = self.address(input);
                let n = usize::from(input.u8());
                self.write(at, input.bytes(n));
            }
            9 => self = self.replace(subject),
            10 | 11 => {
                subject.outside(input, self.transport.device_mut());
                self.events();
            }
            12 => {
                let mut out = Exposition::default();
                self.transport.metrics(&mut out);
            }
            13 => {
                self.transport.stop_input();
                self.transport.quiesce();
                self.transport.resume();
            }
            // A request: header, data, status, most of it right.
            n => {
                let queue = input.below(self.sizes.len());
                let how = input.u8();
                let header = subject.header(input);
                let at = DATA + u64::from(input.u8()) * 0x80;
                self.write(at, &header);
                let mut pieces = Vec::new();
                if how & 3 != 3 {
                    pieces.push((at, header.len() as u32, 0));
                }
                for _ in 0..input.below(5) {
                    let flags = if how & 4 == 0 { WRITE } else { 0 };
                    pieces.push((self.address(input), Self::length(input), flags));
                }
                if how & 8 != 0 || pieces.is_empty() {
                    pieces.push((DATA + 0xff00, 1, WRITE));
                }
                if how & 0xf0 == 0 {
                    // One is the wrong way round.
                    let at = usize::from(how) % pieces.len();
                    pieces[at].2 ^= WRITE;
                }
                self.chain(queue, &pieces, how & 0x30 == 0x30);
                if n > 15 {
                    self.process();
                    self.events();
                }
            }
        }
        self
    }
}

/// Runs an input as a program against `subject`.
fn drive(input: &[u8], subject: &mut dyn Subject) {
    let mut input = Input::new(input);
    let mut machine = Machine::new(subject.make());
    let first = input.u8();
    if !first.is_multiple_of(8) {
        machine.start(if first.is_multiple_of(2) { u64::MAX } else { u64::from(first) << 24 | u64::from(first) });
    }
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        machine = machine.step(&mut input, subject);
    }
    machine.process();
    machine.events();
    machine.replace(subject);
}
