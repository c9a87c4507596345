//! Sizes: large directories, large sparse files, deferred freeing.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use fabric::fs::Status;
use fabric::op::{Op, Reply};
use layout::MountOptions;
use rig::*;
use std::collections::HashSet;

const ROOMY: MountOptions = MountOptions { verifier: 1, cache_blocks: 8192, dirty_blocks: 2048 };

#[test]
fn a_hundred_thousand_entries() {
    let mut volume = Volume::new(131_072, ROOMY);
    let root = volume.root();
    let dir = volume.make_dir(root, "many").handle;
    let count = 100_000;
    for number in 0..count {
        volume.create(dir, &format!("file-{number:06}"));
    }
    let report = volume.check();
    assert_eq!((report.files, report.directories), (count, 2));
    let mut volume = volume.remount();
    // A name is found with a handful of reads.
    let before = volume.reads;
    volume.lookup(dir, "file-054321").unwrap();
    assert!(volume.reads - before < 16, "{} reads", volume.reads - before);
    assert_eq!(volume.lookup(dir, "file-100000"), Err(Status::NotFound));
    // Half are removed while a listing goes on; the others are listed exactly once.
    let mut seen = HashSet::new();
    let (mut cookie, mut random) = (0, Random::new(5));
    loop {
        let op = Op::ReadDir { dir, cookie, max_entries: 1000, max_bytes: 64 << 10, plus: random.chance(10) };
        let Ok(Reply::Entries { entries, eof, .. }) = volume.run(op) else { panic!() };
        for entry in &entries {
            assert!(entry.cookie > cookie);
            cookie = entry.cookie;
            assert!(seen.insert(entry.name.clone()));
        }
        for entry in entries.iter().filter(|entry| entry.name.ends_with(b"7")) {
            volume.remove(dir, std::str::from_utf8(&entry.name).unwrap());
        }
        if eof {
            break;
        }
    }
    assert_eq!(seen.len() as u64, count + 2);
    for number in (0..count).filter(|number| number % 10 != 7) {
        volume.remove(dir, &format!("file-{number:06}"));
    }
    volume.settle();
    let report = volume.check();
    assert_eq!((report.files, report.directories, report.orphans), (0, 2, 0));
    assert_eq!(volume.attr(dir).size, 0);
}

#[test]
fn a_sparse_file_of_one_tebibyte() {
    let mut volume = Volume::new(4096, SMALL);
    let root = volume.root();
    let file = volume.create(root, "sparse").handle;
    let free = volume.free_bytes();
    volume.write(file, 0, b"begin");
    volume.write(file, (1 << 40) - 3, b"end");
    volume.write(file, 1 << 30, &pattern(3, 10_000));
    volume.check();
    let mut volume = volume.remount();
    assert_eq!(volume.attr(file).size, 1 << 40);
    assert!(volume.attr(file).used < 100 << 10);
    assert_eq!(volume.read(file, (1 << 40) - 6, 100), b"\0\0\0end");
    assert_eq!(volume.read(file, 1 << 30, 10_000), pattern(3, 10_000));
    assert_eq!(volume.read(file, 1 << 35, 4096), vec![0; 4096]);
    // Cut in the middle: what is in front stays.
    volume.set_size(file, (1 << 30) + 5000);
    let report = volume.check();
    assert_eq!(report.orphans, 1);
    assert_eq!(volume.read(file, 1 << 30, 10_000), pattern(3, 10_000)[..5000]);
    volume.set_size(file, 1 << 41);
    assert_eq!(volume.read(file, (1 << 30) + 4990, 4096)[10..], [0; 4086]);
    volume.settle();
    assert_eq!(volume.check().orphans, 0);
    volume.remove(root, "sparse");
    volume.check();
    let mut volume = volume.remount();
    volume.settle();
    let report = volume.check();
    assert_eq!((report.orphans, report.files), (0, 0));
    assert!(volume.free_bytes().abs_diff(free) <= 4 * 4096);
}

#[test]
fn a_large_file_is_freed_in_bounded_steps() {
    let mut volume = Volume::new(65_536, ROOMY);
    let root = volume.root();
    let file = volume.create(root, "large").handle;
    let chunk = pattern(9, 1 << 20);
    for at in 0..150 {
        volume.write(file, at << 20, &chunk);
    }
    volume.check();
    let mut volume = volume.remount();
    volume.remove(root, "large");
    let (mut steps, mut crashed) = (0, 0);
    while volume.fs.has_work() {
        let dirty = volume.fs.usage().dirty;
        match volume.fs.work(fabric::fs::Time(1)) {
            layout::Attempt::Done(Ok(_)) => {
                steps += 1;
                assert!(volume.fs.usage().dirty < dirty + 100, "from {dirty} to {} dirty", volume.fs.usage().dirty);
            }
            layout::Attempt::Done(Err(status)) => panic!("{status}"),
            layout::Attempt::Need(need) => volume.supply(need),
            layout::Attempt::Busy => volume.sync(),
        }
        // A crash in between loses nothing.
        if steps % 7 == 3 && crashed != steps {
            crashed = steps;
            volume.check();
            volume = volume.remount();
        }
    }
    assert!(steps > 20, "{steps} steps");
    let report = volume.check();
    assert_eq!((report.files, report.orphans), (0, 0));
    assert!(report.blocks < 20, "{} blocks", report.blocks);
}
