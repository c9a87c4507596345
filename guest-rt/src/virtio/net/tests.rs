use super::transmit::{GSO_NONE, GSO_TCPV4, header_of};
use super::*;
use crate::virtio::fake::{Chain, FakeDevice};
use proptest::prelude::*;

fn device(features: u64) -> (FakeDevice, NetDevice) {
    let fake = FakeDevice::new(1, features | bit::MAC, vec![2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let net = NetDevice::new(fake.transport()).unwrap();
    (fake, net)
}

fn header(flags: u8, buffers: u16) -> Vec<u8> {
    let mut h = vec![0; HEADER];
    h[0] = flags;
    h[10..12].copy_from_slice(&buffers.to_le_bytes());
    h
}

/// An ARP-like frame: nothing to verify.
fn frame(length: usize) -> Vec<u8> {
    let mut f: Vec<u8> = (0..length).map(|i| i as u8).collect();
    f[12..14].copy_from_slice(&[0x08, 0x06]);
    f
}

fn put(fake: &FakeDevice, bytes: &[u8]) {
    let chain: Chain = fake.take(0).expect("a buffer");
    chain.write(bytes);
    fake.give(0, u32::from(chain.head), bytes.len() as u32);
}

fn received(net: &mut NetDevice) -> Option<Vec<u8>> {
    let frame = net.rx.receive()?;
    let bytes = net.rx.bytes(&frame).to_vec();
    net.rx.finish(frame);
    Some(bytes)
}

#[test]
fn frames_in_one_and_in_several_buffers() {
    let (fake, mut net) = device(bit::MRG_RXBUF);
    net.start(RxBuffers { count: 8, size: 2060 });
    for round in 0..20 {
        put(&fake, &[header(0, 1), frame(60 + round)].concat());
        assert_eq!(received(&mut net), Some(frame(60 + round)));
        let whole = [header(0, 3), frame(5000)].concat();
        let parts: Vec<_> = whole.chunks(2060).collect();
        for (i, part) in parts.iter().enumerate() {
            // A frame whose parts come one by one is no frame before the last.
            put(&fake, part);
            assert_eq!(received(&mut net), (i == 2).then(|| frame(5000)));
        }
    }
    assert_eq!(net.statistics().rx_frames, 40);
    assert_eq!(net.statistics().rx_dropped, 0);
    assert_eq!(net.rx.queue.in_flight(), 8, "all buffers are with the device");
}

#[test]
fn bad_frames_are_dropped_and_their_buffers_used_again() {
    let (fake, mut net) = device(bit::MRG_RXBUF);
    net.start(RxBuffers { count: 4, size: 2060 });
    let bad = [
        vec![],
        header(0, 1)[..11].to_vec(),
        header(0, 1),
        [header(0, 1), vec![0; 13]].concat(),
        [header(0, 0), frame(100)].concat(),
    ];
    for bytes in &bad {
        put(&fake, bytes);
        assert_eq!(received(&mut net), None);
    }
    // More buffers than there are: dropped, and the next frame is whole again.
    for _ in 0..5 {
        put(&fake, &[header(0, 5), frame(200)].concat());
        assert_eq!(received(&mut net), None);
    }
    assert_eq!(net.statistics().rx_dropped, bad.len() as u64 + 1);
    put(&fake, &[header(0, 1), frame(100)].concat());
    assert_eq!(received(&mut net), Some(frame(100)));
    assert_eq!(net.rx.queue.in_flight(), 4);
}

/// A TCP segment over IPv4 with right checksums.
fn tcp(payload: usize) -> Vec<u8> {
    use smoltcp::wire::*;
    let (src, dst) = (Ipv4Address::new(10, 0, 0, 1), Ipv4Address::new(10, 0, 0, 2));
    let data = vec![0x5a; payload];
    let tcp = TcpRepr {
        src_port: 1000,
        dst_port: 2000,
        control: TcpControl::Psh,
        seq_number: TcpSeqNumber(7),
        ack_number: Some(TcpSeqNumber(9)),
        window_len: 100,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &data,
    };
    let ip = Ipv4Repr {
        src_addr: src,
        dst_addr: dst,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let mut f = vec![0; ETHERNET + ip.buffer_len() + tcp.buffer_len()];
    let caps = smoltcp::phy::ChecksumCapabilities::default();
    f[12..14].copy_from_slice(&[8, 0]);
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut f[ETHERNET..]), &caps);
    tcp.emit(&mut TcpPacket::new_unchecked(&mut f[ETHERNET + 20..]), &src.into(), &dst.into(), &caps);
    f
}

#[test]
fn checksums_are_verified_unless_the_device_vouches() {
    let (fake, mut net) = device(bit::MRG_RXBUF | bit::GUEST_CSUM);
    net.start(RxBuffers { count: 4, size: 2060 });
    let good = tcp(100);
    let mut bad = good.clone();
    bad[80] ^= 1;
    for (flags, frame, accepted) in
        [(0, &good, true), (0, &bad, false), (NEEDS_CSUM, &bad, true), (DATA_VALID, &bad, true)]
    {
        put(&fake, &[header(flags, 1), frame.clone()].concat());
        assert_eq!(received(&mut net), accepted.then(|| frame.clone()), "flags {flags}");
    }
}

/// Completing the checksum as the device does gives the right one.
#[test]
fn the_device_can_complete_the_checksum() {
    for payload in [0, 1, 2, 1460, 40_001, 65_495] {
        let right = tcp(payload);
        let mut f = right.clone();
        f[ETHERNET + 36..ETHERNET + 38].fill(0);
        let h = header_of(&mut f, Some(1460), true);
        assert_eq!((h[0], h[1]), (NEEDS_CSUM, GSO_TCPV4));
        let field = |at: usize| usize::from(u16::from_le_bytes([h[at], h[at + 1]]));
        let (header_length, size, start, offset) = (field(2), field(4), field(6), field(8));
        assert_eq!((header_length, size, start, offset), (54, 1460, 34, 16));
        let mut sum: u32 =
            f[start..].chunks(2).map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |b| u32::from(*b))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        f[start + offset..start + offset + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        assert!(f == right, "payload {payload}");
    }
}

#[test]
fn other_frames_and_other_devices_get_an_empty_header() {
    assert_eq!(header_of(&mut frame(60), None, true), [0; HEADER]);
    assert_eq!(header_of(&mut tcp(10), None, false), [0; HEADER]);
    let h = header_of(&mut tcp(10), None, true);
    assert_eq!((h[0], h[1]), (NEEDS_CSUM, GSO_NONE));
}

#[test]
fn sending_stops_when_the_ring_is_full_and_goes_on() {
    let (fake, mut net) = device(0);
    let mut sent = 0;
    while net.tx.has_room() {
        net.tx.send(100, None, |f| f.fill(sent as u8));
        sent += 1;
    }
    assert_eq!(sent, 256);
    let chain = fake.take(1).unwrap();
    assert_eq!(chain.read(), [header(0, 0), vec![0; 100]].concat());
    fake.give(1, u32::from(chain.head), 0);
    assert!(net.has_sent() && net.tx.has_room());
    net.tx.send(70_000, None, |f| assert_eq!(f.len(), 70_000));
    assert!(!net.tx.has_room());
}

#[test]
fn a_device_that_breaks_the_rules_is_given_up() {
    let (fake, mut net) = device(bit::MRG_RXBUF);
    net.start(RxBuffers { count: 4, size: 2060 });
    fake.give(0, 99, 10);
    assert_eq!(received(&mut net), None);
    assert!(!net.has_received());
    fake.give(1, 5, 0);
    assert!(!net.tx.has_room());
}

proptest! {
    /// Whatever is in the buffers and however long the device says it is: no panic, no buffer lost.
    #[test]
    fn any_bytes(frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..50)) {
        let (fake, mut net) = device(bit::MRG_RXBUF | bit::GUEST_CSUM);
        net.start(RxBuffers { count: 4, size: 2060 });
        for f in &frames {
            put(&fake, f);
            while received(&mut net).is_some() {}
        }
        prop_assert_eq!(net.rx.queue.in_flight(), 4);
    }

    #[test]
    fn any_frame_gets_a_header(mut frame in proptest::collection::vec(any::<u8>(), 14..200), version in any::<bool>()) {
        if version {
            frame[12..14].copy_from_slice(&[8, 0]);
        }
        header_of(&mut frame, Some(1000), true);
    }
}
