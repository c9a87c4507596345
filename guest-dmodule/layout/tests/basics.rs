//! The main path: operations, replies and when they may leave, kept replies.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use fabric::fs::{CreateHow, Credential, SetAttr, Stability, Status, Time};
use fabric::id::{Epoch, Sequence, Slot, VmId};
use fabric::op::{Op, Reply, Request};
use fabric::owner::OwnerChange;
use layout::{Attempt, CpNumber, KeepKey, MountOptions, OWNER_BLOCKS, OwnerJournal, OwnerStore, SETTLE_AT};
use rig::model::refusal;
use rig::*;

#[test]
fn create_write_remount_read() {
    let mut volume = Volume::new(4096, SMALL);
    let root = volume.root();
    let dir = volume.make_dir(root, "dir").handle;
    let file = volume.create(dir, "file").handle;
    let data = pattern(1, 300_000);
    volume.write(file, 0, &data);
    assert_eq!(volume.read(file, 0, 300_000), data);
    volume.sync();
    let mut volume = volume.remount();
    let dir = volume.lookup(root, "dir").unwrap().handle;
    let attr = volume.lookup(dir, "file").unwrap();
    assert_eq!((attr.handle, attr.size), (file, 300_000));
    assert_eq!(volume.read(file, 0, 1 << 20), data);
    assert_eq!(volume.read(file, 5000, 10), data[5000..5010]);
    volume.write(file, 4090, b"0123456789");
    volume.check();
    let mut volume = volume.remount();
    let mut expected = data;
    expected[4090..4100].copy_from_slice(b"0123456789");
    assert_eq!(volume.read(file, 0, 1 << 20), expected);
    volume.remove(dir, "file");
    volume.settle();
    volume.check();
    assert_eq!(volume.lookup(dir, "file"), Err(Status::NotFound));
}

#[test]
fn a_cold_read_of_a_mebibyte_asks_once_a_level() {
    let mut volume = Volume::new(8192, MountOptions::default());
    let root = volume.root();
    let file = volume.create(root, "file").handle;
    volume.write(file, 0, &pattern(2, 1 << 20));
    volume.sync();
    let mut volume = volume.remount();
    let op = Op::Read { handle: file, offset: 0, length: 1 << 20 };
    let request = Request { credential: Credential::ROOT, op };
    let mut lists = Vec::new();
    loop {
        match volume.fs.execute(&request, Time(0), None) {
            Attempt::Need(need) => {
                lists.push(need.len());
                volume.supply(need);
            }
            Attempt::Done(done) => break assert!(done.outcome.is_ok()),
            Attempt::Busy => panic!("busy"),
        }
    }
    // The inode, the indirect block, the data.
    assert_eq!(lists, [1, 1, 256]);
}

#[test]
fn whole_blocks_are_overwritten_without_being_read() {
    let mut volume = Volume::new(8192, MountOptions::default());
    let root = volume.root();
    let file = volume.create(root, "file").handle;
    volume.write(file, 0, &pattern(2, 1 << 20));
    volume.sync();
    let mut volume = volume.remount();
    volume.write(file, 8192, &pattern(3, 512 << 10));
    assert!(volume.reads < 16, "{} reads", volume.reads);
    volume.check();
}

#[test]
fn replies_leave_when_what_they_promise_is_durable() {
    let mut volume = Volume::new(1024, SMALL);
    let root = volume.root();
    let file = volume.create(root, "file").handle;
    volume.sync();
    let durable = volume.fs.durable_cp();
    let next = CpNumber(durable.0 + 1);
    let write = |stability| Op::Write { handle: file, offset: 0, stability, data: vec![1; 10] };
    let commit = || Op::Commit { handle: file, offset: 0, count: 0 };
    // Nothing to wait for.
    assert!(volume.durable_at(commit()) <= durable);
    assert_eq!(volume.durable_at(Op::GetAttr { handle: file }), CpNumber(0));
    assert_eq!(volume.durable_at(write(Stability::Unstable)), CpNumber(0));
    assert_eq!(volume.durable_at(commit()), next);
    assert_eq!(volume.durable_at(write(Stability::FileSync)), next);
    volume.begin();
    // What is being written is what a commit waits for; a new write waits for the point after it.
    assert_eq!(volume.durable_at(commit()), next);
    assert_eq!(volume.durable_at(write(Stability::DataSync)), CpNumber(next.0 + 1));
    while volume.write_on() {}
    assert_eq!(volume.fs.durable_cp(), next);
    volume.sync();
    assert!(!volume.fs.is_dirty());
    volume.sync();
    assert_eq!(volume.fs.durable_cp(), CpNumber(next.0 + 1));
}

#[test]
fn replies_are_kept_with_their_effect() {
    let mut volume = Volume::new(1024, SMALL);
    let root = volume.root();
    let keep = |vm: u64, slot: u16, sequence: u64| KeepKey {
        vm_id: VmId(vm),
        slot: Slot(slot),
        session: Epoch(2),
        sequence: Sequence(sequence),
    };
    let create = |name: &str| Request {
        credential: Credential::ROOT,
        op: Op::Create { dir: root, name: name.into(), how: CreateHow::Guarded(SetAttr::default()) },
    };
    let outcomes: Vec<_> =
        (0..64).map(|slot| volume.try_execute(&create(&format!("a{slot}")), Some(keep(5, slot, 9))).outcome).collect();
    let other = volume.try_execute(&create("b"), Some(keep(6, 63, 1))).outcome;
    // A refused operation has no effect and keeps nothing.
    let refused = volume.try_execute(&create("b"), Some(keep(6, 63, 2))).outcome;
    assert_eq!(refusal(refused), Status::Exists);
    volume.check();
    let mut volume = volume.remount();
    let mut kept = |vm, slot| {
        let bytes = volume.kept(VmId(vm), Slot(slot));
        bytes.map(|bytes| fabric::wire::decode_kept(&bytes).unwrap())
    };
    for (slot, outcome) in outcomes.iter().enumerate() {
        assert_eq!(kept(5, slot as u16), Some((Epoch(2), Sequence(9), outcome.clone())));
    }
    assert_eq!(kept(6, 63), Some((Epoch(2), Sequence(1), other)));
    assert_eq!(kept(6, 0), None);
    assert_eq!(kept(7, 0), None);
    let bad = volume.try_execute(&create("c"), Some(keep(0, 0, 1))).outcome;
    assert_eq!(refusal(bad), Status::Invalid);
    assert_eq!(volume.lookup(root, "c"), Err(Status::NotFound));
}

#[test]
fn the_place_of_a_released_vms_replies_is_anothers() {
    const VMS: u64 = 300;
    let mut volume = Volume::new(16384, SMALL);
    let root = volume.root();
    let keep = |volume: &mut Volume, vm: u64, slot: u16| {
        let name = format!("{vm} {slot}").into();
        let op = Op::Create { dir: root, name, how: CreateHow::Guarded(SetAttr::default()) };
        let key = KeepKey { vm_id: VmId(vm), slot: Slot(slot), session: Epoch(1), sequence: Sequence(vm) };
        volume.try_execute(&Request { credential: Credential::ROOT, op }, Some(key)).outcome.unwrap();
    };
    let sequence = |volume: &mut Volume, vm: u64, slot: u16| {
        let kept = volume.kept(VmId(vm), Slot(slot))?;
        Some(fabric::wire::decode_kept(&kept).unwrap().1.0)
    };
    // More than one block of the table holds.
    for vm in 1..=VMS {
        keep(&mut volume, vm, 0);
    }
    let images = OWNER_BLOCKS.map(|number| volume.disk.read(number));
    let journal = OwnerJournal::load([images[0].as_ref(), images[1].as_ref()]).unwrap();
    let mut owners = OwnerStore::new(journal, &[], volume.fs.durable_cp()).unwrap();
    for vm in 2..2 + SETTLE_AT as u64 {
        let write = owners.prepare(OwnerChange::Release(VmId(vm), Epoch::UNCLAIMED)).unwrap();
        owners.commit(write);
    }
    let released = owners.to_settle().unwrap();
    loop {
        match volume.fs.settle_owners(&released, Time(5)) {
            Attempt::Done(at) => break owners.settling(at.unwrap(), released),
            Attempt::Need(need) => volume.supply(need),
            Attempt::Busy => volume.sync(),
        }
    }
    // The same session and another slot: what the former VM kept is not the new one's.
    keep(&mut volume, 1000, 5);
    volume.check();
    let mut volume = volume.remount();
    assert_eq!((sequence(&mut volume, 1000, 5), sequence(&mut volume, 1000, 0)), (Some(1000), None));
    let last = 1 + SETTLE_AT as u64;
    assert_eq!((sequence(&mut volume, 2, 0), sequence(&mut volume, last, 0)), (None, None));
    for vm in [1, last + 1, VMS] {
        assert_eq!(sequence(&mut volume, vm, 0), Some(vm));
    }
}

#[test]
fn a_reply_alone_is_kept_too() {
    let mut volume = Volume::new(1024, SMALL);
    let root = volume.root();
    volume.create(root, "a");
    volume.sync();
    // Renaming a file to its own name changes nothing but the kept reply.
    let op = Op::Rename { from_dir: root, from_name: b"a".to_vec(), to_dir: root, to_name: b"a".to_vec() };
    let key = KeepKey { vm_id: VmId(5), slot: Slot(0), session: Epoch(1), sequence: Sequence(1) };
    volume.try_execute(&Request { credential: Credential::ROOT, op }, Some(key)).outcome.unwrap();
    volume.check();
    volume.create(root, "b");
    volume.check();
    let mut volume = volume.remount();
    let kept = volume.kept(VmId(5), Slot(0)).unwrap();
    assert_eq!(fabric::wire::decode_kept(&kept).unwrap().1, Sequence(1));
}

#[test]
fn too_many_dirty_blocks_wait_for_a_consistency_point() {
    let mut volume = Volume::new(8192, SMALL);
    let root = volume.root();
    let file = volume.create(root, "file").handle;
    let data = pattern(1, 64 << 10);
    for at in 0..40 {
        volume.write(file, at * data.len() as u64, &data);
        assert!(volume.fs.usage().dirty <= SMALL.dirty_blocks as u64);
    }
    assert!(volume.begun.len() >= 4);
    // One operation larger than the limit still runs.
    volume.write(file, 0, &pattern(5, 1 << 20));
    assert_eq!(volume.read(file, 0, 1 << 20), pattern(5, 1 << 20));
    assert!(volume.fs.usage().cached <= 2 * SMALL.cache_blocks as u64);
    volume.check();
}

#[test]
fn blocks_are_written_in_long_runs() {
    let mut volume = Volume::new(65_536, MountOptions::default());
    let root = volume.root();
    let file = volume.create(root, "file").handle;
    for at in 0..8 {
        volume.write(file, at << 20, &pattern(at, 1 << 20));
    }
    let cp = volume.fs.begin_consistency_point().unwrap();
    let runs = cp.writes.windows(2).filter(|pair| pair[0].0.0 + 1 != pair[1].0.0).count() + 1;
    assert!(cp.writes.len() > 2048 && runs <= 3, "{} blocks in {runs} runs", cp.writes.len());
}

#[test]
fn handles_of_the_dead_are_stale() {
    let mut volume = Volume::new(1024, SMALL);
    let root = volume.root();
    let old = volume.create(root, "a").handle;
    volume.remove(root, "a");
    let new = volume.create(root, "a").handle;
    assert_eq!((new.inode, new.generation), (old.inode, old.generation + 1));
    assert_eq!(refusal(volume.run(Op::GetAttr { handle: old })), Status::Stale);
    let elsewhere = fabric::fs::FileHandle { volume: fabric::fs::VolumeId(9), ..new };
    assert_eq!(refusal(volume.run(Op::GetAttr { handle: elsewhere })), Status::NoVolume);
    for inode in [0, 1, 15, 1 << 50, u64::MAX] {
        let handle = fabric::fs::FileHandle { inode, ..new };
        assert_eq!(refusal(volume.run(Op::GetAttr { handle })), Status::Stale);
    }
    assert_eq!(refusal(volume.run(Op::OpenVolume { name: "other".into() })), Status::NoVolume);
    let Ok(Reply::Node { attr, .. }) = volume.run(Op::OpenVolume { name: "vol0".into() }) else { panic!() };
    assert_eq!(attr.handle, root);
}
