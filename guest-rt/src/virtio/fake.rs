//! The device's side of virtio-mmio, for tests: registers, and access to the rings by the addresses the driver gave.
use super::mmio::{MAGIC, Registers, Transport, register, status};
use super::queue::Segment;
use std::cell::RefCell;
use std::rc::Rc;

/// Most entries of a queue.
pub const QUEUE_MAX: u32 = 256;

#[derive(Default)]
pub struct FakeQueue {
    pub size: u16,
    ready: bool,
    addresses: [u64; 3],
    seen: u16,
    used: u16,
    pub doorbells: u32,
}

#[derive(Default)]
pub struct State {
    id: u32,
    features: u64,
    pub driver_features: u64,
    select: [u32; 3],
    pub status: u32,
    pub resets: u32,
    pub queues: [FakeQueue; 2],
    pub config: Vec<u8>,
}

/// A device; clones are the same.
#[derive(Clone, Default)]
pub struct FakeDevice(pub Rc<RefCell<State>>);

/// A chain the driver made available.
pub struct Chain {
    pub head: u16,
    pub segments: Vec<Segment>,
}

impl Chain {
    /// What the device may read, in one piece.
    pub fn read(&self) -> Vec<u8> {
        let readable = self.segments.iter().filter(|s| !s.device_writes);
        // SAFETY: the driver promises that the memory is valid until the chain is returned.
        readable
            .flat_map(|s| unsafe { std::slice::from_raw_parts(s.address as *const u8, s.length as usize) }.to_vec())
            .collect()
    }

    /// Bytes the device may write.
    pub fn room(&self) -> usize {
        self.segments.iter().filter(|s| s.device_writes).map(|s| s.length as usize).sum()
    }

    /// Writes from the start of what the device may write.
    pub fn write(&self, mut data: &[u8]) -> u32 {
        let all = data.len();
        for s in self.segments.iter().filter(|s| s.device_writes) {
            let n = data.len().min(s.length as usize);
            // SAFETY: as above; the driver does not touch it meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), s.address as *mut u8, n) };
            data = &data[n..];
        }
        assert!(data.is_empty(), "does not fit");
        all as u32
    }
}

impl FakeDevice {
    pub fn new(id: u32, features: u64, config: Vec<u8>) -> Self {
        let state = State { id, features: features | 1 << 32, config, ..State::default() };
        FakeDevice(Rc::new(RefCell::new(state)))
    }

    pub fn transport(&self) -> Transport {
        Transport::new(self.clone())
    }

    pub fn is_live(&self) -> bool {
        self.0.borrow().status & status::DRIVER_OK != 0
    }

    /// The next chain of a queue.
    pub fn take(&self, queue: usize) -> Option<Chain> {
        let mut state = self.0.borrow_mut();
        let q = &mut state.queues[queue];
        if !q.ready {
            return None;
        }
        let [table, available, _] = q.addresses;
        // SAFETY: addresses and sizes as the driver set the queue up; one thread.
        unsafe {
            if ((available + 2) as *const u16).read_volatile() == q.seen {
                return None;
            }
            let slot = u64::from(q.seen % q.size);
            let head = ((available + 4 + 2 * slot) as *const u16).read_volatile();
            q.seen = q.seen.wrapping_add(1);
            let descriptor = |table: u64, i: u16| {
                let at = table + 16 * u64::from(i);
                (
                    (at as *const u64).read_volatile(),
                    ((at + 8) as *const u32).read_volatile(),
                    ((at + 12) as *const [u16; 2]).read_volatile(),
                )
            };
            let (mut table, mut i) = (table, head);
            let mut segments = Vec::new();
            let (address, length, [flags, _]) = descriptor(table, i);
            if flags & 4 != 0 {
                assert!(length.is_multiple_of(16) && length / 16 <= u32::from(q.size));
                (table, i) = (address, 0);
            }
            loop {
                let (address, length, [flags, next]) = descriptor(table, i);
                segments.push(Segment { address, length, device_writes: flags & 2 != 0 });
                assert!(segments.len() <= usize::from(q.size), "no chain is longer than the queue");
                if flags & 1 == 0 {
                    break;
                }
                i = next;
            }
            let first_write = segments.iter().position(|s| s.device_writes).unwrap_or(segments.len());
            assert!(segments[first_write..].iter().all(|s| s.device_writes), "read before written");
            Some(Chain { head, segments })
        }
    }

    /// Returns a chain; any numbers, also such as no good device would write.
    pub fn give(&self, queue: usize, id: u32, written: u32) {
        self.give_hidden(queue, id, written);
        self.show(queue, 0);
    }

    /// Writes a used entry without the index.
    pub fn give_hidden(&self, queue: usize, id: u32, written: u32) {
        let mut state = self.0.borrow_mut();
        let q = &mut state.queues[queue];
        let at = q.addresses[2] + 4 + 8 * u64::from(q.used % q.size);
        // SAFETY: as in take.
        unsafe { (at as *mut [u32; 2]).write_volatile([id, written]) };
        q.used = q.used.wrapping_add(1);
    }

    /// Writes the used index, and `extra` on top.
    pub fn show(&self, queue: usize, extra: u16) {
        let state = self.0.borrow();
        let q = &state.queues[queue];
        // SAFETY: as in take.
        unsafe { ((q.addresses[2] + 2) as *mut u16).write_volatile(q.used.wrapping_add(extra)) };
    }

    /// Sets the used ring's flags.
    pub fn set_used_flags(&self, queue: usize, flags: u16) {
        // SAFETY: as in take.
        unsafe { (self.0.borrow().queues[queue].addresses[2] as *mut u16).write_volatile(flags) };
    }

    /// The available ring's flags.
    pub fn available_flags(&self, queue: usize) -> u16 {
        // SAFETY: as in take.
        unsafe { (self.0.borrow().queues[queue].addresses[1] as *const u16).read_volatile() }
    }
}

impl Registers for FakeDevice {
    fn read(&self, offset: u64) -> u32 {
        let s = self.0.borrow();
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => s.id,
            register::DEVICE_FEATURES => (s.features >> (32 * s.select[0])) as u32,
            register::QUEUE_NUM_MAX if s.select[2] < 2 => QUEUE_MAX,
            register::STATUS => s.status,
            o if o >= register::CONFIG => {
                let at = (o - register::CONFIG) as usize;
                u32::from_le_bytes(s.config[at..at + 4].try_into().unwrap())
            }
            _ => 0,
        }
    }

    fn read8(&self, offset: u64) -> u8 {
        self.0.borrow().config[(offset - register::CONFIG) as usize]
    }

    fn write(&self, offset: u64, value: u32) {
        let mut s = self.0.borrow_mut();
        let selected = s.select[2] as usize;
        let half = |old: &mut u64, high: bool| {
            *old =
                if high { *old & 0xffff_ffff | u64::from(value) << 32 } else { *old & !0xffff_ffff | u64::from(value) };
        };
        match offset {
            register::DEVICE_FEATURES_SEL => s.select[0] = value,
            register::DRIVER_FEATURES_SEL => s.select[1] = value,
            register::QUEUE_SEL => s.select[2] = value,
            register::DRIVER_FEATURES => {
                let high = s.select[1] == 1;
                half(&mut s.driver_features, high);
            }
            register::QUEUE_NUM => s.queues[selected].size = value as u16,
            register::QUEUE_READY => s.queues[selected].ready = value == 1,
            register::QUEUE_NOTIFY => s.queues[value as usize].doorbells += 1,
            register::STATUS => {
                if value == 0 {
                    s.resets += 1;
                    s.queues = Default::default();
                }
                s.status = value;
            }
            o if (register::QUEUE_DESC..register::QUEUE_DESC + 0x28).contains(&o) => {
                let which = ((o - register::QUEUE_DESC) / 0x10) as usize;
                half(&mut s.queues[selected].addresses[which], o % 8 == 4);
            }
            o => panic!("write to register {o:#x}"),
        }
    }
}
