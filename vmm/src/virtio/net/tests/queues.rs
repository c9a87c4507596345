//! Several queue pairs, the control queue, and a tap that vanishes.
use super::*;
use crate::virtio::net::control::TABLE_MAX;

const COMMANDS: u64 = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | GUEST_ANNOUNCE | STATUS | MAC;
/// Where commands and their answers lie.
const COMMAND: u64 = DATA + 0x8_0000;

impl Wire {
    /// Sends a command; its answer.
    fn command(&mut self, queue: u64, bytes: &[u8]) -> u8 {
        self.bench.write(COMMAND, bytes);
        self.bench.write(COMMAND + 0x4000, &[0xee]);
        self.bench.chain(queue, &[(COMMAND, bytes.len() as u32, 0), (COMMAND + 0x4000, 1, WRITE)]);
        self.bench.transport.process();
        assert_eq!(self.bench.used(queue).len(), 1);
        self.bench.read(COMMAND + 0x4000, 1)[0]
    }

    /// Receive buffers of a pair: 2 KiB each at `DATA + pair × 0x2_0000 + i × 0x1000`.
    fn offer_to(&mut self, pair: u64, count: u64) {
        for i in 0..count {
            self.bench.chain(2 * pair, &[(DATA + pair * 0x2_0000 + i * 0x1000, 2048, WRITE)]);
        }
    }

    fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.bench.transport.read(0x100 + offset, &mut bytes);
        bytes
    }
}

/// An IPv4 UDP frame of a flow of its own.
fn flow(n: u8) -> Vec<u8> {
    let mut f = frame(n, 60);
    f[12..14].copy_from_slice(&[8, 0]);
    f[14..34].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, n, 10, 0, 0, 1]);
    f[34..42].copy_from_slice(&[n, n, 0, 9, 0, 26, 0, 0]);
    f
}

#[test]
fn flows_spread_over_queue_pairs_and_back() {
    let mut w = Wire::with_queues(MRG_RXBUF | MQ | COMMANDS, 4);
    assert_eq!(w.config(8, 2), [4, 0]);
    for pair in 0..4 {
        w.offer_to(pair, 30);
    }
    // before the driver asks for more there is one pair
    (0..20).for_each(|n| w.send(&flow(n)));
    w.serve();
    assert_eq!(w.bench.used(0).len(), 20);
    // Any pair has room for more than its share: the tap's hash is seeded anew each time.
    w.offer_to(0, 20);
    assert_eq!(w.command(8, &[4, 0, 4, 0]), 0);
    assert_eq!(w.net().active, 4);
    let sent: Vec<_> = (20..60).map(flow).collect();
    sent.iter().for_each(|f| w.send(f));
    w.serve();
    let got: Vec<usize> = (0..4).map(|p| w.bench.used(2 * p).len()).collect();
    assert_eq!(got.iter().sum::<usize>(), 40);
    assert!(got.iter().filter(|n| **n > 0).count() >= 2, "{got:?}");
    // frames that wait in queues given up are not lost
    w.bench.transport.stop_input();
    (60..80).for_each(|n| w.send(&flow(n)));
    assert_eq!(w.command(8, &[4, 0, 1, 0]), 0);
    (0..4).for_each(|pair| w.offer_to(pair, 30));
    w.bench.transport.resume();
    assert_eq!(w.bench.used(0).len(), 20);
    assert!((1..4).all(|p| w.bench.used(2 * p).is_empty()));
    // each pair sends
    assert_eq!(w.command(8, &[4, 0, 3, 0]), 0);
    w.bench.write(DATA + 0xa_0000, &[vec![0; 12], frame(3, 200)].concat());
    for queue in [1, 3, 5, 7] {
        w.bench.chain(queue, &[(DATA + 0xa_0000, 212, 0)]);
    }
    w.bench.transport.process();
    assert_eq!([1, 3, 5, 7].map(|q| w.bench.used(q).len()), [1, 1, 1, 0]);
    for _ in 0..3 {
        assert_eq!(w.receive_from(|f| f[12] == 0x88), frame(3, 200));
    }
    // numbers that cannot be
    for n in [0u8, 5, 255] {
        assert_eq!(w.command(8, &[4, 0, n, 0]), 1);
    }
    assert_eq!(w.net().active, 3);
}

#[test]
fn queue_pairs_move_with_the_vm_and_an_announcement_parts_all_queues() {
    let mut w = Wire::with_queues(MRG_RXBUF | MQ | COMMANDS, 3);
    assert_eq!(w.command(6, &[4, 0, 3, 0]), 0);
    w.bench.transport.stop_input();
    w.bench.transport.quiesce();
    let mut state = w.bench.transport.save();
    (0..30).for_each(|n| w.send(&flow(n)));
    let mac = w.net().mac.0;
    let announcement = crate::virtio::net::port::announcement(mac);
    w.send(&announcement[HEADER_SIZE..]);
    let mut taken = Vec::new();
    loop {
        // in pieces of any size
        let more = w.net().take_frames(7).unwrap();
        if more.is_empty() {
            break;
        }
        taken.extend(more);
    }
    assert_eq!(taken.len(), 31);
    assert!(is_announcement(&taken[30], mac), "all that came before it is before it");
    assert_eq!(w.net().tap_fds().count(), 3);
    w.bench.transport.restore(&state).unwrap();
    assert_eq!(w.net().active, 3);
    assert_eq!(w.bench.transport.save(), state);
    // and what cannot be is refused
    let good = state.clone();
    let break_it = |change: fn(&mut NetState)| {
        let mut bad = good.clone();
        let DeviceState::Net(net) = &mut bad.device else { panic!() };
        change(net);
        bad
    };
    for bad in [
        break_it(|n| n.active = 0),
        break_it(|n| n.active = 4),
        break_it(|n| n.mac = [1; 6]),
        break_it(|n| n.own_mac = [0; 6]),
        break_it(|n| n.offloads = GUEST_TSO4),
        break_it(|n| n.filter.unicast.addresses = vec![[2; 6]; TABLE_MAX + 1]),
        break_it(|n| n.pending = vec![vec![0; 11]]),
        break_it(|n| n.pending = vec![vec![0; 60]; PENDING_MAX + 1]),
    ] {
        assert!(w.bench.transport.restore(&bad).is_err());
    }
    state.driver_features &= !MQ;
    assert!(w.bench.transport.restore(&state).is_err(), "three pairs without the feature");
}

#[test]
fn without_the_feature_the_control_queue_is_the_third() {
    let mut w = Wire::with_queues(COMMANDS, 4);
    assert_eq!(w.command(2, &[0, 0, 0]), 0);
    assert_eq!(w.command(2, &[4, 0, 2, 0]), 1, "there is no command for queue pairs");
}

#[test]
fn the_tap_filters_what_the_guest_does_not_want() {
    let mut w = Wire::with_queues(COMMANDS, 1);
    w.offer_to(0, 60);
    let mine = frame(1, 60);
    let to = |address: [u8; 6]| [&address[..], &mine[6..]].concat();
    let (other, group, all) = ([2, 0, 0, 0, 0, 9], [0x33, 0x33, 0, 0, 0, 1], [0xff; 6]);
    let comes = |w: &mut Wire| {
        [mine.clone(), to(other), to(group), to(all)].map(|f| {
            w.send(&f);
            w.serve();
            !w.bench.used(0).is_empty()
        })
    };
    assert_eq!(comes(&mut w), [true; 4], "as long as the guest has said nothing");
    let none = [0; 4];
    assert_eq!(w.command(2, &[&[1, 0][..], &none, &none].concat()), 0);
    assert_eq!(w.command(2, &[0, 0, 0]), 0);
    assert_eq!(comes(&mut w), [true, false, false, true]);
    assert_eq!(w.command(2, &[0, 1, 1]), 0);
    assert_eq!(comes(&mut w), [true, false, true, true]);
    assert_eq!(w.command(2, &[0, 1, 0]), 0);
    assert_eq!(w.command(2, &[&[1, 0, 1, 0, 0, 0][..], &other, &[1, 0, 0, 0], &group].concat()), 0);
    assert_eq!(comes(&mut w), [true; 4]);
    assert_eq!(w.command(2, &[&[1, 0][..], &none, &none].concat()), 0);
    // another MAC
    assert_eq!(w.command(2, &[&[1, 1][..], &other].concat()), 0);
    assert_eq!(w.config(0, 6), other);
    assert_eq!(comes(&mut w), [false, true, false, true]);
    // and after a reset all is as in the beginning
    w.bench.set(0x70, 0);
    assert_eq!(w.config(0, 6), [2, 0, 0, 0, 0, 1]);
    assert_eq!(w.net().filter.rule([0; 6]), None);
}

#[test]
fn the_guest_is_asked_to_announce_itself_after_a_port() {
    let mut w = Wire::with_queues(COMMANDS, 1);
    assert_eq!(w.config(6, 2), [1, 0]);
    w.bench.transport.quiesce();
    let state = w.bench.transport.save();
    w.bench.transport.restore(&state).unwrap();
    let generation = w.bench.reg(0xfc);
    w.bench.transport.resume();
    assert_eq!(w.config(6, 2), [3, 0]);
    assert_ne!(w.bench.reg(0xfc), generation);
    assert_eq!(w.bench.reg(0x60) & 2, 2, "a configuration interrupt");
    assert_eq!(w.command(2, &[3, 0]), 0);
    assert_eq!(w.config(6, 2), [1, 0]);
}

#[test]
fn offloads_change_while_running() {
    let mut w = Wire::with_queues(COMMANDS | GUEST_CSUM | GUEST_TSO4, 1);
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    assert_eq!(w.net().offloads, GUEST_CSUM | GUEST_TSO4);
    assert_eq!(w.command(2, &set(GUEST_CSUM)), 0);
    assert_eq!(w.net().offloads, GUEST_CSUM);
    assert_eq!(w.command(2, &set(GUEST_TSO6)), 1, "not accepted at the start");
    assert_eq!(w.net().offloads, GUEST_CSUM);
}

#[test]
fn malformed_commands_are_answered_or_break_the_queue() {
    let mut w = Wire::with_queues(COMMANDS, 1);
    for bytes in [&[0u8][..], &[9, 9], &[2, 0, 1, 0], &[1, 0, 0xff, 0xff, 0xff, 0xff]] {
        assert_eq!(w.command(2, bytes), 1);
    }
    // a command of a megabyte is looked at in part
    w.bench.chain(2, &[(DATA, 0x10_0000, 0), (COMMAND, 1, WRITE)]);
    w.bench.transport.process();
    assert_eq!(w.bench.used(2).len(), 1);
    assert_eq!(w.bench.status() & STATUS_NEEDS_RESET, 0);
    // no room for the answer
    w.bench.chain(2, &[(COMMAND, 3, 0)]);
    w.bench.transport.process();
    assert_ne!(w.bench.status() & STATUS_NEEDS_RESET, 0);
}

#[test]
fn a_deleted_tap_takes_the_link_down_and_nothing_else() {
    let mut w = Wire::with_queues(MQ | COMMANDS, 2);
    w.offer_to(0, 4);
    assert_eq!(w.command(4, &[4, 0, 2, 0]), 0);
    let deleted = std::process::Command::new("ip").args(["link", "del", "t0"]).status().unwrap();
    assert!(deleted.success());
    w.serve();
    assert_eq!(w.config(6, 2), [0, 0], "the link is down");
    assert_eq!(w.bench.reg(0x60) & 2, 2);
    w.bench.write(DATA + 0xa_0000, &[vec![0; 12], frame(3, 200)].concat());
    for queue in [1, 3] {
        w.bench.chain(queue, &[(DATA + 0xa_0000, 212, 0)]);
    }
    w.bench.transport.process();
    assert_eq!([1, 3].map(|q| w.bench.used(q).len()), [1, 1], "given back unsent");
    assert_eq!(w.command(4, &[4, 0, 1, 0]), 0);
    assert_eq!(w.command(4, &[0, 0, 0]), 0);
    assert!(w.net().take_frames(10).unwrap().is_empty());
    let mut out = crate::metrics::Exposition::default();
    w.bench.transport.metrics(&mut out);
    let metrics = out.text();
    for line in ["net_taps_lost_total{device=\"net0\"} 1", "net_link_up{device=\"net0\"} 0"] {
        assert!(metrics.contains(line), "{metrics}");
    }
    // the driver may start again all the same
    w.bench.set(0x70, 0);
    w.bench.restart(MQ | COMMANDS, 5);
    w.bench.transport.quiesce();
    let state = w.bench.transport.save();
    w.bench.transport.restore(&state).unwrap();
}

#[test]
fn random_drivers_never_panic() {
    let mut w = Wire::with_queues(MRG_RXBUF | MQ | COMMANDS | GUEST_CSUM | CSUM, 2);
    let mut random = crate::virtio::testing::Random(0x0dd5eed);
    for round in 0..3000 {
        let queue = random.next() % 5;
        let pieces: Vec<_> = (0..1 + random.next() % 4)
            .map(|_| {
                let write = if random.next() & 1 == 0 { WRITE } else { 0 };
                (DATA + random.next() % 0x8_0000, (random.next() % 3000) as u32, write)
            })
            .collect();
        let bytes: Vec<u8> = (0..16).map(|_| (random.next() % 6) as u8).collect();
        w.bench.write(pieces[0].0, &bytes);
        w.bench.chain(queue, &pieces);
        w.send(&flow(round as u8));
        w.serve();
        (0..5).for_each(|q| drop(w.bench.used(q)));
        if round % 64 == 0 {
            w.bench.transport.quiesce();
            let state = w.bench.transport.save();
            w.bench.transport.restore(&state).unwrap();
            w.bench.transport.resume();
        }
        if w.bench.status() & STATUS_NEEDS_RESET != 0 {
            w.bench.set(0x70, 0);
            w.bench.restart(MRG_RXBUF | MQ | COMMANDS | GUEST_CSUM | CSUM, 5);
        }
    }
}

#[test]
fn limits_hold_and_change_while_running() {
    use crate::limit::Rate;
    let mut w = Wire::with_queues(MRG_RXBUF | COMMANDS, 1);
    let ops = |rate, burst| Limits { ops: Some(Rate { rate, burst: Some(burst) }), bytes: None };
    w.net().set_limits(Some(ops(1, 3)), Some(ops(1, 2)));
    w.offer_to(0, 60);
    w.bench.write(DATA + 0xa_0000, &[vec![0; 12], frame(3, 200)].concat());
    for n in 0..6 {
        w.send(&flow(n));
        w.bench.chain(1, &[(DATA + 0xa_0000, 212, 0)]);
    }
    w.serve();
    assert_eq!((w.bench.used(0).len(), w.bench.used(1).len()), (3, 2));
    // they move with the VM, as they are
    w.bench.transport.quiesce();
    let state = w.bench.transport.save();
    w.bench.transport.restore(&state).unwrap();
    w.bench.transport.resume();
    assert_eq!(w.net().limits(), (ops(1, 3), ops(1, 2)));
    assert_eq!((w.bench.used(0).len(), w.bench.used(1).len()), (0, 0));
    // faster: what waits goes on by itself
    w.net().set_limits(Some(ops(200, 1)), Some(Limits::default()));
    w.bench.transport.process();
    assert_eq!(w.bench.used(1).len(), 4);
    let mut received = w.bench.used(0).len();
    while received < 3 {
        received += w.bench.wait_used(0).len();
    }
    assert_eq!(received, 3);
}
