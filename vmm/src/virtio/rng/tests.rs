use super::*;
use crate::virtio::testing::{Bench, DATA, Random, STATUS_NEEDS_RESET, WRITE};

fn rng() -> Bench {
    let mut bench = Bench::new(Box::new(Rng::new("rng0", &RngConfig::default()).unwrap()));
    bench.start(0, 1);
    bench
}

#[test]
fn every_byte_asked_for_is_random() {
    let mut b = rng();
    let head = b.chain(0, &[(DATA, 100, WRITE), (DATA + 0x1000, 4000, WRITE)]);
    assert_eq!(b.wait_used(0), [(u32::from(head), 4100)]);
    let (first, second) = (b.read(DATA, 101), b.read(DATA + 0x1000, 4001));
    assert!(first[90..100].iter().any(|x| *x != 0) && second[3990..4000].iter().any(|x| *x != 0));
    assert_eq!((first[100], second[4000]), (0, 0));
    // not the same twice
    b.chain(0, &[(DATA + 0x1000, 4000, WRITE)]);
    b.wait_used(0);
    assert_ne!(b.read(DATA + 0x1000, 4000), second[..4000]);
}

#[test]
fn a_request_is_bounded() {
    let mut b = rng();
    let head = b.chain(0, &[(DATA, 1 << 20, WRITE); 3]);
    assert_eq!(b.wait_used(0), [(u32::from(head), REQUEST_MAX as u32)]);
    assert!(b.read(DATA + REQUEST_MAX as u64, 64).iter().all(|x| *x == 0));
}

#[test]
fn one_call_serves_a_bounded_number_and_says_that_there_is_more() {
    let mut b = rng();
    for _ in 0..BUDGET + 1 {
        b.chain(0, &[(DATA, 8, WRITE)]);
    }
    assert_eq!(b.transport.process(), Progress::More);
    assert_eq!(b.used(0).len(), BUDGET);
    assert_eq!(b.transport.process(), Progress::Done);
    assert_eq!(b.used(0).len(), 1);
}

#[test]
fn limits_make_requests_wait_and_go_with_the_state() {
    use crate::limit::Rate;
    let limits = Limits { ops: None, bytes: Some(Rate { rate: 10_000, burst: Some(1000) }) };
    let mut b = Bench::new(Box::new(Rng::new("rng0", &RngConfig { limits }).unwrap()));
    b.start(0, 1);
    for _ in 0..3 {
        b.chain(0, &[(DATA, 1000, WRITE)]);
    }
    b.transport.process();
    let at_once = b.used(0).len();
    assert!(at_once < 3, "not all at once");
    // the rest comes by itself, in time
    let mut rest = 0;
    while at_once + rest < 3 {
        rest += b.wait_used(0).len();
    }
    b.chain(0, &[(DATA, 4000, WRITE)]);
    b.wait_used(0);
    b.transport.quiesce();
    let state = b.transport.save();
    let mut there = Bench::with_memory(Box::new(Rng::new("rng0", &RngConfig::default()).unwrap()), b.memory.clone());
    there.transport.restore(&state).unwrap();
    there.transport.quiesce();
    let crate::virtio::DeviceState::Rng(moved) = there.transport.save().device else { panic!() };
    assert_eq!(moved.limits, limits);
}

#[test]
fn nothing_is_written_where_the_driver_allows_none() {
    let mut b = rng();
    let head = b.chain(0, &[(DATA, 64, 0)]);
    assert_eq!(b.wait_used(0), [(u32::from(head), 0)]);
    assert_eq!(b.read(DATA, 64), [0; 64]);
}

#[test]
fn hostile_chains_never_bring_it_down() {
    let mut random = Random(0x5eed_0001);
    for _ in 0..100 {
        let mut b = rng();
        for _ in 0..random.next() % 8 {
            let pieces: Vec<(u64, u32, u16)> = (0..1 + random.next() % 4)
                .map(|_| {
                    let address = match random.next() % 4 {
                        0 => random.next(),
                        _ => DATA + random.next() % (4 << 20),
                    };
                    (address, random.next() as u32 >> (random.next() % 32), (random.next() & 7) as u16)
                })
                .collect();
            b.chain(0, &pieces);
        }
        while b.transport.process() == Progress::More {}
        // It either served all or asks for a reset, after which it serves again.
        if b.status() & STATUS_NEEDS_RESET != 0 {
            b.set(0x70, 0);
            assert_eq!(b.status(), 0);
        }
    }
}
