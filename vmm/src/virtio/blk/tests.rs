//! A disk against files and devices of the host, by a driver that may be a bad one.

mod formats;
mod handover;
mod reset;
mod space;

use super::*;
use crate::virtio::testing::{Bench, DATA, Random, STATUS_NEEDS_RESET, WRITE};
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn disk(path: &Path, readonly: bool) -> DiskConfig {
    DiskConfig { id: "disk7".into(), path: path.into(), readonly, ..Default::default() }
}

fn image(dir: &tempfile::TempDir, len: usize) -> PathBuf {
    let path = dir.path().join("image");
    std::fs::write(&path, (0..len).map(|i| (i / 512) as u8 ^ i as u8).collect::<Vec<_>>()).unwrap();
    path
}

struct Disk(Bench);

/// Features a modern driver would take.
const ALL: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

impl Disk {
    fn new(path: &Path, readonly: bool) -> Disk {
        let mut bench = Bench::new(Box::new(Blk::open(&disk(path, readonly)).unwrap()));
        bench.start(0, 1);
        Disk(bench)
    }

    fn with(config: &DiskConfig, features: u64, queues: u64) -> Disk {
        let mut bench = Bench::new(Box::new(Blk::open(config).unwrap()));
        bench.start(features, queues);
        Disk(bench)
    }

    /// Discard (11) or write zeroes (13).
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.0.write(HEADER, &[&kind.to_le_bytes()[..], &[0; 12]].concat());
        let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.0.write(HEADER + 0x40, &range);
        self.0.write(STATUS, &[0xee]);
        self.0.chain(0, &[(HEADER, 16, 0), (HEADER + 0x40, 16, 0), (STATUS, 1, WRITE)]);
        self.0.wait_used(0);
        self.0.read(STATUS, 1)[0]
    }

    fn blk(&mut self) -> &mut Blk {
        self.0.transport.device_mut().as_blk().unwrap()
    }

    fn metrics(&self) -> String {
        let mut out = Exposition::default();
        self.0.transport.device().metrics(&mut out);
        out.text()
    }

    /// One request with its data in `pieces`; returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, pieces: &[(u64, u32)]) -> (u8, u32) {
        self.0.write(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.0.write(STATUS, &[0xee]);
        let flags = if kind == 1 { 0 } else { WRITE };
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(pieces.iter().map(|(at, len)| (*at, *len, flags)));
        chain.push((STATUS, 1, WRITE));
        let head = self.0.chain(0, &chain);
        let used = self.0.wait_used(0);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, u32::from(head));
        (self.0.read(STATUS, 1)[0], used[0].1)
    }
}

struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Tmpfs {
        let dir = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn reads_writes_and_flushes() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 1 << 20);
    let before = std::fs::read(&path).unwrap();
    let mut d = Disk::new(&path, false);
    assert_eq!(d.0.reg(0x100), 2048);
    // several pieces, aligned
    assert_eq!(d.request(0, 8, &[(BUFFER, 4096), (BUFFER + 0x4000, 512)]), (0, 4609));
    assert_eq!(d.0.read(BUFFER, 4096), before[4096..8192]);
    assert_eq!(d.0.read(BUFFER + 0x4000, 512), before[8192..8704]);
    d.0.write(BUFFER, &[0xab; 1024]);
    assert_eq!(d.request(1, 100, &[(BUFFER, 1024)]), (0, 1));
    assert_eq!(d.request(4, 0, &[]), (0, 1));
    let after = std::fs::read(&path).unwrap();
    assert_eq!(after[51_200..52_224], [0xab; 1024]);
    assert_eq!(after[..51_200], before[..51_200]);
    assert_eq!(after[52_224..], before[52_224..]);
    // odd addresses and pieces go through a buffer where the image needs alignment
    assert_eq!(d.request(0, 100, &[(BUFFER + 3, 511), (BUFFER + 0x2001, 1)]), (0, 513));
    assert_eq!(d.0.read(BUFFER + 3, 511), [0xab; 511]);
    d.0.write(BUFFER + 1, &[0xcd; 512]);
    assert_eq!(d.request(1, 2047, &[(BUFFER + 1, 512)]), (0, 1));
    assert_eq!(std::fs::read(&path).unwrap()[(1 << 20) - 512..], [0xcd; 512]);
    assert_eq!(d.request(8, 0, &[(BUFFER, 20)]), (0, 21));
    assert_eq!(d.0.read(BUFFER, 20), b"disk7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(d.request(0, 0, &[]), (0, 1));
}

#[test]
fn impossible_requests_get_an_error_and_the_device_lives() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 64 << 10);
    let before = std::fs::read(&path).unwrap();
    let mut d = Disk::new(&path, false);
    for (what, kind, sector, len, status) in [
        ("beyond the end", 0, 128, 512, 1),
        ("across the end", 1, 127, 1024, 1),
        ("sector that overflows", 1, u64::MAX, 512, 1),
        ("not whole sectors", 0, 0, 511, 1),
        ("not whole sectors", 1, 0, 513, 1),
        ("unknown", 77, 0, 512, 2),
        ("a discard without a range", 11, 0, 16, 1),
    ] {
        assert_eq!(d.request(kind, sector, &[(BUFFER, len)]), (status, 1), "{what}");
    }
    assert_eq!(d.request(0, 127, &[(BUFFER, 512)]).0, 0);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn broken_chains_need_a_reset() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 64 << 10);
    for chain in [
        &[(HEADER, 16, 0)][..],                     // no status
        &[(HEADER, 16, 0), (STATUS, 0, WRITE)][..], // an empty one
    ] {
        let mut d = Disk::new(&path, false);
        d.0.chain(0, chain);
        d.0.transport.process();
        assert_ne!(d.0.status() & STATUS_NEEDS_RESET, 0);
        d.0.set(0x70, 0);
        assert_eq!(d.0.status(), 0);
    }
    // a header that is too short can be answered
    let mut d = Disk::new(&path, false);
    d.0.chain(0, &[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
    assert_eq!(d.0.wait_used(0), [(0, 1)]);
    assert_eq!(d.0.read(STATUS, 1), [1]);
}

#[test]
fn read_only_is_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 64 << 10);
    let before = std::fs::read(&path).unwrap();
    let mut d = Disk::new(&path, true);
    assert_eq!(d.0.reg(0x10) & F_RO as u32, F_RO as u32);
    assert_eq!(d.request(1, 0, &[(BUFFER, 512)]).0, 1);
    assert_eq!(d.request(0, 0, &[(BUFFER, 512)]).0, 0);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn one_writer_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 4096);
    let first = Blk::open(&disk(&path, false)).unwrap();
    for readonly in [false, true] {
        let e = Blk::open(&disk(&path, readonly)).err().unwrap().to_string();
        assert!(e.contains(path.to_str().unwrap()) && e.contains("in use"), "{e}");
    }
    drop(first);
    let _readers = (Blk::open(&disk(&path, true)).unwrap(), Blk::open(&disk(&path, true)).unwrap());
    assert!(Blk::open(&disk(&path, false)).is_err());
}

#[test]
fn host_errors_reach_the_guest_and_only_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 64 << 10);
    let mut d = Disk::new(&path, false);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(512).unwrap();
    assert_eq!(d.request(0, 8, &[(BUFFER, 4096)]), (1, 1));
    // a file that refuses writes from now on
    // SAFETY: the name is a C string; the descriptor is checked.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: just made, owned by nobody else.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(64 << 10).unwrap();
    let mut d = Disk::new(Path::new(&format!("/proc/self/fd/{fd}")), false);
    assert_eq!(d.request(1, 0, &[(BUFFER, 512)]).0, 0);
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
    assert_eq!(d.request(1, 0, &[(BUFFER, 512)]), (1, 1));
    assert_eq!(d.request(0, 0, &[(BUFFER, 512)]).0, 0);
    let mut out = crate::metrics::Exposition::default();
    d.0.transport.metrics(&mut out);
    let text = out.text();
    assert!(text.contains("vmm_blk_errors_total{device=\"disk7\"} 1"), "{text}");
}

#[test]
fn many_at_once_with_bounded_bounce_buffers() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 8 << 20);
    let before = std::fs::read(&path).unwrap();
    let mut d = Disk::new(&path, false);
    const LEN: u32 = 128 << 10;
    // 20 reads of 128 KiB to odd addresses: more than BOUNCE_MAX together
    let mut heads = Vec::new();
    for i in 0..20u64 {
        let header = HEADER + 0x10 * i;
        d.0.write(header, &[&0u32.to_le_bytes()[..], &[0; 4], &(i * 512).to_le_bytes()].concat());
        let at = DATA + 0x1_0001 + i * 0x2_0100;
        heads.push(d.0.chain(0, &[(header, 16, 0), (at, LEN, WRITE), (STATUS + i, 1, WRITE)]));
    }
    let mut used = Vec::new();
    while used.len() < 20 {
        used.extend(d.0.wait_used(0));
    }
    for i in 0..20u64 {
        assert_eq!(d.0.read(STATUS + i, 1), [0]);
        let offset = i as usize * 512 * 512;
        let at = DATA + 0x1_0001 + i * 0x2_0100;
        assert!(d.0.read(at, LEN as usize) == before[offset..offset + LEN as usize], "request {i}");
    }
}

#[test]
fn quiesce_leaves_nothing_in_flight_and_state_moves() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 1 << 20);
    let mut d = Disk::new(&path, false);
    for i in 0..30u64 {
        let header = HEADER + 0x10 * i;
        d.0.write(header, &[&0u32.to_le_bytes()[..], &[0; 4], &i.to_le_bytes()].concat());
        d.0.chain(0, &[(header, 16, 0), (BUFFER + 512 * i, 512, WRITE), (STATUS + 0x200 + i, 1, WRITE)]);
    }
    d.0.transport.quiesce();
    assert_eq!(d.0.used(0).len(), 30);
    let state = d.0.transport.save();
    // nothing more is served until resumed
    d.0.chain(0, &[(HEADER, 16, 0), (BUFFER, 512, WRITE), (STATUS, 1, WRITE)]);
    d.0.transport.process();
    assert!(d.0.used(0).is_empty());
    let memory = d.0.memory.clone();
    drop(d);
    let mut there = Bench::with_memory(Box::new(Blk::open(&disk(&path, false)).unwrap()), memory);
    there.transport.restore(&state).unwrap();
    assert_eq!(there.transport.save(), state);
    there.transport.resume();
    while u16::from_le_bytes(there.read(crate::virtio::testing::rings(0) + 0x2002, 2).try_into().unwrap()) != 31 {
        for _ in there.events.io.wait(None).iter() {
            there.transport.event();
        }
    }
}

#[test]
fn random_requests_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 64 << 10);
    let mut random = Random(7);
    for _ in 0..200 {
        let mut d = Disk::new(&path, random.next().is_multiple_of(2));
        for _ in 0..8 {
            d.0.write(HEADER, &random.next().to_le_bytes());
            d.0.write(HEADER, &((random.next() % 12) as u32).to_le_bytes());
            d.0.write(HEADER + 8, &(random.next() % 140).to_le_bytes());
            let n = random.next() % 6;
            let chain: Vec<_> = (0..=n)
                .map(|_| {
                    let len = [0, 1, 15, 16, 512, 4096][(random.next() % 6) as usize];
                    (HEADER + random.next() % 3 * 0x400, len, (random.next() % 2) as u16 * WRITE)
                })
                .collect();
            d.0.chain(0, &chain);
            d.0.transport.process();
        }
        d.0.transport.quiesce();
        d.0.set(0x70, 0);
    }
}

#[test]
fn a_disk_grows_and_the_driver_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 1 << 20);
    let mut d = Disk::with(&disk(&path, false), ALL, 1);
    let (generation, interrupts) = (d.0.reg(0xfc), d.0.reg(0x60));
    assert_eq!(interrupts & 2, 0);
    assert_eq!(d.blk().resize(Some(3 << 20)).unwrap(), 3 << 20);
    d.0.transport.process();
    assert_eq!((d.0.reg(0x100), d.0.reg(0x60) & 2), (6144, 2));
    assert_ne!(d.0.reg(0xfc), generation);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 << 20);
    assert_eq!(d.request(1, 6143, &[(BUFFER, 512)]).0, 0);
    // grown by somebody else
    std::fs::File::options().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
    assert_eq!(d.request(0, 6144, &[(BUFFER, 512)]).0, 1);
    assert_eq!(d.blk().resize(None).unwrap(), 4 << 20);
    assert_eq!(d.request(0, 6144, &[(BUFFER, 512)]).0, 0);
    for wrong in [1 << 20, (4 << 20) + 1] {
        assert!(d.blk().resize(Some(wrong)).is_err());
    }
    assert_eq!(d.blk().size(), 4 << 20);
}

#[test]
fn several_queues_share_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 1 << 20);
    let before = std::fs::read(&path).unwrap();
    let config = DiskConfig { queues: 4, serial: Some("number-7".into()), ..disk(&path, false) };
    let mut d = Disk::with(&config, ALL | F_MQ, 4);
    assert_eq!(d.0.reg(0x100 + 32) >> 16, 4);
    for round in 0..40u64 {
        for queue in 0..4 {
            let header = HEADER + 0x10 * (4 + queue);
            d.0.write(header, &[&0u32.to_le_bytes()[..], &[0; 4], &(round * 4 + queue).to_le_bytes()].concat());
            let at = BUFFER + 512 * (round * 4 + queue);
            d.0.chain(queue, &[(header, 16, 0), (at, 512, WRITE), (STATUS + queue, 1, WRITE)]);
        }
        for queue in 0..4 {
            assert_eq!(d.0.wait_used(queue).len(), 1);
        }
    }
    assert_eq!(d.0.read(BUFFER, 160 * 512), before[..160 * 512]);
    assert_eq!(d.request(8, 0, &[(BUFFER, 20)]), (0, 21));
    assert_eq!(d.0.read(BUFFER, 9), b"number-7\0");
}

#[test]
fn limits_hold_and_change_while_running() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, 1 << 20);
    let rate = |rate, burst| Some(crate::limit::Rate { rate, burst: Some(burst) });
    let limits = Limits { ops: rate(100, 10), bytes: None };
    let mut d = Disk::with(&DiskConfig { limits, ..disk(&path, false) }, ALL, 1);
    let start = std::time::Instant::now();
    for _ in 0..30 {
        assert_eq!(d.request(0, 0, &[(BUFFER, 512)]).0, 0);
    }
    // 10 at once, 20 at 100 a second
    assert!(start.elapsed() >= std::time::Duration::from_millis(199), "{:?}", start.elapsed());
    assert!(!d.metrics().contains("vmm_blk_throttled_total{device=\"disk7\"} 0"));
    // bytes, from now on: what is moved counts, flushes do not
    d.blk().set_limits(Limits { ops: None, bytes: rate(1 << 20, 64 << 10) }).unwrap();
    let start = std::time::Instant::now();
    for _ in 0..4 {
        assert_eq!(d.request(0, 0, &[(BUFFER, 64 << 10)]).0, 0);
        assert_eq!(d.request(4, 0, &[]).0, 0);
    }
    assert!(start.elapsed() >= std::time::Duration::from_millis(187), "{:?}", start.elapsed());
    let wrong = Limits { ops: rate(0, 1), bytes: None };
    assert!(d.blk().set_limits(wrong).unwrap_err().to_string().contains("limits.ops.rate"));
    // held back, the state is taken; it goes on elsewhere with what is left
    d.blk().set_limits(Limits { ops: rate(1, 1), bytes: None }).unwrap();
    assert_eq!(d.request(0, 0, &[(BUFFER, 512)]).0, 0);
    d.0.chain(0, &[(HEADER, 16, 0), (BUFFER, 512, WRITE), (STATUS, 1, WRITE)]);
    d.0.transport.process();
    assert!(d.0.used(0).is_empty());
    d.0.transport.quiesce();
    let state = d.0.transport.save();
    let DeviceState::Blk(blk) = &state.device else { panic!() };
    assert_eq!((blk.limiter.limits.ops.unwrap().rate, blk.limiter.levels[0]), (1, 0));
    let memory = d.0.memory.clone();
    drop(d);
    let mut there = Bench::with_memory(Box::new(Blk::open(&disk(&path, false)).unwrap()), memory);
    there.transport.restore(&state).unwrap();
    assert_eq!(there.transport.device_mut().as_blk().unwrap().limits().ops, rate(1, 1));
    there.transport.resume();
    there.transport.device_mut().as_blk().unwrap().set_limits(Limits::default()).unwrap();
    there.transport.process();
    while there.read(STATUS, 1) == [0xee] {
        for _ in there.events.io.wait(None).iter() {
            there.transport.event();
        }
    }
}
