//! On a real tap in a network namespace of the test's own thread, with a packet socket at the other end.
use super::*;
use crate::virtio::testing::{Bench, DATA, STATUS_NEEDS_RESET, WRITE, rings};
use std::os::fd::{FromRawFd, OwnedFd};

mod queues;

struct Wire {
    bench: Bench,
    socket: OwnedFd,
}

impl Wire {
    fn new(features: u64) -> Wire {
        Wire::with_queues(features, 1)
    }

    /// All pairs and the control queue set up, if `features` has them.
    fn with_queues(features: u64, queues: u16) -> Wire {
        // SAFETY: no memory is involved; only this thread's view changes, and ends with it.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "needs root");
        // Nothing but the test is to send on the wire.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        let mac = Some(MacAddress([2, 0, 0, 0, 0, 1]));
        let config = NetConfig { id: "net0".into(), tap: Some("t0".into()), mac, queues, ..NetConfig::default() };
        let net = Net::open(&config).unwrap();
        assert_eq!(net.mtu, 1500);
        // SAFETY: no memory is involved; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from((libc::ETH_P_ALL as u16).to_be())) };
        assert!(fd >= 0);
        // SAFETY: all-zero is a valid address; the pointers are valid for their lengths.
        unsafe {
            let mut to: libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            to.sll_ifindex = libc::if_nametoindex(c"t0".as_ptr()) as i32;
            assert_eq!(libc::bind(fd, (&raw const to).cast(), size_of_val(&to) as u32), 0);
        }
        // SAFETY: just made, owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut bench = Bench::new(Box::new(net));
        let pairs = if features & MQ != 0 { u64::from(queues) } else { 1 };
        bench.start(features, 2 * pairs + u64::from(features & CTRL_VQ != 0));
        Wire { bench, socket }
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(n, frame.len() as isize);
    }

    fn receive(&self) -> Vec<u8> {
        let mut b = vec![0u8; 70_000];
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::recv(self.socket.as_raw_fd(), b.as_mut_ptr().cast(), b.len(), 0) };
        assert!(n > 0);
        b.truncate(n as usize);
        b
    }

    /// The next frame heard that is `wanted`.
    fn receive_from(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            let heard = self.receive();
            if wanted(&heard) {
                return heard;
            }
        }
    }

    /// Receives buffers of `len` bytes at `DATA + i × 0x1000`.
    fn offer(&mut self, range: std::ops::Range<u64>, len: u32) {
        for i in range {
            self.bench.chain(0, &[(DATA + i * 0x1000, len, WRITE)]);
        }
    }

    /// Whether the driver was told that it need not ring for a queue.
    fn no_notify(&self, queue: u64) -> u8 {
        self.bench.read(rings(queue) + 0x2000, 1)[0]
    }

    fn serve(&mut self) {
        self.bench.transport.event();
    }

    fn net(&mut self) -> &mut Net {
        self.bench.transport.device_mut().as_net().unwrap()
    }
}

fn frame(n: u8, len: usize) -> Vec<u8> {
    let mut f = vec![n; len];
    f[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    f[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    f[12..14].copy_from_slice(&[0x88, 0xb5]); // local experimental
    f
}

#[test]
fn both_ways() {
    let mut w = Wire::new(0);
    w.offer(0..4, 2048);
    w.send(&frame(1, 60));
    w.send(&frame(2, 1514));
    w.serve();
    assert_eq!(w.bench.used(0), [(0, 72), (1, 1526)]);
    assert_eq!(w.bench.read(DATA + 12, 60), frame(1, 60));
    assert_eq!(w.bench.read(DATA + 10, 2), [1, 0]);
    assert_eq!(w.bench.read(DATA + 0x1000 + 12, 1514), frame(2, 1514));
    // to the wire, header and frame in several pieces
    let out = [vec![0; 12], frame(3, 200)].concat();
    w.bench.write(DATA + 0x8000, &out);
    w.bench.chain(1, &[(DATA + 0x8000, 12, 0), (DATA + 0x800c, 100, 0), (DATA + 0x8070, 100, 0)]);
    w.bench.transport.process();
    assert_eq!(w.bench.used(1).len(), 1);
    assert_eq!(w.receive(), frame(3, 200));
}

#[test]
fn large_frames_take_several_buffers_where_the_guest_allows_it() {
    let mut w = Wire::new(MRG_RXBUF);
    w.offer(0..8, 512);
    w.send(&frame(9, 1400));
    w.serve();
    // 12 + 1400 = 512 + 512 + 388
    assert_eq!(w.bench.used(0), [(0, 512), (1, 512), (2, 388)]);
    assert_eq!(w.bench.read(DATA + 10, 2), [3, 0]);
    let got =
        [w.bench.read(DATA + 12, 500), w.bench.read(DATA + 0x1000, 512), w.bench.read(DATA + 0x2000, 388)].concat();
    assert_eq!(got, frame(9, 1400));
}

#[test]
fn a_frame_waits_for_room() {
    let mut w = Wire::new(MRG_RXBUF);
    w.offer(0..1, 512);
    w.send(&frame(1, 1000));
    w.send(&frame(2, 60));
    w.serve();
    assert!(w.bench.used(0).is_empty());
    w.offer(1..4, 512);
    w.bench.transport.process();
    assert_eq!(w.bench.used(0), [(0, 512), (1, 500), (2, 72)]);
}

#[test]
fn posted_buffers_are_told_of_until_they_are_used() {
    let mut w = Wire::new(MRG_RXBUF);
    let posted = |w: &mut Wire| {
        let mut out = Vec::new();
        w.bench.transport.posted(&mut out);
        let mut at: Vec<u64> = out.iter().map(|r| (r.address().0 - DATA) / 0x1000).collect();
        at.sort_unstable();
        at
    };
    assert_eq!(posted(&mut w), [0; 0]);
    w.offer(0..40, 2048);
    w.bench.chain(1, &[(DATA + 0x5_0000, 60, 0)]);
    assert_eq!(posted(&mut w), (0..40).collect::<Vec<_>>());
    // After a frame some buffers are out of the ring, waiting for the next; the first is the guest's again.
    w.send(&frame(1, 60));
    w.serve();
    assert_eq!(w.bench.used(0).len(), 1);
    assert_ne!(w.bench.transport.save().queues[0].next_avail, 1, "this tests nothing");
    assert_eq!(posted(&mut w), (1..40).collect::<Vec<_>>());
    w.bench.transport.quiesce();
    assert_eq!(posted(&mut w), (1..40).collect::<Vec<_>>());
    assert_eq!(w.bench.transport.save().queues[0].next_avail, 1);
    // After a reset they are memory like any other.
    w.bench.set(0x70, 0);
    assert_eq!(posted(&mut w), [0; 0]);
}

#[test]
fn without_mergeable_buffers_what_never_fits_is_dropped() {
    let mut w = Wire::new(0);
    w.offer(0..2, 128);
    w.send(&frame(1, 1000));
    w.send(&frame(2, 60));
    w.serve();
    assert_eq!(w.bench.used(0), [(0, 72)]);
    assert_eq!(w.bench.read(DATA + 12, 60), frame(2, 60));
    assert_eq!(w.net().stats.rx_dropped.get(), 1);
}

#[test]
fn frames_to_send_that_cannot_be_are_given_back() {
    let mut w = Wire::new(0);
    w.bench.chain(1, &[(DATA, 11, 0)]);
    w.bench.chain(1, &[(DATA, 12, 0)]);
    let big: Vec<_> = (0..40).map(|_| (DATA, 4096, 0)).collect();
    w.bench.chain(1, &big);
    w.bench.transport.process();
    assert_eq!(w.bench.used(1).len(), 3);
    assert_eq!(w.net().stats.tx_errors.get(), 3);
    assert_eq!(w.bench.status() & STATUS_NEEDS_RESET, 0);
    // but a receive buffer that is too small breaks the queue
    w.offer(0..1, 11);
    w.send(&frame(1, 60));
    w.serve();
    assert_ne!(w.bench.status() & STATUS_NEEDS_RESET, 0);
}

#[test]
fn stopped_input_stays_in_the_tap_and_moves_with_the_vm() {
    let mut w = Wire::new(MRG_RXBUF);
    w.offer(0..64, 2048);
    w.send(&frame(1, 60));
    w.serve();
    assert_eq!(w.bench.used(0).len(), 1);
    w.bench.transport.stop_input();
    w.send(&frame(2, 60));
    w.serve();
    assert!(w.bench.used(0).is_empty());
    w.bench.transport.quiesce();
    let state = w.bench.transport.save();
    // buffers that were collected but not used are back in the queue
    assert_eq!((state.queues[0].next_avail, state.queues[0].next_used), (1, 1));
    // what came meanwhile is taken out, and given to the guest before anything newer
    w.send(&frame(3, 60));
    let frames = w.net().take_frames(10).unwrap();
    assert_eq!(frames.len(), 2);
    assert_eq!(frames[1][HEADER_SIZE..], frame(3, 60));
    w.send(&frame(4, 60));
    w.bench.transport.restore(&state).unwrap();
    assert_eq!(w.bench.transport.save(), state);
    w.net().inject_frames(frames).unwrap();
    w.bench.transport.resume();
    assert_eq!(w.bench.used(0).len(), 3);
    for (at, n) in [(1, 2), (2, 3), (3, 4)] {
        assert_eq!(w.bench.read(DATA + at * 0x1000 + 12, 60), frame(n, 60), "frame {n}");
    }
    assert_eq!(w.net().stats.rx_dropped.get(), 0);
}

#[test]
fn injection_is_bounded_and_checked() {
    let mut w = Wire::new(MRG_RXBUF);
    assert!(w.net().inject_frames(vec![vec![0; HEADER_SIZE - 1]]).is_err());
    assert!(w.net().inject_frames(vec![vec![0; FRAME_MAX + 1]]).is_err());
    assert!(w.net().inject_frames(vec![vec![0; 60]; PENDING_MAX + 1]).is_err());
    w.net().inject_frames(vec![vec![0; 60]; PENDING_MAX]).unwrap();
    assert!(w.net().inject_frames(vec![vec![0; 60]]).is_err());
}

#[test]
fn announces_by_rarp() {
    let w = Wire::new(0);
    let mut bench = w.bench;
    bench.transport.device_mut().as_net().unwrap().announce().unwrap();
    let w = Wire { bench, socket: w.socket };
    let heard = w.receive();
    assert_eq!(heard[..14], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x80, 0x35]);
    assert_eq!(heard.len(), 60);
}

#[test]
fn a_tap_has_one_user() {
    let w = Wire::new(0);
    let config = NetConfig { id: "b".into(), tap: Some("t0".into()), ..NetConfig::default() };
    let e = Net::open(&config).err().unwrap().to_string();
    assert!(e.contains("t0") && e.contains("another process"), "{e}");
    let config = NetConfig { tap: None, fd: Some(w.socket.as_raw_fd()), ..config };
    assert!(Net::open(&config).err().unwrap().to_string().contains("not a tap"));
}

#[test]
fn a_held_tap_waits_while_injected_frames_are_delivered() {
    let mut w = Wire::new(0);
    w.offer(0..4, 2048);
    w.net().hold_tap(true);
    w.send(&frame(1, 60));
    w.serve();
    assert_eq!(w.bench.used(0), []);
    w.net().inject_frames(vec![[vec![0; HEADER_SIZE], frame(2, 60)].concat()]).unwrap();
    assert_eq!(w.net().room(), PENDING_MAX - 1);
    w.serve();
    assert_eq!(w.bench.used(0), [(0, 72)]);
    assert_eq!(w.bench.read(DATA + 12, 60), frame(2, 60));
    w.net().hold_tap(false);
    w.serve();
    assert_eq!(w.bench.read(DATA + 0x1000 + 12, 60), frame(1, 60));
}

#[test]
fn an_announcement_is_recognised() {
    let mut w = Wire::new(0);
    w.net().announce().unwrap();
    let sent = [vec![7; HEADER_SIZE], w.receive()].concat();
    assert!(is_announcement(&sent, [2, 0, 0, 0, 0, 1]) && !is_announcement(&sent, [2, 0, 0, 0, 0, 2]));
    assert!(!is_announcement(&sent[..HEADER_SIZE + 41], [2, 0, 0, 0, 0, 1]));
}

#[test]
fn a_polled_driver_sends_and_gives_buffers_without_ringing() {
    let mut w = Wire::new(0);
    w.bench.write(DATA + 0x8000, &[vec![0; 12], frame(3, 200)].concat());
    w.bench.chain(1, &[(DATA + 0x8000, 212, 0)]);
    assert!(w.bench.transport.poll());
    assert_eq!(w.receive(), frame(3, 200));
    assert!(!w.bench.transport.poll());
    // A frame for which there is no buffer yet.
    w.send(&frame(1, 60));
    w.bench.transport.polled(true);
    assert!(!w.bench.transport.poll());
    w.offer(0..1, 2048);
    assert!(w.bench.transport.poll());
    assert_eq!(w.bench.used(0), [(0, 72)]);
    // Buffers for which there is no frame are no reason to look again.
    w.offer(1..3, 2048);
    w.bench.transport.polled(true);
    assert!(!w.bench.transport.poll());
    while w.bench.transport.end_poll() == Progress::More {}
    // There are receive buffers enough: of more it need not tell.
    assert_eq!([w.no_notify(0), w.no_notify(1)], [1, 0]);
}

#[test]
fn a_driver_rings_for_receive_buffers_only_when_they_have_run_out() {
    let mut w = Wire::new(0);
    w.serve();
    assert_eq!(w.no_notify(0), 0);
    w.offer(0..2, 2048);
    w.serve();
    assert_eq!(w.no_notify(0), 1);
    for (n, told) in [(1, 1), (2, 0)] {
        w.send(&frame(n, 60));
        w.serve();
        assert_eq!((w.bench.used(0).len(), w.no_notify(0)), (1, told));
    }
    w.send(&frame(3, 60));
    w.serve();
    assert_eq!(w.bench.used(0), []);
    w.offer(2..4, 2048);
    // The doorbell.
    while w.bench.transport.process() == Progress::More {}
    assert_eq!((w.bench.used(0).len(), w.no_notify(0)), (1, 1));
}

#[test]
fn an_answer_is_read_between_long_frames() {
    let mut w = Wire::new(0);
    let long = (BUDGET_BYTES / 60_000) + 1;
    w.offer(0..1, 2048);
    for i in 0..2 * long {
        let at = DATA + 0x10000 + i * 0x10;
        w.bench.chain(1, &[(at, 60_000, 0)]);
    }
    w.send(&frame(9, 60));
    // There is more to send, and what has come is there.
    assert_eq!(w.bench.transport.event(), Progress::More);
    assert!(w.bench.used(1).len() < 2 * long as usize);
    assert_eq!(w.bench.used(0).len(), 1);
}
