//! A disk that lies: bit rot is detected, and damage that its checksums do not show makes operations fail, never panic
//! nor run without end.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use fabric::fs::{Credential, FileHandle, Status, Time};
use fabric::op::{Op, Reply, Request};
use layout::{Attempt, BLOCK_SIZE, Block, BlockNumber, FSINFO_BLOCKS, FileSystem, check};
use rig::model::{Model, Pair, Taste, refusal};
use rig::*;
use xxhash_rust::xxh3::xxh3_64;

/// Starts of one operation before the test calls it endless.
const STARTS_MAX: u32 = 5000;

fn filled(seed: u64) -> (Disk, Model) {
    let mut random = Random::new(seed);
    let mut volume = Volume::new(2048, SMALL);
    let mut pair = Pair::new(&volume);
    for _ in 0..250 {
        pair.step(&mut volume, &mut random, Taste { offset_bits: 34, write_max: 20_000, names: 60 });
    }
    volume.check();
    (volume.disk, pair.model)
}

#[test]
fn every_rotten_block_is_noticed() {
    let (disk, _) = filled(1);
    let mut random = Random::new(9);
    let used: Vec<u64> = disk.blocks.keys().copied().filter(|number| *number > 3).collect();
    let clean = disk.check();
    let mut noticed = 0;
    for number in used {
        let mut rotten = disk.clone();
        let mut block = rotten.read(BlockNumber(number));
        block.bytes_mut()[random.below(BLOCK_SIZE as u64) as usize] ^= 1 << random.below(8);
        rotten.write(BlockNumber(number), block);
        let report = check(&mut |number| Some(rotten.read(number))).unwrap();
        let named = report.faults.iter().any(|fault| fault.contains(&format!("block {number} has a wrong checksum")));
        assert!(named || report.faults.is_empty());
        noticed += u64::from(named);
    }
    assert_eq!(noticed, clean.blocks);
}

#[test]
fn rot_and_read_errors_are_io_errors_until_they_heal() {
    let mut volume = Volume::new(1024, SMALL);
    let root = volume.root();
    let file = volume.create(root, "file").handle;
    let data = pattern(4, 40_000);
    volume.write(file, 0, &data);
    volume.check();
    let (number, block) = volume
        .disk
        .blocks
        .iter()
        .find(|(_, block)| block.bytes()[..] == data[8192..12_288])
        .map(|(number, block)| (BlockNumber(*number), block.clone()))
        .unwrap();
    let mut rotten = block.clone();
    rotten.bytes_mut()[77] ^= 4;
    volume.disk.write(number, rotten);
    let mut volume = volume.remount();
    let read = |offset| Op::Read { handle: file, offset, length: 4096 };
    assert_eq!(refusal(volume.run(read(8192))), Status::Io);
    assert_eq!(refusal(volume.run(read(8192))), Status::Io);
    assert_eq!(volume.read(file, 0, 8192), data[..8192]);
    volume.disk.write(number, block);
    assert_eq!(volume.read(file, 8192, 4096), data[8192..12_288]);
    // The disk says itself that it cannot read.
    let mut volume = volume.remount();
    let request = Request { credential: Credential::ROOT, op: read(0) };
    let mut failed = 0;
    let outcome = loop {
        match volume.fs.execute(&request, Time(1), None) {
            Attempt::Done(done) => break done.outcome,
            Attempt::Need(need) => {
                failed += need.len();
                need.into_iter().for_each(|number| volume.fs.supply_failed(number));
            }
            Attempt::Busy => panic!("busy"),
        }
    };
    assert_eq!((refusal(outcome), failed), (Status::Io, 1));
}

/// Gives every pointer the hash of what it now points to, from the leaves up.
struct Sealer<'a> {
    disk: &'a mut Disk,
    budget: u32,
}

impl Sealer<'_> {
    fn pointer(&mut self, bytes: &mut [u8], level: u8, inode_file: bool) {
        let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        if !(4..self.disk.size).contains(&number) || self.budget == 0 {
            return;
        }
        self.budget -= 1;
        let mut block = self.disk.read(BlockNumber(number));
        if level > 0 {
            for child in block.bytes_mut().chunks_mut(16) {
                self.pointer(child, level - 1, inode_file);
            }
        } else if inode_file {
            for inode in block.bytes_mut().chunks_mut(256) {
                self.inode(inode, false);
            }
        }
        bytes[8..16].copy_from_slice(&xxh3_64(block.bytes()).to_le_bytes());
        self.disk.write(BlockNumber(number), block);
    }

    fn inode(&mut self, inode: &mut [u8], inode_file: bool) {
        let level = inode[1].min(4);
        for root in inode[128..].chunks_mut(16) {
            self.pointer(root, level, inode_file);
        }
    }

    fn fsinfo(&mut self, place: BlockNumber) {
        let mut block = self.disk.read(place);
        let bytes = block.bytes_mut();
        for meta in 0..4 {
            self.inode(&mut bytes[1024 + meta * 256..][..256], meta == 0);
        }
        let hash = xxh3_64(&bytes[..4088]);
        bytes[4088..].copy_from_slice(&hash.to_le_bytes());
        self.disk.write(place, block);
    }
}

fn damage(block: &mut Block, random: &mut Random) {
    let bytes = block.bytes_mut();
    for _ in 0..1 + random.below(3) {
        let at = random.below(BLOCK_SIZE as u64 / 8) as usize * 8;
        match random.below(5) {
            0 => bytes[at + random.below(8) as usize] ^= 1 << random.below(8),
            1 => bytes[at + random.below(8) as usize] = random.next() as u8,
            2 => bytes[at..at + 8].copy_from_slice(&random.below(3000).to_le_bytes()),
            3 => bytes[at..at + 8].fill(0xff),
            _ => {
                // Something from elsewhere in the block: pointers that lead to the wrong place.
                let from = random.below(BLOCK_SIZE as u64 / 16) as usize * 16;
                let to = at / 16 * 16;
                bytes.copy_within(from..from + 16, to);
            }
        }
    }
}

/// Runs one thing to its end, in bounded time.
fn run(volume: &mut Volume, request: &Request) -> Option<Reply> {
    volume.now += 1000;
    for _ in 0..STARTS_MAX {
        match volume.fs.execute(request, Time(volume.now), None) {
            Attempt::Done(done) => return done.outcome.ok(),
            Attempt::Need(need) => volume.supply(need),
            Attempt::Busy => {
                let known = volume.begun.len();
                work(volume);
                volume.sync();
                if volume.begun.len() == known && !volume.fs.has_work() {
                    return None;
                }
            }
        }
    }
    panic!("without end: {request:?}");
}

fn work(volume: &mut Volume) {
    for _ in 0..STARTS_MAX {
        if !volume.fs.has_work() {
            return;
        }
        match volume.fs.work(Time(volume.now)) {
            Attempt::Done(_) => {}
            Attempt::Need(need) => volume.supply(need),
            Attempt::Busy => volume.sync(),
        }
    }
}

fn list(volume: &mut Volume, dir: FileHandle) {
    let mut cookie = 0;
    for _ in 0..200 {
        let op = Op::ReadDir { dir, cookie, max_entries: 100, max_bytes: 9000, plus: cookie % 2 == 0 };
        match run(volume, &Request { credential: Credential::ROOT, op }) {
            Some(Reply::Entries { entries, eof: false, .. }) if !entries.is_empty() => {
                cookie = entries.last().unwrap().cookie;
            }
            _ => return,
        }
    }
}

#[test]
fn damage_with_right_checksums_never_panics() {
    let mut mounted = 0;
    for seed in 0..seeds(150) {
        let (mut disk, model) = filled(seed % 5);
        let mut random = Random::new(seed ^ 0xf00d);
        let newest = disk.check().generation;
        let place = FSINFO_BLOCKS[newest as usize % 2];
        let mut used: Vec<u64> = disk.blocks.keys().copied().filter(|number| *number > 3).collect();
        used.sort_unstable();
        for _ in 0..1 + random.below(4) {
            let fsinfo = random.chance(10);
            let number = if fsinfo { place.0 } else { used[random.below(used.len() as u64) as usize] };
            let mut block = disk.read(BlockNumber(number));
            damage(&mut block, &mut random);
            disk.write(BlockNumber(number), block);
        }
        Sealer { disk: &mut disk, budget: 20_000 }.fsinfo(place);
        let _ = check(&mut |number| Some(disk.read(number)));
        let copies = FSINFO_BLOCKS.map(|number| disk.read(number));
        if FileSystem::mount([copies[0].as_ref(), copies[1].as_ref()], disk.size, SMALL).is_err() {
            continue;
        }
        mounted += 1;
        let mut volume = Volume::mount(disk, SMALL);
        volume.now = 1 << 40;
        for (handle, node) in &model.nodes {
            if node.entries.is_empty() {
                let op = Op::Read { handle: *handle, offset: 0, length: 100_000 };
                run(&mut volume, &Request { credential: Credential::ROOT, op });
            }
            list(&mut volume, *handle);
        }
        for _ in 0..120 {
            let op = model.random_op(&mut random, Taste { offset_bits: 43, write_max: 9000, names: 60 });
            run(&mut volume, &Request { credential: Credential::ROOT, op });
            if random.chance(10) {
                volume.sync();
            }
        }
        work(&mut volume);
        volume.sync();
        for slot in 0..8 {
            for _ in 0..10 {
                match volume.fs.kept(rig::model::VM, fabric::id::Slot(slot)) {
                    Attempt::Need(need) => volume.supply(need),
                    _ => break,
                }
            }
        }
    }
    assert!(mounted > 0);
}

#[test]
fn blocks_nobody_asked_for_are_ignored() {
    let mut volume = Volume::new(1024, SMALL);
    let cached = volume.fs.usage().cached;
    volume.fs.supply(BlockNumber(5), Block::zeroed());
    volume.fs.supply_failed(BlockNumber(6));
    assert_eq!(volume.fs.usage().cached, cached);
}
