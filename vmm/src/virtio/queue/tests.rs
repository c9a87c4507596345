use super::*;
use crate::virtio::testing::{INDIRECT, NEXT, Random, WRITE, memory};
use vm_memory::Bytes;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 16;

fn queue(memory: &Memory) -> VirtQueue {
    let state = QueueState {
        max_size: SIZE,
        size: SIZE,
        ready: true,
        desc_table: DESC,
        avail_ring: AVAIL,
        used_ring: USED,
        next_avail: 0,
        next_used: 0,
        event_idx: false,
    };
    VirtQueue::restore(&state, SIZE, memory).unwrap()
}

fn put<const N: usize>(memory: &Memory, at: u64, bytes: [u8; N]) {
    memory.ram().write_slice(&bytes, GuestAddress(at)).unwrap();
}

fn desc(memory: &Memory, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
    let at = table + 16 * u64::from(index);
    put(memory, at, addr.to_le_bytes());
    put(memory, at + 8, len.to_le_bytes());
    put(memory, at + 12, flags.to_le_bytes());
    put(memory, at + 14, next.to_le_bytes());
}

fn offer(memory: &Memory, heads: &[u16]) {
    for (i, head) in heads.iter().enumerate() {
        put(memory, AVAIL + 4 + 2 * i as u64, head.to_le_bytes());
    }
    put(memory, AVAIL + 2, (heads.len() as u16).to_le_bytes());
}

#[test]
fn chains_are_taken_put_back_and_used() {
    let m = memory();
    let mut q = queue(&m);
    desc(&m, DESC, 0, 0x8000, 16, NEXT, 1);
    desc(&m, DESC, 1, 0x9000, 100, WRITE, 0);
    desc(&m, DESC, 2, 0xa000, 1, 0, 0);
    offer(&m, &[0, 2]);
    let first = q.pop(&m).unwrap().unwrap();
    assert_eq!((first.head, total(&first.readable), total(&first.writable)), (0, 16, 100));
    let second = q.pop(&m).unwrap().unwrap();
    assert_eq!(second.head, 2);
    assert!(q.pop(&m).unwrap().is_none());
    q.unpop(1);
    assert_eq!(q.pop(&m).unwrap().unwrap().head, 2);
    assert_eq!(q.take_used(&m), None);
    q.push(&m, 2, 7).unwrap();
    assert_eq!(q.take_used(&m), Some(true));
    assert_eq!(m.ram().read_obj::<u32>(GuestAddress(USED + 8)).unwrap(), 7);
    put(&m, AVAIL, 1u16.to_le_bytes()); // NO_INTERRUPT
    q.push(&m, 0, 0).unwrap();
    assert_eq!(q.take_used(&m), Some(false));
}

#[test]
fn what_is_posted_can_be_seen_and_stays() {
    let m = memory();
    let mut q = queue(&m);
    desc(&m, DESC, 0, 0x8000, 16, NEXT, 1);
    desc(&m, DESC, 1, 0x9000, 100, NEXT | WRITE, 3);
    desc(&m, DESC, 3, 0xb000, 10, WRITE, 0);
    desc(&m, DESC, 2, 0xa000, 200, WRITE, 0);
    offer(&m, &[0, 2]);
    let posted = |q: &mut VirtQueue, max| {
        let mut out = Vec::new();
        q.posted(&m, max, &mut out);
        out.iter().map(|r| (r.address().0, r.len())).collect::<Vec<_>>()
    };
    let (before, moves) = (q.save(), q.moves());
    assert_eq!(posted(&mut q, 10), [(0x9000, 100), (0xb000, 10), (0xa000, 200)]);
    assert_eq!(posted(&mut q, 1), [(0x9000, 100), (0xb000, 10)], "the bound ends it between chains");
    assert_eq!((q.save(), q.moves()), (before, moves));
    assert_eq!(q.pop(&m).unwrap().unwrap().head, 0);
    assert_eq!(posted(&mut q, 10), [(0xa000, 200)]);
    // What makes no sense ends it, and is found again by whoever serves the queue.
    desc(&m, DESC, 2, u64::MAX - 10, 200, WRITE, 0);
    assert_eq!(posted(&mut q, 10), []);
    assert!(q.pop(&m).is_err());
    put(&m, AVAIL + 2, 0x4000u16.to_le_bytes());
    assert_eq!(posted(&mut q, 10), []);
}

#[test]
fn a_driver_that_waits_is_interrupted_by_whoever_works_the_ring() {
    let m = memory();
    let mut q = queue(&m);
    let flags = || m.ram().read_obj::<u16>(GuestAddress(AVAIL)).unwrap();
    // It has asked for no interrupts: it will get them, and looks once more for what came before.
    put(&m, AVAIL, 1u16.to_le_bytes());
    q.awaited_elsewhere(&m).unwrap();
    assert_eq!((flags(), q.take_used(&m)), (0, Some(true)));
    // It gets them already: whoever works the ring has rung for whatever came.
    put(&m, USED + 2, 1u16.to_le_bytes());
    q.awaited_elsewhere(&m).unwrap();
    assert_eq!((flags(), q.take_used(&m)), (0, None));
    // One that asks for none each time looks once more only if there is something new.
    for (used, again) in [(1u16, Some(true)), (1, None), (2, Some(true)), (2, None)] {
        put(&m, AVAIL, 1u16.to_le_bytes());
        put(&m, USED + 2, used.to_le_bytes());
        q.awaited_elsewhere(&m).unwrap();
        assert_eq!((flags(), q.take_used(&m)), (0, again), "at {used}");
    }
}

#[test]
fn a_driver_that_waits_with_event_indices_is_interrupted_for_the_next_buffer() {
    let m = memory();
    let mut q = queue(&m);
    q.raw().set_event_idx(true);
    let event = || m.ram().read_obj::<u16>(GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE))).unwrap();
    put(&m, USED + 2, 3u16.to_le_bytes());
    q.awaited_elsewhere(&m).unwrap();
    assert_eq!((event(), q.take_used(&m)), (3, Some(true)));
    q.awaited_elsewhere(&m).unwrap();
    assert_eq!((event(), q.take_used(&m)), (3, None));
    // The flags mean nothing then.
    put(&m, AVAIL, 1u16.to_le_bytes());
    q.awaited_elsewhere(&m).unwrap();
    assert_eq!(q.take_used(&m), None);
    assert_eq!(m.ram().read_obj::<u16>(GuestAddress(AVAIL)).unwrap(), 1);
}

#[test]
fn hostile_queues_are_errors() {
    let end = memory().size() as u64;
    type Make = fn(&Memory, u64);
    let cases: [(&str, Make); 8] = [
        ("buffer beyond memory", |m, end| {
            desc(m, DESC, 0, end, 1, 0, 0);
            offer(m, &[0]);
        }),
        ("buffer across the end", |m, end| {
            desc(m, DESC, 0, end - 1, 2, WRITE, 0);
            offer(m, &[0]);
        }),
        ("buffer that wraps", |m, _| {
            desc(m, DESC, 0, u64::MAX, u32::MAX, 0, 0);
            offer(m, &[0]);
        }),
        ("head beyond the queue", |m, _| offer(m, &[SIZE])),
        ("available index beyond the queue", |m, _| put(m, AVAIL + 2, (SIZE + 1).to_le_bytes())),
        ("indirect table outside memory", |m, end| {
            desc(m, DESC, 0, end, 32, INDIRECT, 0);
            offer(m, &[0]);
        }),
        ("indirect table of an odd size", |m, _| {
            desc(m, DESC, 0, 0x8000, 17, INDIRECT, 0);
            offer(m, &[0]);
        }),
        ("nothing but an empty indirect table", |m, _| {
            desc(m, DESC, 0, 0x8000, 0, INDIRECT, 0);
            offer(m, &[0]);
        }),
    ];
    for (what, make) in cases {
        let m = memory();
        let mut q = queue(&m);
        make(&m, end);
        assert!(q.pop(&m).is_err(), "{what}");
    }
}

#[test]
fn loops_end() {
    let m = memory();
    let mut q = queue(&m);
    desc(&m, DESC, 0, 0x8000, 1, NEXT, 0);
    offer(&m, &[0]);
    let chain = q.pop(&m).unwrap().unwrap();
    assert!(chain.readable.len() <= usize::from(SIZE) + 1);
    // an indirect table as long as memory allows, each entry pointing to itself
    let m = memory();
    let mut q = queue(&m);
    for i in 0..4096 {
        desc(&m, 0x10_0000, i, 0x8000, 1, NEXT, i);
    }
    desc(&m, DESC, 0, 0x10_0000, 16 * 4096, INDIRECT, 0);
    offer(&m, &[0]);
    match q.pop(&m) {
        Ok(Some(chain)) => assert!(chain.readable.len() <= CHAIN_MAX),
        Ok(None) => panic!("no chain"),
        Err(_) => {}
    }
}

#[test]
fn saved_queues_are_checked_when_restored() {
    let m = memory();
    let good = queue(&m).save();
    assert_eq!(VirtQueue::restore(&good, SIZE, &m).unwrap().save(), good);
    for bad in [
        QueueState { max_size: 32, ..good },
        QueueState { size: 17, ..good },
        QueueState { size: 64, ..good },
        QueueState { desc_table: 0x1001, ..good },
        QueueState { desc_table: m.size() as u64, ..good },
        QueueState { used_ring: u64::MAX - 3, ..good },
    ] {
        assert!(VirtQueue::restore(&bad, SIZE, &m).is_err(), "{bad:?}");
    }
}

#[test]
fn random_rings_never_panic() {
    let mut random = Random(0x5eed);
    for _ in 0..300 {
        let m = memory();
        let mut q = queue(&m);
        for _ in 0..64 {
            // mostly small numbers, so that some of it makes sense
            let narrow = if random.next().is_multiple_of(3) { u64::MAX } else { 0x1f_ffff };
            desc(
                &m,
                DESC,
                (random.next() % 16) as u16,
                random.next() & narrow,
                (random.next() & narrow) as u32,
                (random.next() % 8) as u16,
                (random.next() % 18) as u16,
            );
        }
        for i in 0..16 {
            put(&m, AVAIL + 4 + 2 * i, ((random.next() % 17) as u16).to_le_bytes());
        }
        put(&m, AVAIL + 2, ((random.next() % 18) as u16).to_le_bytes());
        for _ in 0..20 {
            match q.pop(&m) {
                Ok(Some(mut chain)) => {
                    assert!(chain.readable.len() <= CHAIN_MAX && chain.writable.len() <= CHAIN_MAX);
                    let mut b = [0; 24];
                    read_front(&m, &mut chain.readable, &mut b);
                    write_at(&m, &chain.writable, random.next() & 0xff, &b);
                    q.push(&m, chain.head, 0).unwrap();
                }
                Ok(None) => break,
                Err(_) => break,
            }
        }
    }
}

#[test]
fn pieces_are_read_and_written_across_their_edges() {
    let m = memory();
    let piece = |at, len| m.range(GuestAddress(at), len).unwrap();
    let pieces = [piece(0x100, 3), piece(0x200, 0), piece(0x300, 4)];
    assert!(write_at(&m, &pieces, 1, b"abcdef"));
    assert!(!write_at(&m, &pieces, 2, b"abcdef"));
    let mut rest = pieces.to_vec();
    let mut b = [0; 4];
    assert!(write_at(&m, &pieces, 0, b"1234567"));
    assert!(read_front(&m, &mut rest, &mut b));
    assert_eq!((&b, total(&rest)), (b"1234", 3));
    assert!(!read_front(&m, &mut rest, &mut b));
}

fn half(memory: &Memory, at: u64) -> u16 {
    memory.ram().read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn a_driver_need_not_ring_while_it_is_polled() {
    let m = memory();
    let mut q = queue(&m);
    q.set_polled(true);
    assert!(!q.arm(&m).unwrap());
    assert_eq!((half(&m, USED), q.is_muted()), (1, true));
    // What comes before the driver can see that it has to ring again is told of.
    desc(&m, DESC, 0, 0x8000, 16, 0, 0);
    offer(&m, &[0]);
    q.set_polled(false);
    assert!(q.arm(&m).unwrap());
    assert_eq!((half(&m, USED), q.is_muted()), (0, false));
    let moves = q.moves();
    q.pop(&m).unwrap().unwrap();
    assert_eq!(q.moves(), moves + 1);
    q.unpop(1);
    assert_eq!(q.moves(), moves);
    q.pop(&m).unwrap().unwrap();
    assert!(!q.arm(&m).unwrap());
    q.set_polled(true);
    assert!(!q.arm(&m).unwrap());
    q.unmute(&m);
    assert_eq!((half(&m, USED), q.is_muted()), (0, false));
}

#[test]
fn a_queue_that_rests_is_not_rung_until_the_device_has_run_out() {
    let m = memory();
    let mut q = queue(&m);
    q.rest(&m).unwrap();
    assert_eq!((half(&m, USED), q.is_muted()), (1, false));
    assert!(!q.arm(&m).unwrap());
    assert_eq!(half(&m, USED), 0);
    // The end of polling does not end the rest, and its beginning does.
    q.rest(&m).unwrap();
    q.unmute(&m);
    assert_eq!(half(&m, USED), 1);
    q.set_polled(true);
    assert!(!q.arm(&m).unwrap());
    assert_eq!((half(&m, USED), q.is_muted()), (1, true));
    q.unmute(&m);
    assert_eq!(half(&m, USED), 0);
    // A rest that begins while the queue is polled lasts when that ends.
    assert!(!q.arm(&m).unwrap());
    q.rest(&m).unwrap();
    q.unmute(&m);
    assert_eq!(half(&m, USED), 1);
    // What came meanwhile is told of.
    desc(&m, DESC, 0, 0x8000, 16, 0, 0);
    offer(&m, &[0]);
    q.set_polled(false);
    assert!(q.arm(&m).unwrap());
    assert_eq!(half(&m, USED), 0);
}

#[test]
fn what_the_driver_was_told_before_a_port_does_not_hold_after_it() {
    let m = memory();
    let mut q = queue(&m);
    q.rest(&m).unwrap();
    let mut q = VirtQueue::restore(&q.save(), SIZE, &m).unwrap();
    assert_eq!(half(&m, USED), 1);
    assert!(!q.arm(&m).unwrap());
    assert_eq!(half(&m, USED), 0);
    // Nor what the kernel or another process has told it.
    q.rest(&m).unwrap();
    q.moved_elsewhere(&m, 0).unwrap();
    assert!(!q.arm(&m).unwrap());
    assert_eq!(half(&m, USED), 0);
}

#[test]
fn with_event_indices_a_polled_driver_is_not_asked_to_ring() {
    const AVAIL_EVENT: u64 = USED + 4 + 8 * SIZE as u64;
    let m = memory();
    let mut q = queue(&m);
    q.raw().set_event_idx(true);
    desc(&m, DESC, 0, 0x8000, 16, 0, 0);
    offer(&m, &[0]);
    q.pop(&m).unwrap().unwrap();
    q.set_polled(true);
    assert!(!q.arm(&m).unwrap());
    assert_eq!(half(&m, AVAIL_EVENT), 0);
    offer(&m, &[0, 0]);
    q.set_polled(false);
    assert!(q.arm(&m).unwrap());
    assert_eq!(half(&m, AVAIL_EVENT), 1);
    q.pop(&m).unwrap().unwrap();
    assert!(!q.arm(&m).unwrap());
    assert_eq!(half(&m, AVAIL_EVENT), 2);
}
