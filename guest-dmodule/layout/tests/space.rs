//! Full volumes: refused without loss, and always to be emptied again.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use fabric::fs::{CreateHow, SetAttr, Status};
use fabric::op::{Op, Reply};
use rig::model::refusal;
use rig::*;

fn fill(volume: &mut Volume, name: &str, piece: usize) -> u64 {
    let (dir, how) = (volume.root(), CreateHow::Guarded(SetAttr::default()));
    let file = match volume.run(Op::Create { dir, name: name.into(), how }) {
        Ok(Reply::Created { attr, .. }) => attr.handle,
        other => {
            assert_eq!(refusal(other), Status::NoSpace);
            return 0;
        }
    };
    let mut size = 0;
    loop {
        match volume.try_write(file, size, &pattern(size, piece)) {
            Ok(()) => size += piece as u64,
            Err(status) => {
                assert_eq!(status, Status::NoSpace);
                return size;
            }
        }
    }
}

#[test]
fn a_full_volume_keeps_what_it_has_and_can_be_emptied() {
    for blocks in [256, 300, 700, 5000, 40_000] {
        let mut volume = Volume::new(blocks, SMALL);
        let root = volume.root();
        let empty = volume.free_bytes();
        let keeper = volume.create(root, "keeper").handle;
        volume.write(keeper, 0, &pattern(7, 5000));
        let size = fill(&mut volume, "filler", 8192);
        assert!(size + (1 << 20) > empty / 2, "{size} of {empty} bytes");
        volume.check();
        // Full again and again, in small pieces too.
        fill(&mut volume, "filler2", 4096);
        volume.check();
        let make = Op::MakeDir { dir: root, name: b"dir".to_vec(), set: SetAttr::default() };
        let _ = volume.run(make);
        volume.check();
        let mut volume = volume.remount();
        assert_eq!(volume.read(keeper, 0, 9000), pattern(7, 5000));
        let filler = volume.lookup(root, "filler").unwrap();
        assert_eq!(filler.size, size);
        for at in (0..size).step_by(8192) {
            assert_eq!(volume.read(filler.handle, at, 8192), pattern(at, 8192));
        }
        // Truncation and removal work on the full volume.
        volume.set_size(filler.handle, size / 2 + 100);
        volume.check();
        volume.remove(root, "filler");
        if volume.lookup(root, "filler2").is_ok() {
            volume.remove(root, "filler2");
        }
        volume.settle();
        let report = volume.check();
        assert_eq!(report.orphans, 0);
        let again = fill(&mut volume, "again", 8192);
        assert!(again + (64 << 10) >= size, "{blocks} blocks: {again} bytes after {size}");
        volume.check();
    }
}

#[test]
fn inodes_run_out_without_harm() {
    let mut volume = Volume::new(512, SMALL);
    let root = volume.root();
    let mut made = 0;
    loop {
        let how = fabric::fs::CreateHow::Guarded(SetAttr::default());
        match volume.run(Op::Create { dir: root, name: format!("f{made}").into_bytes(), how }) {
            Ok(_) => made += 1,
            Err(failure) => {
                assert_eq!(failure.status, Status::NoSpace);
                break;
            }
        }
    }
    assert_eq!(volume.check().files, made);
    for number in 0..made {
        volume.remove(root, &format!("f{number}"));
    }
    volume.settle();
    assert_eq!(volume.check().files, 0);
    volume.create(root, "one more");
    volume.check();
}

#[test]
fn a_full_volume_refuses_what_takes_space_only() {
    let mut volume = Volume::new(600, SMALL);
    let root = volume.root();
    let file = volume.create(root, "a").handle;
    fill(&mut volume, "filler", 4096);
    let big = Op::Symlink { dir: root, name: b"l".to_vec(), target: vec![b'x'; 1000], set: SetAttr::default() };
    assert_eq!(refusal(volume.run(big)), Status::NoSpace);
    let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    volume.run(Op::SetAttr { handle: file, set, guard: None }).unwrap();
    volume.check();
}

#[test]
fn no_volume_is_made_too_small() {
    for blocks in [0, 255, u64::MAX] {
        assert!(layout::format(&format_options(blocks)).is_err());
    }
    let long = "n".repeat(256);
    assert!(layout::format(&layout::FormatOptions { name: &long, ..format_options(1000) }).is_err());
    // A large one takes no longer to make than a small one.
    let made = layout::format(&format_options(1 << 32)).unwrap();
    assert!(made.first.len() < 20, "{} blocks", made.first.len());
}
