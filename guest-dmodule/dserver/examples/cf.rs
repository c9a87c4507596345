//! A CF client for the shell: `cf ADDRESS:PORT smoke|bench [MIB]|own [N]|fill N|port [N]`.
//!
//! `smoke` does one of everything in a directory of its own and checks what comes back; `bench` writes and reads
//! a file, makes files, reads at random, takes ownership, and says how fast it went;
//! `own` takes ownership of a VM of its own now and then; `fill` of N VMs, one after the other; `port` does so as a port does: asks for the record while a
//! client writes, stops the client a little later, and times the compare-and-swap.
#![allow(dead_code, clippy::unwrap_used)] // a tool of tests
#[path = "../tests/host/client.rs"]
mod client;

use client::{Asker, Client, ask_owner};
use fabric::client::Ticket;
use fabric::fs::*;
use fabric::id::{Epoch, Owner, VmId};
use fabric::op::{Op, Outcome, Reply};
use fabric::wire::{CasStatus, OwnerAnswer, owner_cas, owner_get};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

fn handle(outcome: Outcome) -> FileHandle {
    match outcome {
        Ok(Reply::Created { attr, .. } | Reply::Node { attr, .. }) => attr.handle,
        other => panic!("{other:?}"),
    }
}

fn create(dir: FileHandle, name: &str) -> Op {
    let set = SetAttr { mode: Some(0o644), ..SetAttr::default() };
    Op::Create { dir, name: name.into(), how: CreateHow::Guarded(set) }
}

fn pattern(n: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(n + 8);
    while bytes.len() < n {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(n);
    bytes
}

/// Keeps `depth` operations outstanding; returns all outcomes in order, and microseconds each took.
fn pipeline(client: &mut Client, depth: usize, ops: impl Iterator<Item = Op>) -> (Vec<Outcome>, Vec<u64>) {
    let mut waiting: VecDeque<(Ticket, Instant)> = VecDeque::new();
    let (mut outcomes, mut times) = (Vec::new(), Vec::new());
    let mut finish = |client: &mut Client, waiting: &mut VecDeque<(Ticket, Instant)>| {
        let (ticket, start) = waiting.pop_front().unwrap();
        outcomes.push(client.wait(ticket));
        times.push(start.elapsed().as_micros() as u64);
    };
    for op in ops {
        if waiting.len() == depth {
            finish(client, &mut waiting);
        }
        waiting.push_back((client.submit(op), Instant::now()));
        client.transmit();
    }
    while !waiting.is_empty() {
        finish(client, &mut waiting);
    }
    (outcomes, times)
}

fn report(what: &str, start: Instant, mut times: Vec<u64>, bytes: u64) {
    let seconds = start.elapsed().as_secs_f64();
    times.sort_unstable();
    let at = |p: usize| times[(times.len() - 1) * p / 100];
    let rate = if bytes > 0 {
        format!("{:8.1} MB/s", bytes as f64 / seconds / 1e6)
    } else {
        format!("{:8.0} op/s", times.len() as f64 / seconds)
    };
    println!("{what:<32} {rate}  p50 {:>7} us  p99 {:>7} us", at(50), at(99));
}

fn smoke(client: &mut Client, root: FileHandle, name: &str) {
    let set = SetAttr::default();
    let dir = handle(client.call(Op::MakeDir { dir: root, name: name.into(), set }));
    let file = handle(client.call(create(dir, "file")));
    let data = pattern(3_000_000, 1);
    for (i, chunk) in data.chunks(IO_MAX).enumerate() {
        let offset = (i * IO_MAX) as u64;
        let written =
            client.call(Op::Write { handle: file, offset, stability: Stability::FileSync, data: chunk.to_vec() });
        assert!(matches!(written, Ok(Reply::Written { count, .. }) if count == chunk.len() as u32));
    }
    for offset in [0, 12_345, 2_999_999] {
        let Ok(Reply::Data { data: got, eof, .. }) = client.call(Op::Read { handle: file, offset, length: 5000 })
        else {
            panic!("read at {offset}")
        };
        let end = data.len().min(offset as usize + 5000);
        assert_eq!(got, data[offset as usize..end]);
        assert_eq!(eof, end == data.len());
    }
    client.call(Op::Symlink { dir, name: b"link".to_vec(), target: b"file".to_vec(), set }).unwrap();
    client.call(Op::Link { handle: file, dir, name: b"hard".to_vec() }).unwrap();
    let (from_name, to_name) = (b"hard".to_vec(), b"renamed".to_vec());
    client.call(Op::Rename { from_dir: dir, from_name, to_dir: root, to_name: to_name.clone() }).unwrap();
    client.call(Op::Remove { dir: root, name: to_name }).unwrap();
    client.call(Op::SetAttr { handle: file, set: SetAttr { size: Some(10), ..set }, guard: None }).unwrap();
    let Ok(Reply::Attr(attr)) = client.call(Op::GetAttr { handle: file }) else { panic!("attributes") };
    assert_eq!((attr.size, attr.links), (10, 1));
    let list = Op::ReadDir { dir, cookie: 0, max_entries: 100, max_bytes: 10_000, plus: true };
    let Ok(Reply::Entries { entries, eof: true, .. }) = client.call(list) else { panic!("listing") };
    assert_eq!(entries.len(), 4);
    assert_eq!(client.call(Op::RemoveDir { dir: root, name: name.into() }).unwrap_err().status, Status::NotEmpty);
    for name in ["file", "link"] {
        client.call(Op::Remove { dir, name: name.into() }).unwrap();
    }
    client.call(Op::RemoveDir { dir: root, name: name.into() }).unwrap();
    let Ok(Reply::Stat { stat, .. }) = client.call(Op::VolumeStat { handle: root }) else { panic!("usage") };
    println!("smoke ok: {} MiB free of {} MiB", stat.free_bytes >> 20, stat.total_bytes >> 20);
}

fn bench(client: &mut Client, root: FileHandle, name: &str, mib: u64) {
    let dir = handle(client.call(Op::MakeDir { dir: root, name: name.into(), set: SetAttr::default() }));
    let (_, times) = {
        let start = Instant::now();
        let got = pipeline(client, 1, (0..2000).map(|_| Op::GetAttr { handle: dir }));
        report("attributes, one at a time", start, got.1.clone(), 0);
        got
    };
    drop(times);
    let file = handle(client.call(create(dir, "big")));
    let block = pattern(IO_MAX, 5);
    let start = Instant::now();
    let writes = (0..mib).map(|i| Op::Write {
        handle: file,
        offset: i << 20,
        stability: Stability::Unstable,
        data: block.clone(),
    });
    let (outcomes, times) = pipeline(client, 8, writes);
    assert!(outcomes.iter().all(Result::is_ok), "{:?}", outcomes.iter().find(|o| o.is_err()));
    client.call(Op::Commit { handle: file, offset: 0, count: 0 }).unwrap();
    report("write 1 MiB, 8 at a time, commit", start, times, mib << 20);
    for round in ["again", "once more"] {
        let start = Instant::now();
        let length = IO_MAX as u32;
        let (outcomes, times) =
            pipeline(client, 8, (0..mib).map(|i| Op::Read { handle: file, offset: i << 20, length }));
        for outcome in outcomes {
            let Ok(Reply::Data { data, .. }) = outcome else { panic!("{outcome:?}") };
            assert!(data == block);
        }
        report(&format!("read 1 MiB, 8 at a time, {round}"), start, times, mib << 20);
    }
    let start = Instant::now();
    let mut x = 1u64;
    let reads = (0..5000).map(|_| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Op::Read { handle: file, offset: (x >> 33) % (mib << 8) * 4096, length: 4096 }
    });
    let (outcomes, times) = pipeline(client, 16, reads);
    assert!(outcomes.iter().all(Result::is_ok));
    report("read 4 KiB at random, 16", start, times, 0);
    for (depth, stability) in [(1, Stability::FileSync), (32, Stability::FileSync)] {
        let start = Instant::now();
        let data = pattern(4096, 6);
        let writes = (0..500u64).map(|i| Op::Write { handle: file, offset: i * 8192, stability, data: data.clone() });
        let (outcomes, times) = pipeline(client, depth, writes);
        assert!(outcomes.iter().all(Result::is_ok));
        report(&format!("write 4 KiB stable, {depth}"), start, times, 0);
    }
    let start = Instant::now();
    let (outcomes, times) = pipeline(client, 32, (0..2000).map(|i| create(dir, &format!("f{i}"))));
    assert!(outcomes.iter().all(Result::is_ok));
    report("create, 32 at a time", start, times, 0);
    let start = Instant::now();
    let (_, times) = pipeline(client, 32, (0..2000).map(|i| Op::Remove { dir, name: format!("f{i}").into_bytes() }));
    report("remove, 32 at a time", start, times, 0);
}

/// Compare-and-swaps, alone or while `load` writes.
fn ownership(address: std::net::SocketAddr, what: &str, n: u64, pause: Duration) {
    let vm = VmId(0xface);
    let mut epoch = Epoch(0);
    let mut times = Vec::new();
    let start = Instant::now();
    for i in 0..n {
        let one = Instant::now();
        loop {
            match ask_owner(address, &owner_cas(vm, epoch, Owner([i, 1])).unwrap()) {
                OwnerAnswer::Cas(CasStatus::Won, record) => {
                    epoch = record.epoch;
                    break;
                }
                OwnerAnswer::Cas(CasStatus::Lost, record) => epoch = record.epoch,
                other => panic!("{other:?}"),
            }
        }
        times.push(one.elapsed().as_micros() as u64);
        std::thread::sleep(pause);
    }
    report(what, start, times, 0);
}

/// A record for each of so many VMs.
fn fill(address: std::net::SocketAddr, n: u64) {
    let (mut asker, mut times, start) = (Asker::new(address), Vec::new(), Instant::now());
    for vm in 1..=n {
        let one = Instant::now();
        match asker.ask(&owner_cas(VmId(1 << 32 | vm), Epoch(0), Owner([n, 1])).unwrap()) {
            OwnerAnswer::Cas(CasStatus::Won | CasStatus::Lost, _) => {}
            other => panic!("VM {vm}: {other:?}"),
        }
        times.push(one.elapsed().as_micros() as u64);
    }
    report("first records", start, times, 0);
}

/// Compare-and-swaps as in ports of a client under load.
fn ports(address: std::net::SocketAddr, unique: u64, n: u64) {
    let paused = Arc::new(AtomicBool::new(false));
    let end = Arc::new(AtomicBool::new(false));
    let (seen, stop) = (paused.clone(), end.clone());
    let load = std::thread::spawn(move || {
        let mut client = Client::new(address, 0xcf, unique);
        let root = client.root("vol0");
        let file = handle(client.call(create(root, &format!("cf-{unique:x}"))));
        let block = pattern(IO_MAX, 5);
        let ops = (0..).take_while(|_| !stop.load(Relaxed)).map(|i: u64| {
            while seen.load(Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Op::Write { handle: file, offset: (i % 200) << 20, stability: Stability::Unstable, data: block.clone() }
        });
        let start = Instant::now();
        let (outcomes, times) = pipeline(&mut client, 8, ops);
        let bytes = (outcomes.iter().filter(|o| o.is_ok()).count() << 20) as u64;
        report("writing meanwhile", start, times, bytes);
        client.call(Op::Remove { dir: root, name: format!("cf-{unique:x}").into() }).unwrap();
    });
    let vm = VmId(0xbeef);
    let mut times = Vec::new();
    let start = Instant::now();
    let mut asker = Asker::new(address);
    for i in 0..n {
        std::thread::sleep(Duration::from_millis(100 + i * 7 % 40));
        let OwnerAnswer::Record(record) = asker.ask(&owner_get(vm).unwrap()) else { panic!("no record") };
        std::thread::sleep(Duration::from_millis(100));
        paused.store(true, Relaxed);
        // The last of what was under way arrives, as in a port.
        std::thread::sleep(Duration::from_micros(500));
        let one = Instant::now();
        let answer = asker.ask(&owner_cas(vm, record.epoch, Owner([unique, i])).unwrap());
        times.push(one.elapsed().as_micros() as u64);
        assert!(matches!(answer, OwnerAnswer::Cas(CasStatus::Won, _)), "{answer:?}");
        paused.store(false, Relaxed);
    }
    report("compare-and-swap of a port", start, times, 0);
    end.store(true, Relaxed);
    load.join().unwrap();
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: cf ADDRESS:PORT smoke|bench [MIB]|own [N]|fill N|port [N]";
    let address = args.first().ok_or(usage)?.parse()?;
    let unique = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH)?.as_nanos() as u64;
    if args.get(1).is_some_and(|a| a == "own") {
        let n = args.get(2).map_or(Ok(100), |n| n.parse())?;
        ownership(address, "compare-and-swap", n, Duration::from_millis(10));
        return Ok(());
    }
    if args.get(1).is_some_and(|a| a == "fill") {
        fill(address, args.get(2).ok_or(usage)?.parse()?);
        return Ok(());
    }
    if args.get(1).is_some_and(|a| a == "port") {
        ports(address, unique, args.get(2).map_or(Ok(50), |n| n.parse())?);
        return Ok(());
    }
    let name = format!("cf-{unique:x}");
    let mut client = Client::new(address, 0xcf, unique);
    let root = client.root("vol0");
    match args.get(1).map(String::as_str) {
        Some("smoke") => smoke(&mut client, root, &name),
        Some("bench") => {
            let mib = args.get(2).map_or(Ok(256), |m| m.parse())?;
            ownership(address, "compare-and-swap with connection", 100, Duration::ZERO);
            let other = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                ownership(address, "the same during what comes next", 100, Duration::ZERO);
            });
            bench(&mut client, root, &name, mib);
            other.join().map_err(|_| "ownership")?;
        }
        _ => return Err(usage.into()),
    }
    Ok(())
}
