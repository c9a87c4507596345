use super::*;
use crate::virtio::fake::FakeDevice;
use proptest::prelude::*;

fn rig(size: u16) -> (FakeDevice, Transport, Queue) {
    let device = FakeDevice::new(2, 0, Vec::new());
    let transport = device.transport();
    transport.negotiate(0).unwrap();
    let queue = transport.queue(0, size).unwrap();
    (device, transport, queue)
}

fn segments(count: usize) -> Vec<Segment> {
    // The fake device looks only where a test lets it.
    (0..count as u64).map(|i| Segment { address: 0x1000 * (i + 1), length: 100, device_writes: i > 0 }).collect()
}

fn add(queue: &mut Queue, count: usize) -> Option<u16> {
    // SAFETY: the fake device does not touch the memory of these tests' segments.
    unsafe { queue.add(&segments(count)) }
}

#[test]
fn sizes_are_powers_of_two_within_what_the_device_has() {
    for (asked, got) in [(1, 1), (3, 2), (200, 128), (256, 256), (1000, 256)] {
        assert_eq!(rig(asked).2.size(), got);
    }
}

#[test]
fn interrupts_are_never_asked_for() {
    let (device, ..) = rig(8);
    assert_eq!(device.available_flags(0), NO_INTERRUPT);
}

#[test]
fn what_is_added_is_what_the_device_sees() {
    let (device, _, mut queue) = rig(8);
    let head = add(&mut queue, 5).unwrap();
    let chain = device.take(0).unwrap();
    assert_eq!((chain.head, &chain.segments), (head, &segments(5)));
    assert!(add(&mut queue, 4).is_none(), "only 3 left");
    assert!(add(&mut queue, 0).is_none());
    device.give(0, u32::from(head), 400);
    assert_eq!(queue.pop(), Ok(Some((head, 400))));
    assert_eq!((queue.pop(), queue.free(), queue.in_flight()), (Ok(None), 8, 0));
}

#[test]
fn a_table_takes_one_descriptor() {
    let (device, _, mut queue) = rig(8);
    let mut table = Vec::new();
    // SAFETY: as in add; the table outlives its use.
    let head = unsafe { queue.add_indirect(&mut table, &segments(8)) }.unwrap();
    assert_eq!(queue.free(), 7);
    assert_eq!(device.take(0).unwrap().segments, segments(8));
    // SAFETY: as above.
    assert!(unsafe { queue.add_indirect(&mut Vec::new(), &segments(9)) }.is_none(), "longer than the queue");
    device.give(0, u32::from(head), 700);
    assert_eq!(queue.pop(), Ok(Some((head, 700))));
}

#[test]
fn doorbells_only_when_due_and_wanted() {
    let (device, transport, mut queue) = rig(8);
    let rung = |d: &FakeDevice| d.0.borrow().queues[0].doorbells;
    queue.kick(&transport);
    assert_eq!(rung(&device), 0);
    add(&mut queue, 1).unwrap();
    add(&mut queue, 1).unwrap();
    queue.kick(&transport);
    queue.kick(&transport);
    assert_eq!(rung(&device), 1);
    device.set_used_flags(0, NO_NOTIFY);
    add(&mut queue, 1).unwrap();
    queue.kick(&transport);
    assert_eq!(rung(&device), 1);
}

#[test]
fn a_device_that_lies_is_found_out() {
    let (device, _, mut queue) = rig(8);
    let head = add(&mut queue, 2).unwrap();
    for id in [u32::from(head) + 1, 7, 8, 0x1_0000 | u32::from(head), u32::MAX] {
        let (device, _, mut queue) = rig(8);
        assert_eq!(add(&mut queue, 2), Some(head));
        device.give(0, id, 0);
        assert_eq!(queue.pop(), Err(QueueError::NotInFlight(id)));
    }
    device.give(0, u32::from(head), 101);
    assert_eq!(queue.pop(), Err(QueueError::TooLong { written: 101, room: 100 }));

    let (device, _, mut queue) = rig(8);
    let head = add(&mut queue, 1).unwrap();
    device.give_hidden(0, u32::from(head), 0);
    device.show(0, 1);
    assert_eq!(queue.pop(), Err(QueueError::TooMany { returned: 2, held: 1 }));

    let (device, _, mut queue) = rig(8);
    let heads = [add(&mut queue, 1).unwrap(), add(&mut queue, 1).unwrap()];
    device.give(0, u32::from(heads[0]), 0);
    device.give(0, u32::from(heads[0]), 0);
    assert_eq!(queue.pop(), Ok(Some((heads[0], 0))));
    assert_eq!(queue.pop(), Err(QueueError::NotInFlight(u32::from(heads[0]))), "the same twice");
}

proptest! {
    /// Any order of additions and returns: chains come back as they went out, no descriptor is lost, past the wrap of
    /// the 16-bit indices.
    #[test]
    fn nothing_is_lost(steps in proptest::collection::vec((any::<bool>(), 1usize..6, any::<u16>()), 1..300), size in 1u16..7) {
        let (device, _, mut queue) = rig(1 << size);
        let mut held: Vec<(u16, usize)> = Vec::new();
        for (adding, count, choice) in steps {
            let in_use: usize = held.iter().map(|(_, n)| n).sum();
            if adding {
                let room = usize::from(queue.size()) - in_use;
                let head = add(&mut queue, count);
                prop_assert_eq!(head.is_some(), count <= room);
                if let Some(head) = head {
                    let chain = device.take(0).unwrap();
                    prop_assert_eq!((chain.head, chain.segments), (head, segments(count)));
                    prop_assert!(held.iter().all(|(h, _)| *h != head));
                    held.push((head, count));
                }
            } else if !held.is_empty() {
                let (head, count) = held.swap_remove(usize::from(choice) % held.len());
                let written = 100 * (count as u32 - 1);
                device.give(0, u32::from(head), written);
                prop_assert!(queue.has_used());
                prop_assert_eq!(queue.pop(), Ok(Some((head, written))));
            }
            let in_use: usize = held.iter().map(|(_, n)| n).sum();
            prop_assert_eq!(usize::from(queue.free()) + in_use, usize::from(queue.size()));
            prop_assert_eq!(usize::from(queue.in_flight()), held.len());
        }
    }
}

#[test]
fn indices_wrap() {
    let (device, _, mut queue) = rig(4);
    for i in 0..200_000u32 {
        let head = add(&mut queue, 1 + i as usize % 4).unwrap();
        device.take(0).unwrap();
        device.give(0, u32::from(head), 0);
        assert_eq!(queue.pop(), Ok(Some((head, 0))));
    }
    assert_eq!(queue.free(), 4);
}
