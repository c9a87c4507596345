//! Crashes: the writes of a course of operations are recorded with their flushes, and cut at every point; what was
//! written since the last flush is there, missing, torn at sectors, in any combination. What must be found after a
//! mount (no repair): a consistent volume, exactly as it was when one of the consistency points was taken, and at least the last
//! one that had been reported durable, with exactly the kept replies of that moment.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use layout::{Block, BlockNumber, CpNumber, FSINFO_BLOCKS, FileSystem, MountOptions};
use rig::model::{Model, Pair, Taste, compare};
use rig::*;
use std::collections::BTreeMap;

const SECTOR: usize = 512;

struct Course {
    base: Disk,
    events: Vec<Event>,
    /// The model when a consistency point was taken.
    snapshots: BTreeMap<CpNumber, Model>,
}

/// Random operations, with consistency points taken and written while they go on.
fn record(seed: u64, blocks: u64, steps: u64, taste: Taste) -> Course {
    let mut random = Random::new(seed);
    let mut volume = Volume::new(blocks, SMALL);
    let base = volume.disk.clone();
    let mut pair = Pair::new(&volume);
    let mut snapshots = BTreeMap::from([(volume.fs.durable_cp(), pair.model.clone())]);
    volume.record();
    for _ in 0..steps {
        let before = pair.model.clone();
        let taken = volume.begun.last().copied();
        let done = pair.step(&mut volume, &mut random, taste);
        // An operation is put off while consistency points are taken: those have the model before it.
        let during: Vec<CpNumber> = volume.begun.iter().copied().filter(|number| Some(*number) > taken).collect();
        snapshots.extend(during.iter().map(|number| (*number, before.clone())));
        let stable = done.filter(|done| done.durable_at > CpNumber(0) && pair.model != before);
        if let Some(done) = stable {
            assert!(Some(done.durable_at) > volume.begun.last().copied(), "reply would leave too early");
        }
        if random.chance(15) {
            let known = volume.begun.len();
            volume.begin();
            snapshots.extend(volume.begun[known..].iter().map(|number| (*number, pair.model.clone())));
        }
        for _ in 0..random.below(12) {
            volume.write_on();
        }
        if random.chance(10) && volume.fs.has_work() {
            let known = volume.begun.len();
            volume.settle();
            snapshots.extend(volume.begun[known..].iter().map(|number| (*number, pair.model.clone())));
        }
    }
    Course { base, events: volume.events.take().unwrap(), snapshots }
}

/// The disk if the power fails now: each write since the last flush has happened, or not, or in part.
fn fail(flushed: &Disk, window: &[(BlockNumber, Block)], random: &mut Random) -> Disk {
    let mut disk = flushed.clone();
    for (number, block) in window {
        match random.below(4) {
            0 => {}
            1 => {
                let mut torn = disk.read(*number);
                for sector in 0..8 {
                    if random.chance(50) {
                        let range = sector * SECTOR..(sector + 1) * SECTOR;
                        torn.bytes_mut()[range.clone()].copy_from_slice(&block.bytes()[range]);
                    }
                }
                disk.write(*number, torn);
            }
            _ => disk.write(*number, block.clone()),
        }
    }
    disk
}

fn verify(disk: Disk, course: &Course, durable: CpNumber, random: &mut Random) {
    let report = disk.check();
    let found = CpNumber(report.generation);
    assert!(found >= durable, "consistency point {} was durable, {} found", durable.0, found.0);
    let model = course.snapshots.get(&found).expect("a consistency point that was never taken");
    let mut volume = Volume::mount(disk, SMALL);
    compare(&mut volume, model);
    if random.chance(5) {
        let mut pair = Pair::new(&volume);
        pair.model = model.clone();
        volume.settle();
        for _ in 0..30 {
            pair.step(&mut volume, random, Taste { offset_bits: 20, write_max: 9000, names: 12 });
        }
        volume.check();
        compare(&mut volume, &pair.model);
    }
}

/// Cuts the course at every point: `variants` times at random, and once with all writes so far.
fn crash_everywhere(seed: u64, course: &Course, variants: u64) {
    let mut random = Random::new(seed ^ 0xdead);
    let mut flushed = course.base.clone();
    let mut window: Vec<(BlockNumber, Block)> = Vec::new();
    let mut durable = *course.snapshots.keys().next().unwrap();
    let mut points = 0;
    for event in &course.events {
        match event {
            Event::Write(number, block) => window.push((*number, block.clone())),
            Event::Flush => {
                for (number, block) in window.drain(..) {
                    flushed.write(number, block);
                }
            }
            Event::Durable(number) => durable = *number,
        }
        let mut whole = flushed.clone();
        for (number, block) in &window {
            whole.write(*number, block.clone());
        }
        verify(whole, course, durable, &mut random);
        for _ in 0..variants {
            verify(fail(&flushed, &window, &mut random), course, durable, &mut random);
        }
        points += 1;
    }
    assert!(points > 100, "only {points} points");
}

#[test]
fn at_every_point() {
    for seed in 0..seeds(2) {
        let course = record(seed, 2048, 150, Taste { offset_bits: 20, write_max: 12_000, names: 12 });
        crash_everywhere(seed, &course, 1);
    }
}

#[test]
fn at_every_point_of_work_on_sparse_files() {
    for seed in 50..50 + seeds(2) {
        let course = record(seed, 2048, 120, Taste { offset_bits: 42, write_max: 6000, names: 8 });
        crash_everywhere(seed, &course, 1);
    }
}

#[test]
fn at_every_point_of_a_full_volume() {
    for seed in 80..80 + seeds(2) {
        let course = record(seed, 400, 120, Taste { offset_bits: 21, write_max: 60_000, names: 12 });
        crash_everywhere(seed, &course, 1);
    }
}

#[test]
fn a_failed_consistency_point_is_given_again() {
    let mut volume = Volume::new(1024, SMALL);
    let root = volume.root();
    let file = volume.create(root, "a").handle;
    volume.write(file, 0, &pattern(1, 9000));
    let first = volume.fs.begin_consistency_point().unwrap();
    assert!(volume.fs.begin_consistency_point().is_none(), "one at a time");
    // What is being written can be changed; the point does not change with it.
    volume.write(file, 100, b"later");
    volume.fs.consistency_point_failed();
    let again = volume.fs.begin_consistency_point().unwrap();
    assert_eq!(again.number, first.number);
    for (number, block) in again.writes {
        volume.disk.write(number, block);
    }
    volume.disk.write(again.fsinfo.0, again.fsinfo.1);
    volume.fs.consistency_point_done();
    volume.disk.check();
    let mut old = Volume::mount(volume.disk.clone(), SMALL);
    assert_eq!(old.read(file, 0, 9000), pattern(1, 9000));
    volume.sync();
    let mut volume = volume.remount();
    assert_eq!(volume.read(file, 100, 5), b"later");
}

#[test]
fn a_torn_fsinfo_leaves_the_one_before() {
    let mut volume = Volume::new(1024, MountOptions::default());
    let root = volume.root();
    for number in 0..6 {
        volume.create(root, &format!("file{number}"));
        let before = volume.disk.clone();
        volume.sync();
        let place = FSINFO_BLOCKS[volume.fs.durable_cp().0 as usize % 2];
        for sectors in 1..8 {
            let mut torn = volume.disk.clone();
            let mut block = before.read(place);
            let new = volume.disk.read(place);
            block.bytes_mut()[..sectors * SECTOR].copy_from_slice(&new.bytes()[..sectors * SECTOR]);
            torn.write(place, block);
            let report = torn.check();
            assert_eq!((report.generation, report.files), (volume.fs.durable_cp().0 - 1, number));
        }
    }
    let copies = FSINFO_BLOCKS.map(|number| volume.disk.read(number));
    let small = FileSystem::mount([copies[0].as_ref(), copies[1].as_ref()], 1023, MountOptions::default());
    assert!(matches!(small, Err(layout::LayoutError::DiskTooSmall { .. })));
}
