use super::*;
use crate::config::DiskConfig;
use crate::virtio::DeviceState;
use crate::virtio::blk::Blk;
use crate::virtio::queue::QueueState;
use crate::virtio::testing::{Bench, DATA, Random, WRITE, rings};

fn bench() -> (Bench, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 16).unwrap();
    let config = DiskConfig { id: "d".into(), path: file.path().into(), ..Default::default() };
    (Bench::new(Box::new(Blk::open(&config).unwrap())), file)
}

#[test]
fn identifies_itself() {
    let (b, _file) = bench();
    assert_eq!((b.reg(0), b.reg(4), b.reg(8)), (0x7472_6976, 2, 2));
    assert_eq!(b.reg(0xb0), u32::MAX);
    let mut byte = [0xff];
    b.transport.read(0, &mut byte);
    assert_eq!(byte, [0]);
    b.transport.read(0xfff, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn features_not_offered_are_refused() {
    for features in [0u64, F_VERSION_1 | 1 << 40, F_VERSION_1 | 1 << 24] {
        let (mut b, _file) = bench();
        b.set(0x70, 3);
        b.set(0x24, 0);
        b.set(0x20, features as u32);
        b.set(0x24, 1);
        b.set(0x20, (features >> 32) as u32);
        b.set(0x70, 11);
        assert_eq!(b.status(), 3, "{features:#x}");
        b.set(0x70, 15);
        assert_ne!(b.status() & 64, 0);
        assert!(!b.transport.is_active());
    }
}

#[test]
fn queues_outside_memory_do_not_become_ready() {
    let (mut b, _file) = bench();
    b.start(0, 1);
    b.set(0x70, 0);
    b.set(0x70, 3);
    b.set(0x24, 1);
    b.set(0x20, 1);
    b.set(0x70, 11);
    let end = b.memory.size() as u32;
    for (desc, avail, used) in
        [(end, 0x1000, 0x2000), (0x1000, end - 2, 0x2000), (0x1000, 0x2000, end - 4), (0xffff_fff0, 0x1000, 0x2000)]
    {
        b.set(0x38, 128);
        b.set(0x80, desc);
        b.set(0x90, avail);
        b.set(0xa0, used);
        b.set(0x44, 1);
        assert_eq!(b.reg(0x44), 0, "{desc:#x} {avail:#x} {used:#x}");
    }
    b.set(0x30, 7);
    assert_eq!((b.reg(0x34), b.reg(0x44)), (0, 0));
    b.set(0x44, 1);
}

#[test]
fn a_broken_queue_needs_a_reset_and_gets_over_it() {
    let (mut b, _file) = bench();
    b.start(0, 1);
    b.offer(0, 999);
    b.gate.pass();
    b.transport.process();
    assert_ne!(b.status() & 64, 0);
    assert_eq!(b.reg(0x60), 2);
    assert!(b.gate.is_open());
    b.set(0x70, 0);
    b.write(rings(0) + 0x1002, &0u16.to_le_bytes());
    b.start(0, 1);
    assert!(b.transport.is_active());
}

#[test]
fn random_accesses_never_panic() {
    let mut random = Random(99);
    for _ in 0..50 {
        let (mut b, _file) = bench();
        for _ in 0..400 {
            let offset = match random.next() % 4 {
                0 => random.next() % 0x1000,
                _ => random.next() % 0x40 * 4,
            };
            let len = [1, 2, 4, 8][(random.next() % 4) as usize];
            let value = random.next() >> (random.next() % 64);
            if random.next().is_multiple_of(3) {
                b.transport.read(offset, &mut [0; 8][..len]);
            } else {
                b.transport.write(offset, &value.to_le_bytes()[..len]);
            }
        }
    }
}

#[test]
fn a_state_of_something_else_is_refused() {
    let (mut b, _file) = bench();
    b.start(0, 1);
    b.transport.quiesce();
    let good = b.transport.save();
    for bad in [
        TransportState { kind: 1, ..good.clone() },
        TransportState { queues: Vec::new(), ..good.clone() },
        TransportState { driver_features: u64::MAX, ..good.clone() },
        TransportState { queues: vec![QueueState { used_ring: u64::MAX - 7, ..good.queues[0] }], ..good.clone() },
        TransportState {
            device: DeviceState::Blk(crate::virtio::blk::BlkState { capacity: 1 << 40, limiter: Default::default() }),
            ..good.clone()
        },
    ] {
        assert!(b.transport.restore(&bad).is_err(), "{bad:?}");
        assert_eq!(b.status(), 0);
    }
    b.transport.restore(&good).unwrap();
    assert_eq!(b.transport.save(), good);
}

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

/// A read of the first sector.
fn ask(b: &mut Bench) {
    b.write(HEADER, &[0; 16]);
    b.write(STATUS, &[0xee]);
    b.chain(0, &[(HEADER, 16, 0), (BUFFER, 512, WRITE), (STATUS, 1, WRITE)]);
}

fn flags(b: &Bench) -> u8 {
    b.read(rings(0) + 0x2000, 1)[0]
}

#[test]
fn a_polled_driver_is_served_without_ringing() {
    let (mut b, _file) = bench();
    b.start(0, 1);
    assert!(!b.transport.poll());
    for _ in 0..3 {
        ask(&mut b);
        assert!(b.transport.poll());
        while b.used(0).is_empty() {
            b.transport.poll();
        }
        assert_eq!((b.read(STATUS, 1)[0], flags(&b)), (0, 1));
    }
    // It has not rung; whoever ends the polling finds what it did.
    ask(&mut b);
    while b.transport.end_poll() == Progress::More {}
    assert_eq!(flags(&b), 0);
    assert_eq!(b.wait_used(0).len(), 1);
    assert_eq!(b.transport.end_poll(), Progress::Done);
}

#[test]
fn a_quiesced_device_is_not_polled_and_its_driver_rings() {
    let (mut b, _file) = bench();
    b.start(0, 1);
    ask(&mut b);
    assert!(b.transport.poll());
    assert_eq!(flags(&b), 1);
    b.transport.quiesce();
    assert_eq!((flags(&b), b.used(0).len()), (0, 1));
    ask(&mut b);
    assert!(!b.transport.poll());
    b.transport.resume();
    assert_eq!(b.wait_used(0).len(), 1);
}
