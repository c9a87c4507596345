//! The D-module's server over real TCP and a real file, with a CF client.
#![allow(clippy::unwrap_used)] // helpers of tests too
mod host;

use dserver::{FormatPolicy, OwnersPolicy, StartError};
use fabric::fs::*;
use fabric::id::{Epoch, Owner, VmId};
use fabric::op::{Op, Reply};
use fabric::owner::{OwnerRecord, VMS_MAX};
use fabric::wire::{CasStatus, OwnerAnswer, owner_cas, owner_get, owner_release};
use host::client::{Client, ask_owner};
use host::{Host, options};
use std::net::SocketAddr;
use std::path::Path;

const SIZE: u64 = 256 << 20;

fn disk(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn start(path: &Path, boot: u64) -> Host {
    Host::start(path, any(), &options("vol0", boot)).unwrap()
}

fn any() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn handle(outcome: fabric::op::Outcome) -> FileHandle {
    match outcome {
        Ok(Reply::Created { attr, .. } | Reply::Node { attr, .. }) => attr.handle,
        other => panic!("{other:?}"),
    }
}

fn create(dir: FileHandle, name: &str) -> Op {
    Op::Create { dir, name: name.into(), how: CreateHow::Guarded(SetAttr { mode: Some(0o644), ..SetAttr::default() }) }
}

fn make_dir(dir: FileHandle, name: &str) -> Op {
    Op::MakeDir { dir, name: name.into(), set: SetAttr::default() }
}

fn write(handle: FileHandle, offset: u64, data: Vec<u8>, stability: Stability) -> Op {
    Op::Write { handle, offset, stability, data }
}

/// Bytes that differ everywhere.
fn pattern(n: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

fn read_all(client: &mut Client, handle: FileHandle, length: u64) -> Vec<u8> {
    let tickets: Vec<_> = (0..length)
        .step_by(IO_MAX)
        .map(|offset| client.submit(Op::Read { handle, offset, length: IO_MAX as u32 }))
        .collect();
    let mut all = Vec::new();
    for ticket in tickets {
        match client.wait(ticket) {
            Ok(Reply::Data { data, .. }) => all.extend(data),
            other => panic!("{other:?}"),
        }
    }
    all
}

#[test]
fn only_a_blank_disk_is_formatted() {
    let file = disk(SIZE);
    let mut never = options("vol0", 1);
    never.format = FormatPolicy::Never;
    assert_eq!(Host::start(file.path(), any(), &never).err(), Some(StartError::Blank));
    assert!(start(file.path(), 1).formatted);
    assert!(!start(file.path(), 2).formatted);
    let other = Host::start(file.path(), any(), &options("other", 3)).err().unwrap();
    assert_eq!(other, StartError::WrongVolume { found: "vol0".into(), wanted: "other".into() });
    let foreign = disk(SIZE);
    std::os::unix::fs::FileExt::write_all_at(foreign.as_file(), b"LABELONE", 512).unwrap();
    assert_eq!(Host::start(foreign.path(), any(), &options("vol0", 1)).err(), Some(StartError::Foreign));
    assert!(matches!(Host::start(disk(8192).path(), any(), &options("vol0", 1)).err(), Some(StartError::Layout(_))));
}

#[test]
fn an_ownership_table_of_a_later_version_is_refused_and_left_alone() {
    let file = disk(64 << 20);
    drop(start(file.path(), 1));
    let mut bytes = std::fs::read(file.path()).unwrap();
    for number in layout::OWNER_BLOCKS {
        let block = &mut bytes[number.0 as usize * 4096..][..4096];
        if block.starts_with(b"OROW") {
            block[4..8].copy_from_slice(&4u32.to_le_bytes());
            let hash = xxhash_rust::xxh3::xxh3_64(&block[..4088]);
            block[4088..].copy_from_slice(&hash.to_le_bytes());
        }
    }
    std::fs::write(file.path(), &bytes).unwrap();
    let error = Host::start(file.path(), any(), &options("vol0", 2)).err().unwrap();
    assert_eq!(error.to_string(), "ownership table version 4 is not known here");
    assert!(std::fs::read(file.path()).unwrap() == bytes, "the disk was written to");
}

#[test]
fn ownership_records_that_are_all_damaged_are_not_taken_for_none() {
    let file = disk(64 << 20);
    drop(start(file.path(), 1));
    let mut bytes = std::fs::read(file.path()).unwrap();
    for number in layout::OWNER_BLOCKS {
        bytes[number.0 as usize * 4096 + 8] ^= 1;
    }
    std::fs::write(file.path(), &bytes).unwrap();
    let error = Host::start(file.path(), any(), &options("vol0", 2)).err().unwrap();
    assert!(error.to_string().contains("owners=forget"), "{error}");
    assert!(std::fs::read(file.path()).unwrap() == bytes, "the disk was written to");
    let forget = dserver::Options { owners: OwnersPolicy::Forget, ..options("vol0", 3) };
    let host = Host::start(file.path(), any(), &forget).unwrap();
    // What is written then is whole again, and no epoch of before comes again.
    let client = Client::new(host.address, 1, 1);
    assert!(client.epoch > Epoch(1_600_000_000));
    drop(host);
    assert!(Host::start(file.path(), any(), &options("vol0", 4)).is_ok());
}

#[test]
fn files_are_there_after_a_restart() {
    let file = disk(SIZE);
    let host = start(file.path(), 1);
    let mut client = Client::new(host.address, 1, 1);
    let root = client.root("vol0");
    assert_eq!(client.call(Op::OpenVolume { name: "none".into() }), Err(Status::NoVolume.into()));
    let dir = handle(client.call(make_dir(root, "dir")));
    let a = handle(client.call(create(dir, "a")));
    let data = pattern(20 << 20, 7);
    let tickets: Vec<_> = data
        .chunks(IO_MAX)
        .enumerate()
        .map(|(i, chunk)| client.submit(write(a, (i * IO_MAX) as u64, chunk.to_vec(), Stability::Unstable)))
        .collect();
    for ticket in tickets {
        assert!(matches!(client.wait(ticket), Ok(Reply::Written { count, verifier: 1, .. }) if count == IO_MAX as u32));
    }
    assert_eq!(read_all(&mut client, a, data.len() as u64), data);
    let committed = client.call(Op::Commit { handle: a, offset: 0, count: 0 });
    assert!(matches!(committed, Ok(Reply::Committed { verifier: 1, .. })));
    let b = handle(client.call(create(dir, "b")));
    let small = pattern(5000, 9);
    client.call(write(b, 100, small.clone(), Stability::FileSync)).unwrap();
    let statistics = host.statistics();
    assert!(statistics.consistency_points > 0 && statistics.blocks_written >= 5120, "{statistics:?}");
    drop(host);

    let host = start(file.path(), 2);
    client.reconnect(host.address);
    assert!(client.restarted);
    assert_eq!(handle(client.call(Op::Lookup { dir: root, name: b"dir".to_vec() })), dir);
    assert!(read_all(&mut client, a, data.len() as u64) == data, "20 MiB are as they were");
    let mut wanted = vec![0; 100];
    wanted.extend(&small);
    assert_eq!(read_all(&mut client, b, 5100), wanted);
    client.call(Op::Remove { dir, name: b"a".to_vec() }).unwrap();
    let list = Op::ReadDir { dir, cookie: 0, max_entries: 100, max_bytes: 10_000, plus: false };
    let Ok(Reply::Entries { entries, eof: true, .. }) = client.call(list) else { panic!() };
    let names: Vec<_> = entries.into_iter().map(|e| e.name).collect();
    assert_eq!(names, [b".".to_vec(), b"..".to_vec(), b"b".to_vec()]);
}

#[test]
fn a_reply_lost_with_the_d_module_is_given_again() {
    let file = disk(SIZE);
    let mut host = start(file.path(), 1);
    let mut client = Client::new(host.address, 9, 1);
    let root = client.root("vol0");
    for round in 0..5 {
        // The reply is on its way; the client never sees it.
        let ticket = client.submit(make_dir(root, &format!("d{round}")));
        client.transmit();
        client.wait_for_bytes();
        drop(host);
        host = start(file.path(), 2 + round);
        client.reconnect(host.address);
        let made = handle(client.wait(ticket));
        let found = client.call(Op::Lookup { dir: root, name: format!("d{round}").into() });
        assert_eq!(handle(found), made);
    }
    assert_eq!(client.call(make_dir(root, "d0")).unwrap_err().status, Status::Exists);
    // A fresh start of the VM is not given the replies of the former one.
    drop(client);
    let mut fresh = Client::new(host.address, 9, 2);
    assert_eq!(fresh.call(make_dir(root, "d1")).unwrap_err().status, Status::Exists);
    handle(fresh.call(make_dir(root, "d9")));
}

#[test]
fn ownership_is_taken_once_and_outlives_the_d_module() {
    let file = disk(SIZE);
    let host = start(file.path(), 1);
    let vm = VmId(77);
    let (me, you) = (Owner([5, 5]), Owner([6, 6]));
    let get = owner_get(vm).unwrap();
    let OwnerAnswer::Record(none) = ask_owner(host.address, &get) else { panic!() };
    assert_eq!(none.epoch, Epoch(0));
    let mut client = Client::new(host.address, vm.0, 5);
    let root = client.root("vol0");
    let first = client.epoch;
    let won = ask_owner(host.address, &owner_cas(vm, first, you).unwrap());
    let OwnerAnswer::Cas(CasStatus::Won, record) = won else { panic!("{won:?}") };
    assert_eq!((record.epoch, record.owner), (first.next().unwrap(), you));
    let lost = ask_owner(host.address, &owner_cas(vm, first, me).unwrap());
    assert_eq!(lost, OwnerAnswer::Cas(CasStatus::Lost, record));
    // The former epoch is fenced, on the same connection, until the identity says the new one.
    let ticket = client.submit(make_dir(root, "x"));
    client.until(|c| c.fenced);
    client.session.set_epoch(record.epoch, you);
    handle(client.wait(ticket));
    drop(host);
    let host = start(file.path(), 2);
    assert_eq!(ask_owner(host.address, &get), OwnerAnswer::Record(record));
}

#[test]
fn a_thousand_vms_have_records_and_one_more_waits_until_one_is_released() {
    let file = disk(SIZE);
    let host = start(file.path(), 1);
    let (me, last) = (Owner([5, 5]), VMS_MAX as u64);
    let ask = |host: &Host, question: Vec<u8>| ask_owner(host.address, &question);
    let record = |vm, epoch| OwnerRecord { vm_id: VmId(vm), epoch: Epoch(epoch), session: Epoch(epoch), owner: me };
    let won = |vm, epoch| OwnerAnswer::Cas(CasStatus::Won, record(vm, epoch));
    for vm in 1..=last {
        assert_eq!(ask(&host, owner_cas(VmId(vm), Epoch(0), me).unwrap()), won(vm, 1));
    }
    let more = owner_cas(VmId(5000), Epoch(0), me).unwrap();
    assert!(matches!(ask(&host, more.clone()), OwnerAnswer::Cas(CasStatus::Refused, _)));
    drop(host);
    let host = start(file.path(), 2);
    assert!(matches!(ask(&host, more.clone()), OwnerAnswer::Cas(CasStatus::Refused, _)));
    // They have sessions, in which what they do is done once.
    let mut clients: Vec<Client> =
        [1, 500, last].map(|vm| Client::resume(host.address, vm, Epoch(1), Owner([5, 5]))).into();
    for (i, client) in clients.iter_mut().enumerate() {
        let root = client.root("vol0");
        handle(client.call(make_dir(root, &format!("of {i}"))));
    }
    let none = OwnerRecord { vm_id: VmId(1), ..OwnerRecord::default() };
    let gone = OwnerAnswer::Cas(CasStatus::Won, none);
    assert_eq!(ask(&host, owner_release(VmId(1), Epoch(1), me).unwrap()), gone);
    assert_eq!(ask(&host, more), won(5000, 2));
    drop(host);
    let host = start(file.path(), 3);
    for vm in 2..=last {
        assert_eq!(ask(&host, owner_get(VmId(vm)).unwrap()), OwnerAnswer::Record(record(vm, 1)));
    }
    assert_eq!(ask(&host, owner_get(VmId(5000)).unwrap()), OwnerAnswer::Record(record(5000, 2)));
    assert_eq!(ask(&host, owner_get(VmId(1)).unwrap()), OwnerAnswer::Record(none));
    assert_eq!(ask(&host, owner_release(VmId(1), Epoch(1), me).unwrap()), gone, "asked again");
}

/// As the code before this wrote it.
#[test]
fn a_volume_of_the_versions_before_is_taken_over() {
    let file = disk(64 << 20);
    drop(start(file.path(), 1));
    let mut bytes = std::fs::read(file.path()).unwrap();
    let seal = |block: &mut [u8]| {
        let hash = xxhash_rust::xxh3::xxh3_64(&block[..4088]);
        block[4088..4096].copy_from_slice(&hash.to_le_bytes());
    };
    for number in layout::FSINFO_BLOCKS {
        let block = &mut bytes[number.0 as usize * 4096..][..4096];
        if block.starts_with(b"ORFSINFO") {
            block[8] = 1;
            block[2048..2304].fill(0);
            seal(block);
        }
    }
    for (number, sequence) in layout::OWNER_BLOCKS.into_iter().zip([8u64, 7]) {
        let block = &mut bytes[number.0 as usize * 4096..][..4096];
        block.fill(0);
        block[..8].copy_from_slice(b"OROW\x02\0\0\0");
        block[16] = 1;
        // vm_id, epoch, session, owner, no heir.
        let record = [77, sequence, 2, 5, 5, 0, 0];
        for (at, value) in [(8, sequence)].into_iter().chain((24..80).step_by(8).zip(record)) {
            block[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        seal(block);
    }
    std::fs::write(file.path(), &bytes).unwrap();
    let host = start(file.path(), 2);
    let held = OwnerRecord { vm_id: VmId(77), epoch: Epoch(8), session: Epoch(2), owner: Owner([5, 5]) };
    assert_eq!(ask_owner(host.address, &owner_get(VmId(77)).unwrap()), OwnerAnswer::Record(held));
    // Before anything else, the journal is of a version that the code before this refuses.
    let after = std::fs::read(file.path()).unwrap();
    assert_eq!(after[3 * 4096..][..8], *b"OROW\x03\0\0\0");
    let mut client = Client::new(host.address, 1, 1);
    let root = client.root("vol0");
    handle(client.call(make_dir(root, "x")));
    drop(host);
    let host = start(file.path(), 3);
    assert_eq!(ask_owner(host.address, &owner_get(VmId(77)).unwrap()), OwnerAnswer::Record(held));
}

#[test]
fn many_vms_write_at_once_and_share_consistency_points() {
    let file = disk(SIZE);
    let host = start(file.path(), 1);
    let address = host.address;
    let threads: Vec<_> = (1..=4u64)
        .map(|vm| {
            std::thread::spawn(move || {
                let mut client = Client::new(address, vm, vm);
                let root = client.root("vol0");
                let tickets: Vec<_> =
                    (0..200).map(|i| client.submit(create(root, &format!("vm{vm} file{i}")))).collect();
                let made: Vec<_> = tickets.into_iter().map(|t| handle(client.wait(t))).collect();
                let tickets: Vec<_> = made
                    .iter()
                    .map(|file| client.submit(write(*file, 0, pattern(10_000, file.inode), Stability::FileSync)))
                    .collect();
                for ticket in tickets {
                    client.wait(ticket).unwrap();
                }
                made
            })
        })
        .collect();
    let made: Vec<FileHandle> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
    let points = host.statistics().consistency_points;
    assert!(points < 800, "{points} consistency points for 1600 stable operations");
    drop(host);
    let host = start(file.path(), 2);
    let mut client = Client::new(host.address, 9, 9);
    for file in made {
        assert_eq!(read_all(&mut client, file, 10_000), pattern(10_000, file.inode));
    }
}

#[test]
fn a_peer_that_takes_no_replies_keeps_nobody_else_from_theirs() {
    let file = disk(SIZE);
    let mut few = options("vol0", 1);
    few.held_bytes = 0;
    let host = Host::start(file.path(), any(), &few).unwrap();
    let mut writer = Client::new(host.address, 1, 1);
    let root = writer.root("vol0");
    let a = handle(writer.call(create(root, "a")));
    let data = pattern(IO_MAX, 3);
    writer.call(write(a, 0, data.clone(), Stability::FileSync)).unwrap();
    let mut stuck: Vec<Client> = (2..6).map(|vm| Client::new(host.address, vm, vm)).collect();
    for client in &mut stuck {
        for _ in 0..60 {
            client.submit(Op::Read { handle: a, offset: 0, length: IO_MAX as u32 });
        }
        client.transmit();
    }
    for _ in 0..20 {
        assert!(read_all(&mut writer, a, IO_MAX as u64) == data);
    }
    // And they get theirs when they take them.
    for mut client in stuck {
        client.until(|c| c.session.outstanding() == 0);
    }
}
