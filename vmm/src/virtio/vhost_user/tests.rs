//! The front end against Debian's `qemu-storage-daemon`, whose disk is slow, so that there is always something in flight.

#[path = "../../../tests/guest/storage_daemon.rs"]
mod storage_daemon;

use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use self::storage_daemon::StorageDaemon;
use super::blk::VhostUserBlk;
use super::rings::Ring;
use crate::config::DiskConfig;
use crate::memory::{HUGE_PAGE, Memory};
use crate::metrics::Exposition;
use crate::virtio::queue::{QueueState, VirtQueue};
use crate::virtio::testing::{Bench, DATA, WRITE, rings};

const HEADERS: u64 = DATA;
const STATUSES: u64 = DATA + 0x1000;
const BUFFERS: u64 = DATA + 0x2000;
const BLOCK: u64 = 4096;
/// Requests that are begun before a reset, and how many of them a second the back end serves.
const REQUESTS: u64 = 24;
const SLOW: u64 = 40;
/// What memory is filled with when nobody may write to it any more.
const POISON: u8 = 0x5a;
const STATUS: u64 = 0x70;

fn daemon(dir: &Path) -> StorageDaemon {
    let image = dir.join("image");
    let content: Vec<u8> = (0..(REQUESTS + 1) * BLOCK).map(|i| (i / BLOCK) as u8 | 0x80).collect();
    std::fs::write(&image, content).unwrap();
    StorageDaemon::slow(&dir.join("socket"), image.to_str().unwrap(), SLOW)
}

/// Doorbells and interrupts it has, and whatever else it uses event descriptors for.
fn event_descriptors(daemon: &StorageDaemon) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().contains("[eventfd]"))
        .count()
}

fn signal(daemon: &StorageDaemon, signal: i32) {
    // SAFETY: no memory is involved; the process is our child and has not been waited for.
    unsafe { libc::kill(daemon.pid() as i32, signal) };
}

struct Disk(Bench);

impl Disk {
    fn new(daemon: &StorageDaemon) -> Disk {
        let config = DiskConfig { id: "far".into(), vhost_user: Some(daemon.socket.clone()), ..Default::default() };
        let memory = Memory::with_sharing(2 * HUGE_PAGE, true).unwrap();
        Disk(Bench::with_memory(Box::new(VhostUserBlk::open(&config).unwrap()), memory))
    }

    /// Asks for one block of the disk, into the buffer with the same number.
    fn ask(&mut self, block: u64) {
        let header = HEADERS + 16 * block;
        let sector = block * BLOCK / 512;
        self.0.write(header, &[&[0; 8][..], &sector.to_le_bytes()].concat());
        let buffer = (BUFFERS + block * BLOCK, BLOCK as u32, WRITE);
        self.0.chain(0, &[(header, 16, 0), buffer, (STATUSES + block, 1, WRITE)]);
    }

    fn buffer(&self, block: u64) -> Vec<u8> {
        self.0.read(BUFFERS + block * BLOCK, BLOCK as usize)
    }

    /// Reads the block no other request is about.
    fn read_last(&mut self) {
        self.ask(REQUESTS);
        assert_eq!(self.0.wait_used(0), [(0, BLOCK as u32 + 1)]);
        assert!(self.buffer(REQUESTS).iter().all(|b| *b == REQUESTS as u8 | 0x80));
    }

    /// Begins many reads; the back end has taken all of them and answered few when this returns.
    fn begin_many(&mut self) {
        (0..REQUESTS).for_each(|block| self.ask(block));
        let answered = self.0.wait_used(0).len() as u64;
        assert!(answered < REQUESTS, "the back end is not slow");
    }

    fn says(&self, metric: &str) -> bool {
        let mut out = Exposition::default();
        self.0.transport.metrics(&mut out);
        out.text().contains(metric)
    }

    fn connected(&self) -> bool {
        self.says("vmm_vhost_user_connected{device=\"far\"} 1")
    }

    fn lost(&self, times: u64) -> bool {
        self.says(&format!("vmm_vhost_user_lost_total{{device=\"far\"}} {times}"))
    }
}

/// As the driver does it, and as a reset of the whole VM does.
const RESETS: [fn(&mut Bench); 2] = [|bench| bench.set(STATUS, 0), |bench| bench.transport.power_on()];

#[test]
fn after_a_reset_the_back_end_writes_nothing_any_more_and_serves_the_next_driver() {
    for reset in RESETS {
        let dir = tempfile::tempdir().unwrap();
        let far = daemon(dir.path());
        let mut disk = Disk::new(&far);
        disk.0.start(0, 1);
        disk.begin_many();
        reset(&mut disk.0);
        assert_eq!(disk.0.status(), 0);
        // Memory has another use now.
        let len = (REQUESTS * BLOCK) as usize;
        disk.0.write(BUFFERS, &vec![POISON; len]);
        disk.0.write(STATUSES, &[POISON; REQUESTS as usize]);
        disk.0.restart(0, 1);
        // Served in their order: when this is answered nothing of what was before is left.
        disk.read_last();
        for block in 0..REQUESTS {
            assert!(disk.buffer(block).iter().all(|b| *b == POISON), "the buffer of request {block} was written to");
        }
        assert!(disk.0.read(STATUSES, REQUESTS as usize).iter().all(|b| *b == POISON));
        assert!(disk.connected() && disk.lost(0), "over the same connection");
    }
}

#[test]
fn a_back_end_keeps_no_descriptors_of_a_driver_that_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let far = daemon(dir.path());
    let mut disk = Disk::new(&far);
    let idle = event_descriptors(&far);
    disk.0.start(0, 1);
    disk.read_last();
    assert!(event_descriptors(&far) > idle, "it has a doorbell and an interrupt");
    for reset in RESETS.iter().cycle().take(10) {
        reset(&mut disk.0);
        assert_eq!(event_descriptors(&far), idle);
        disk.0.restart(0, 1);
        disk.read_last();
    }
}

#[test]
fn a_back_end_that_went_and_came_again_while_no_driver_used_it_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let far = daemon(dir.path());
    let mut disk = Disk::new(&far);
    disk.0.start(0, 1);
    disk.read_last();
    disk.0.set(STATUS, 0);
    drop(far);
    while disk.connected() {
        std::thread::yield_now();
    }
    disk.0.transport.event();
    let _far = daemon(dir.path());
    disk.0.restart(0, 1);
    disk.read_last();
    assert!(disk.connected() && disk.lost(0), "no driver has lost anything");
}

#[test]
fn a_back_end_that_does_not_let_go_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let far = daemon(dir.path());
    let mut disk = Disk::new(&far);
    disk.0.start(0, 1);
    disk.read_last();
    signal(&far, libc::SIGSTOP);
    disk.0.set(STATUS, 0);
    assert_eq!(disk.0.status(), 0);
    assert!(!disk.connected() && disk.lost(1));
    signal(&far, libc::SIGCONT);
    disk.0.restart(0, 1);
    disk.read_last();
    assert!(disk.connected());
}

#[test]
fn only_indices_that_make_sense_are_waited_for() {
    let memory = Memory::new(2 * HUGE_PAGE).unwrap();
    let state = QueueState {
        size: 128,
        avail_ring: rings(0) + 0x1000,
        used_ring: rings(0) + 0x2000,
        ..VirtQueue::new(128).unwrap().save()
    };
    let ring = Ring::of(0, &state);
    for (available, used, waits) in [
        (0u16, 0u16, false),
        (1, 0, true),
        (128, 0, true),
        (129, 0, false),
        (0, 1, false),
        (3, u16::MAX - 2, true),
        (0xffff, 0x1234, false),
    ] {
        memory.ram().write_obj(available.to_le(), GuestAddress(state.avail_ring + 2)).unwrap();
        memory.ram().write_obj(used.to_le(), GuestAddress(state.used_ring + 2)).unwrap();
        assert_eq!(ring.has_work(&memory), waits, "{available} available, {used} used");
        assert!(ring.is_settled(used, &memory) && !ring.is_settled(used.wrapping_add(1), &memory));
    }
}
