use super::*;
use crate::virtio::net::FRAME_MAX;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A frame, with its header, that says who it is.
fn frame(to: [u8; 6], number: u32) -> Vec<u8> {
    let mut frame = vec![0; HEADER_SIZE];
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    frame.extend_from_slice(&number.to_le_bytes());
    frame
}

fn number(frame: &[u8]) -> u32 {
    u32::from_le_bytes(*frame.last_chunk().unwrap())
}

/// As `Net::announce` sends it, written down once more: a change of one is noticed.
fn rarp(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_SIZE];
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 22]);
    frame
}

#[test]
fn the_announcement_of_this_mac_and_no_other_frame_switches() {
    let mut switch = Switch::new(MAC);
    let mut broken = rarp(MAC);
    broken[HEADER_SIZE + 21] = 4; // an answer
    for other in [frame(MAC, 1), frame([0xff; 6], 2), rarp([2, 0, 0, 0, 0, 2]), broken, vec![], vec![0; FRAME_MAX]] {
        assert_eq!(switch.frame(&other), Kind::Forward);
    }
    assert_eq!(switch.frame(&rarp(MAC)[..HEADER_SIZE + 41]), Kind::Forward);
    // Bytes that pad the packet do not count.
    assert_eq!(switch.frame(&rarp(MAC)[..HEADER_SIZE + 42]), Kind::Announcement);
    assert_eq!(switch.frame(&rarp(MAC)), Kind::Skip, "it is repeated");
    assert_eq!(switch.frame(&frame(MAC, 3)), Kind::Forward, "a straggler");
    assert_eq!(switch.frame(&frame([0xff; 6], 4)), Kind::Skip, "has reached the destination by itself");
    assert_eq!(switch.frame(&[]), Kind::Skip);
}

#[test]
fn each_device_opens_once() {
    let t = Instant::now();
    let mut gate = Gate::new(2, t, true);
    assert!(gate.holds(0) && gate.holds(1) && !gate.holds(2));
    assert_eq!((gate.left(t), gate.result()), (Some(OPEN_MAX), None));
    assert!(!gate.switch(2, t) && !gate.switch(u32::MAX, t));
    assert!(gate.switch(1, t + OPEN_MAX / 3) && !gate.switch(1, t));
    assert_eq!(gate.overdue(t + OPEN_MAX / 2, false, true).len(), 0, "not yet");
    assert_eq!(gate.overdue(t + OPEN_MAX, false, false).len(), 0, "there may be SWITCHED in what has come");
    assert_eq!(gate.overdue(t + OPEN_MAX, false, true), [0]);
    assert_eq!(gate.overdue(t + OPEN_MAX, false, true).len(), 0);
    assert!(!gate.switch(0, t), "too late");
    assert_eq!(gate.result(), Some(Opened { switched: 1, late: 1, waited: OPEN_MAX }));
    assert_eq!(gate.left(t), None);
    // Nothing more comes when the connection has gone.
    assert_eq!(Gate::new(2, t, true).overdue(t, true, true), [0, 1]);
    assert_eq!(Gate::new(1, t, true).overdue(t + BUSY_MAX, false, false), [0]);
    // A source that does not say SWITCHED is not waited for.
    let mut gate = Gate::new(2, t, false);
    assert!(!gate.holds(0) && !gate.switch(0, t));
    assert_eq!((gate.left(t), gate.result(), gate.overdue(t, true, true).len()), (None, None, 0));
}

#[test]
fn a_forwarded_frame_stands_for_one() {
    let t = Instant::now();
    let mut gate = Gate::new(2, t, true);
    let (twice, other) = (frame([0xff; 6], 1), frame([0xff; 6], 2));
    let mut offloaded = twice.clone();
    offloaded[0] = 1;
    gate.forwarded(0, &twice);
    assert!(gate.is_new(1, &twice), "of another device");
    assert!(gate.is_new(0, &other));
    assert!(!gate.is_new(0, &offloaded), "the same frame, another header");
    assert!(gate.is_new(0, &twice), "it was sent twice");
    for n in 0..2 * SEEN_MAX as u32 {
        gate.forwarded(0, &frame(MAC, n));
    }
    assert_eq!(gate.seen.len(), SEEN_MAX);
}

/// What goes over a wire.
enum Packet {
    Frame(Vec<u8>),
    /// A frame, or SWITCHED, on the porting connection.
    Porting(Option<Vec<u8>>),
}

/// A bridge, and wires from it to the source, back, and to the destination. Each is first in, first out; which moves next
/// says `random`. The client sends its frames one after the other, and the announcement reaches the bridge before the one
/// with number `announced`. Gives what the guest gets.
fn deliver(mut random: impl FnMut(u32) -> u32, frames: u32, announced: u32, flood: bool) -> Vec<u32> {
    use std::collections::VecDeque;
    let start = Instant::now();
    let (mut to_source, mut from_source, mut to_destination) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
    let (mut switch, mut gate) = (Switch::new(MAC), Gate::new(1, start, true));
    let (mut held, mut delivered, mut next) = (VecDeque::<Vec<u8>>::new(), Vec::new(), 0);
    loop {
        let ready = [!to_source.is_empty(), !from_source.is_empty(), !to_destination.is_empty(), next < frames];
        let ready: Vec<usize> = (0..ready.len()).filter(|i| ready[*i]).collect();
        if ready.is_empty() {
            return delivered;
        }
        match ready[random(ready.len() as u32) as usize] {
            0 => {
                let frame: Vec<u8> = to_source.pop_front().unwrap();
                match switch.frame(&frame) {
                    Kind::Forward => from_source.push_back(Some(frame)),
                    Kind::Announcement => from_source.push_back(None),
                    Kind::Skip => {}
                }
            }
            1 => to_destination.push_back(Packet::Porting(from_source.pop_front().unwrap())),
            2 => match to_destination.pop_front().unwrap() {
                Packet::Frame(frame) => held.push_back(frame),
                Packet::Porting(Some(frame)) => {
                    gate.forwarded(0, &frame);
                    delivered.push(number(&frame));
                }
                Packet::Porting(None) => assert!(gate.switch(0, start)),
            },
            _ => {
                if next == announced {
                    to_source.push_back(rarp(MAC));
                }
                let broadcast = random(4) == 0;
                let frame = frame(if broadcast { [0xff; 6] } else { MAC }, next);
                // Before the announcement floods reach both, after it the guest's own frames only the destination.
                if broadcast || next < announced {
                    to_source.push_back(frame.clone());
                }
                if broadcast || flood || next >= announced {
                    to_destination.push_back(Packet::Frame(frame));
                }
                next += 1;
            }
        }
        if !gate.holds(0) {
            delivered.extend(held.drain(..).filter(|f| gate.is_new(0, f)).map(|f| number(&f)));
        }
    }
}

#[test]
fn every_frame_once_and_in_order_whatever_the_delays() {
    for seed in 1..2000u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let random = |below: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as u32 % below
        };
        let announced = (seed % 40) as u32;
        let delivered = deliver(random, 40, announced, seed % 2 == 0);
        assert_eq!(delivered, (0..40).collect::<Vec<_>>(), "seed {seed}");
    }
}
