use std::os::fd::AsRawFd;

use super::*;
use crate::config::MemorySize;
use crate::port::transfer::Pending;
use crate::virtio::testing::{Bench, DATA, Random, STATUS_NEEDS_RESET, WRITE};

const REPORTS: u64 = 3;
const STANDARD_REPORTS: u64 = 4;

fn config() -> BalloonConfig {
    BalloonConfig { target: MemorySize::from_bytes(1 << 20), ..Default::default() }
}

fn balloon(features: u64) -> Bench {
    let mut bench = Bench::new(Box::new(Balloon::new("balloon0", &config()).unwrap()));
    bench.start(features, 5);
    bench
}

fn info(b: &mut Bench) -> BalloonInfo {
    b.transport.device_mut().as_balloon().unwrap().info()
}

/// Offers the numbers of pages to the inflate or deflate queue.
fn pages_to(b: &mut Bench, queue: u64, pfns: &[u32]) -> u16 {
    let bytes: Vec<u8> = pfns.iter().flat_map(|p| p.to_le_bytes()).collect();
    b.write(DATA, &bytes);
    b.chain(queue, &[(DATA, bytes.len() as u32, 0)])
}

#[test]
fn pages_in_the_balloon_are_the_hosts_until_they_are_written() {
    let mut b = balloon(0);
    let free = 0x20_0000u64;
    b.write(free, &[7; 8192 * 2]);
    let pfn = (free / 4096) as u32;
    // out of order and twice: still three pages in two pieces
    let head = pages_to(&mut b, 0, &[pfn + 1, pfn, pfn + 3, pfn]);
    assert_eq!(b.wait_used(0), [(u32::from(head), 0)]);
    assert_eq!([0, 1, 2, 3].map(|n| b.read(free + 4096 * n, 1)[0]), [0, 0, 7, 0]);
    assert_eq!(info(&mut b).inflated, 3 * 4096);
    let head = pages_to(&mut b, 1, &[pfn]);
    assert_eq!(b.wait_used(1), [(u32::from(head), 0)]);
    b.write(free, &[9; 4096]);
    assert_eq!(b.read(free, 1), [9]);
}

#[test]
fn the_target_is_in_the_configuration_and_its_change_is_told() {
    let mut b = balloon(0);
    assert_eq!((b.reg(0x100), b.reg(0x104)), (256, 0));
    let generation = b.reg(0xfc);
    b.set(0x64, u32::MAX);
    b.transport.device_mut().as_balloon().unwrap().set_target(2 << 20);
    b.transport.process();
    assert_eq!(b.reg(0x60) & 2, 2);
    assert_ne!(b.reg(0xfc), generation);
    assert_eq!(b.reg(0x100), 512);
    // the driver says how far it is; what it may not write it cannot
    b.set(0x104, 300);
    b.set(0x100, 1);
    b.set(0x108, 1);
    assert_eq!((b.reg(0x100), b.reg(0x104), b.reg(0x108)), (512, 300, 0));
    assert_eq!(info(&mut b).actual, 300 * 4096);
}

#[test]
fn reported_pages_are_given_back_whatever_number_the_queue_has() {
    for (features, queue) in [
        (feature::STATS_VQ | feature::REPORTING, REPORTS),
        (feature::STATS_VQ | feature::REPORTING, STANDARD_REPORTS),
        (feature::REPORTING, 2),
        (feature::REPORTING, STANDARD_REPORTS),
    ] {
        let mut b = balloon(features);
        b.write(DATA, &[7; 4 * 4096]);
        b.memory.take_own_dirty();
        let head = b.chain(queue, &[(DATA, 4096, WRITE), (DATA + 8192, 4096, WRITE), (DATA + 12_288, 100, WRITE)]);
        assert_eq!(b.wait_used(queue), [(u32::from(head), 0)]);
        assert_eq!([0, 1, 2, 3].map(|n| b.read(DATA + 4096 * n, 1)[0]), [0, 7, 0, 7]);
        assert_eq!(info(&mut b).reported, 8192);
        // a port that goes on hears of it
        let dirty = b.memory.take_own_dirty();
        let page = (DATA / 4096) as usize;
        assert_eq!([0, 1, 2].map(|n| dirty[(page + n) / 64] >> ((page + n) % 64) & 1), [1, 0, 1]);
    }
}

#[test]
fn a_port_finds_no_content_in_what_was_reported() {
    let mut b = balloon(feature::STATS_VQ | feature::REPORTING);
    let (at, len) = (0x20_0000u64, 0x20_0000u32);
    b.write(at, &vec![7; len as usize]);
    let before = Pending::populated(&b.memory).count();
    b.chain(REPORTS, &[(at, len, WRITE)]);
    b.wait_used(REPORTS);
    assert_eq!(before - Pending::populated(&b.memory).count(), 512);
}

#[test]
fn nothing_is_given_back_that_was_not_negotiated() {
    let mut b = balloon(feature::STATS_VQ);
    b.write(DATA, &[7; 4096]);
    b.chain(REPORTS, &[(DATA, 4096, WRITE)]);
    b.transport.process();
    assert_eq!((b.used(REPORTS).len(), b.read(DATA, 1)[0]), (0, 7));
}

fn statistic(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_asked_for_and_the_buffer_survives_a_save() {
    let mut b = balloon(feature::STATS_VQ);
    let bytes = [statistic(4, 1000), statistic(5, 4000), statistic(999, 1), vec![1, 2, 3]].concat();
    b.write(DATA, &bytes);
    let head = b.chain(2, &[(DATA, bytes.len() as u32, 0)]);
    b.transport.process();
    let statistics = info(&mut b).statistics.unwrap();
    assert_eq!((statistics.free, statistics.total, statistics.caches), (Some(1000), Some(4000), None));
    // held until new ones are wanted
    assert_eq!(b.used(2), []);
    b.transport.device_mut().as_balloon().unwrap().ask_for_statistics();
    assert_eq!(b.wait_used(2), [(u32::from(head), 0)]);
    b.write(DATA, &statistic(4, 2000));
    b.chain(2, &[(DATA, 10, 0)]);
    b.transport.process();
    assert_eq!(info(&mut b).statistics.unwrap().free, Some(2000));
    b.transport.quiesce();
    let state = b.transport.save();
    assert_eq!(state.queues[2].next_avail, 1, "the buffer is back in the queue");

    let mut other = Bench::with_memory(Box::new(Balloon::new("balloon0", &config()).unwrap()), b.memory.clone());
    other.transport.restore(&state).unwrap();
    other.transport.resume();
    assert_eq!(info(&mut other).statistics.unwrap().free, Some(2000));
    assert_eq!(other.transport.save().queues[2].next_avail, 2);
}

#[test]
fn statistics_come_by_themselves_at_the_interval_asked_for() {
    let config = BalloonConfig { stats_seconds: 1, ..config() };
    let mut b = Bench::new(Box::new(Balloon::new("balloon0", &config).unwrap()));
    b.start(feature::STATS_VQ, 5);
    b.chain(2, &[(DATA, 10, 0)]);
    assert_eq!(b.wait_used(2).len(), 1);
    assert_eq!(b.transport.device().descriptors().len(), 1);
    assert!(b.transport.device().descriptors()[0] != b.gate.as_raw_fd());
}

#[test]
fn state_is_the_targets_and_of_a_balloon() {
    let mut b = balloon(0);
    b.transport.device_mut().as_balloon().unwrap().set_target(3 << 20);
    b.set(0x104, 77);
    b.transport.quiesce();
    let state = b.transport.save();
    let mut other = Bench::with_memory(Box::new(Balloon::new("balloon0", &config()).unwrap()), b.memory.clone());
    other.transport.restore(&state).unwrap();
    assert_eq!((other.reg(0x100), other.reg(0x104)), (768, 77));
    let wrong = crate::virtio::mmio::TransportState { device: DeviceState::Stateless, ..state };
    assert!(other.transport.restore(&wrong).is_err());
}

#[test]
fn too_many_pages_or_half_numbers_break_the_queue() {
    for len in [4 * PFNS_MAX as u32 + 4, 6] {
        let mut b = balloon(0);
        b.chain(0, &[(DATA, len, 0)]);
        b.transport.process();
        assert_ne!(b.status() & STATUS_NEEDS_RESET, 0, "{len}");
    }
    let mut b = balloon(0);
    pages_to(&mut b, 0, &[u32::MAX, u32::MAX - 1, 5000, 0xf_ffff]);
    assert_eq!(b.wait_used(0).len(), 1);
    assert_eq!(info(&mut b).inflated, 0);
}

#[test]
fn hostile_drivers_never_bring_it_down() {
    let mut random = Random(0x5eed_0002);
    for _ in 0..60 {
        let mut b = balloon(random.next() & (feature::STATS_VQ | feature::REPORTING));
        for _ in 0..random.next() % 12 {
            let queue = random.next() % 5;
            if random.next().is_multiple_of(2) {
                let pfns: Vec<u32> =
                    (0..random.next() % 64).map(|_| random.next() as u32 >> (random.next() % 32)).collect();
                pages_to(&mut b, queue, &pfns[..pfns.len().max(1).min(pfns.len())]);
            } else {
                let pieces: Vec<(u64, u32, u16)> = (0..1 + random.next() % 4)
                    .map(|_| {
                        let len = random.next() as u32 >> (random.next() % 32);
                        (random.next() >> (random.next() % 64), len, (random.next() & 7) as u16)
                    })
                    .collect();
                b.chain(queue, &pieces);
            }
            b.set(0x104, random.next() as u32);
            b.transport.device_mut().as_balloon().unwrap().ask_for_statistics();
        }
        let mut rounds = 0;
        while b.transport.process() == Progress::More {
            rounds += 1;
            assert!(rounds < 1000);
        }
        b.transport.quiesce();
        b.transport.save();
        b.transport.resume();
        b.set(0x70, 0);
        assert_eq!(b.status(), 0);
    }
}
