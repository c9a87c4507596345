//! Two stacks on a cable that may lose, double and reorder frames.
use super::*;
use crate::exec::{block_on, register, spawn};
use crate::rng::Rng;
use crate::time::sleep;
use crate::virtio::fake::FakeDevice;
use crate::virtio::net::RxBuffers;
use std::cell::RefCell;
use std::collections::VecDeque;

const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF.
const OFFLOADS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11 | 1 << 15;
const HEADER: usize = 12;
/// How many bad cables are tried.
const SEEDS: u32 = 40;

/// A cable between two devices.
struct Cable {
    ends: [FakeDevice; 2],
    waiting: [RefCell<VecDeque<Vec<u8>>>; 2],
    rng: RefCell<Rng>,
    /// Of 1000 frames, how many are lost, doubled, reordered.
    faults: Cell<[u32; 3]>,
    frames: Cell<u64>,
    largest: Cell<usize>,
    cut: Cell<bool>,
}

impl Cable {
    fn chance(&self, per_mille: u32) -> bool {
        self.rng.borrow_mut().next_u32() % 1000 < per_mille
    }

    fn accept(&self, to: usize, frame: Vec<u8>) {
        self.frames.set(self.frames.get() + 1);
        self.largest.set(self.largest.get().max(frame.len() - HEADER));
        let [lost, doubled, reordered] = self.faults.get();
        if self.cut.get() || self.chance(lost) {
            return;
        }
        let mut waiting = self.waiting[to].borrow_mut();
        if self.chance(doubled) {
            waiting.push_back(frame.clone());
        }
        if self.chance(reordered) {
            waiting.push_front(frame);
        } else {
            waiting.push_back(frame);
        }
    }

    /// Puts a frame into as many receive buffers as it needs; false if there are not enough.
    fn deliver(&self, to: usize, held: &mut Vec<crate::virtio::fake::Chain>, frame: &[u8]) -> bool {
        let device = &self.ends[to];
        while held.iter().map(|c| c.room()).sum::<usize>() < frame.len() {
            match device.take(0) {
                Some(chain) => held.push(chain),
                None => return false,
            }
        }
        let mut frame = frame.to_vec();
        let mut count = 0u16;
        let mut room = 0;
        while room < frame.len() {
            room += held[usize::from(count)].room();
            count += 1;
        }
        frame[10..12].copy_from_slice(&count.to_le_bytes());
        let mut rest = &frame[..];
        for chain in held.drain(..usize::from(count)) {
            let n = rest.len().min(chain.room());
            chain.write(&rest[..n]);
            device.give(0, u32::from(chain.head), n as u32);
            rest = &rest[n..];
        }
        true
    }
}

struct Plugged {
    cable: Rc<Cable>,
    held: [RefCell<Vec<crate::virtio::fake::Chain>>; 2],
}

impl exec::Device for Plugged {
    fn poll(&self) -> bool {
        let mut any = false;
        for from in [0, 1] {
            while let Some(chain) = self.cable.ends[from].take(1) {
                self.cable.accept(1 - from, chain.read());
                self.cable.ends[from].give(1, u32::from(chain.head), 0);
                any = true;
            }
        }
        for to in [0, 1] {
            let mut waiting = self.cable.waiting[to].borrow_mut();
            while let Some(frame) = waiting.front() {
                if !self.cable.deliver(to, &mut self.held[to].borrow_mut(), frame) {
                    break;
                }
                waiting.pop_front();
                any = true;
            }
        }
        any
    }
    fn pending(&self) -> bool {
        false
    }
    fn kick(&self) {}
}

fn rig(features: u64, mtu: u16, rx: RxBuffers, seed: &str) -> (Rc<Cable>, Stack, Stack) {
    // Each test's random numbers, ports included, are its own.
    crate::rng::seed_for_test(seed.as_bytes());
    let device = |last: u8| {
        let mut config = vec![0u8; 16];
        config[..6].copy_from_slice(&[2, 0, 0, 0, 0, last]);
        config[10..12].copy_from_slice(&mtu.to_le_bytes());
        // MAC, MTU
        FakeDevice::new(1, features | 1 << 5 | 1 << 3, config)
    };
    let ends = [device(1), device(2)];
    let cable = Rc::new(Cable {
        ends: ends.clone(),
        waiting: Default::default(),
        rng: RefCell::new(Rng::from_seed(seed.as_bytes())),
        faults: Cell::new([0; 3]),
        frames: Cell::new(0),
        largest: Cell::new(0),
        cut: Cell::new(false),
    });
    let [a, b] = [(&ends[0], A), (&ends[1], B)].map(|(end, address)| {
        let config = Config { address: Cidr { address, prefix: 24 }, gateway: None, rx_buffers: rx };
        Stack::new(NetDevice::new(end.transport()).unwrap(), config)
    });
    register(Rc::new(Plugged { cable: cable.clone(), held: Default::default() }));
    (cable, a, b)
}

const BIG: RxBuffers = RxBuffers { count: 32, size: 69_632 };
const MANY: RxBuffers = RxBuffers { count: 64, size: 4096 };

fn byte(i: usize) -> u8 {
    (i ^ i >> 8 ^ i >> 16) as u8
}

async fn echo(listener: Listener) {
    loop {
        let (mut stream, _) = listener.accept().await;
        spawn(async move {
            let mut buffer = vec![0; 20_000];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
            stream.shutdown();
            let _ = stream.drained().await;
        });
    }
}

/// Sends so many bytes through an echo and checks them.
async fn check_echo(stack: &Stack, port: u16, bytes: usize) {
    let stream = stack.connect(SocketAddrV4::new(B, port), Buffers::default()).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    spawn(async move {
        let data: Vec<u8> = (0..bytes).map(byte).collect();
        write.write_all(&data).await.unwrap();
        write.shutdown();
    });
    let mut seen = 0;
    loop {
        let n = read
            .read_with(|data| {
                assert!(data.iter().enumerate().all(|(i, b)| *b == byte(seen + i)), "at {seen}");
                (data.len(), data.len())
            })
            .await
            .unwrap();
        if n == 0 {
            break;
        }
        seen += n;
    }
    assert_eq!(seen, bytes);
}

#[test]
fn streams_with_every_set_of_offloads() {
    for (name, features, mtu, rx, large) in [
        ("none", 0, 1500, MANY, false),
        ("all, large buffers", OFFLOADS, 1500, BIG, true),
        ("all, small buffers", OFFLOADS, 1500, MANY, true),
        ("all, jumbo", OFFLOADS, 9000, MANY, true),
        ("checksums only", 0b11, 1500, MANY, false),
    ] {
        let (cable, a, b) = rig(features, mtu, rx, name);
        block_on(async move {
            spawn(echo(b.listen(7, Buffers::default(), 4).unwrap()));
            check_echo(&a, 7, 3_000_000).await;
            let largest = cable.largest.get();
            assert_eq!(largest > usize::from(mtu) + 14, large, "{name}: {largest}");
            assert_eq!(a.statistics().rx_dropped + b.statistics().rx_dropped, 0, "{name}");
        });
    }
}

#[test]
fn streams_over_a_bad_cable() {
    for n in 0..SEEDS {
        // A thread has a runtime of its own.
        let run = std::thread::spawn(move || {
            let (cable, a, b) = rig(if n % 4 == 3 { 0 } else { OFFLOADS }, 1500, MANY, &format!("bad cable {n}"));
            block_on(async move {
                spawn(echo(b.listen(7, Buffers::default(), 4).unwrap()));
                check_echo(&a, 7, 1000).await;
                cable.faults.set([30, 20, 30]);
                check_echo(&a, 7, 400_000).await;
            });
        });
        assert!(run.join().is_ok(), "seed {n}");
    }
}

#[test]
fn more_connections_than_the_backlog_come_up_in_the_end() {
    let (_, a, b) = rig(OFFLOADS, 1500, BIG, "backlog");
    block_on(async move {
        let small = Buffers { rx: 4096, tx: 4096 };
        spawn(echo(b.listen(7, small, 8).unwrap()));
        let all: Vec<_> = (0..20)
            .map(|_| {
                let a = a.clone();
                spawn(async move { check_echo(&a, 7, 5000).await })
            })
            .collect();
        for one in all {
            one.await;
        }
    });
}

#[test]
fn ends_are_seen_as_what_they_are() {
    let (cable, a, b) = rig(OFFLOADS, 1500, BIG, "ends");
    block_on(async move {
        let to = |port| SocketAddrV4::new(B, port);
        let some = Buffers { rx: 8192, tx: 8192 };
        let refused = a.connect(to(1), some).await.err();
        assert_eq!(refused, Some(ConnectError::Refused));
        let nobody = a.connect(SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 77), 1), some).await.err();
        assert_eq!(nobody, Some(ConnectError::TimedOut));

        let listener = b.listen(5, some, 4).unwrap();
        assert_eq!(b.listen(5, some, 4).err(), Some(ListenError::Taken(5)));
        assert_eq!(b.listen(0, some, 4).err(), Some(ListenError::Invalid));

        // Orderly, one way after the other.
        let mut here = a.connect(to(5), some).await.unwrap();
        let (mut there, peer) = listener.accept().await;
        assert_eq!((*peer.ip(), here.peer()), (A, Some(to(5))));
        here.write_all(b"last words").await.unwrap();
        here.shutdown();
        assert_eq!(here.write_all(b"more").await, Err(TcpError::ShutDown));
        let mut words = [0; 10];
        there.read_exact(&mut words).await.unwrap();
        assert_eq!((&words, there.read(&mut [0; 1]).await), (b"last words", Ok(0)));
        assert_eq!(there.read_exact(&mut [0; 1]).await, Err(TcpError::UnexpectedEnd));
        there.write_all(b"answer").await.unwrap();
        drop(there);
        let mut answer = [0; 6];
        here.read_exact(&mut answer).await.unwrap();
        assert_eq!((&answer, here.read(&mut [0; 1]).await), (b"answer", Ok(0)));
        drop(here);

        // A reset.
        let here = a.connect(to(5), some).await.unwrap();
        let (mut there, _) = listener.accept().await;
        here.abort();
        assert_eq!(there.read(&mut [0; 1]).await, Err(TcpError::Reset));
        drop((here, there));

        // A peer that is cut off: keep-alive finds out.
        let here = a.connect(to(5), some).await.unwrap();
        let (mut there, _) = listener.accept().await;
        let start = Instant::now();
        cable.cut.set(true);
        assert_eq!(there.read(&mut [0; 1]).await, Err(TcpError::Reset));
        assert!(start.elapsed() < PEER_TIMEOUT + KEEP_ALIVE + Duration::from_secs(5));
        drop((here, there));

        // All sockets go in the end, but the one that listens.
        sleep(LINGER + Duration::from_secs(5)).await;
        assert_eq!((a.sockets(), b.sockets()), (0, 1));
        drop(listener);
        assert_eq!(b.sockets(), 0);
    });
}

#[test]
fn a_slow_reader_stops_the_writer_and_loses_nothing() {
    let (_, a, b) = rig(OFFLOADS, 1500, BIG, "slow");
    block_on(async move {
        let listener = b.listen(5, Buffers { rx: 10_000, tx: 10_000 }, 1).unwrap();
        let mut here = a.connect(SocketAddrV4::new(B, 5), Buffers { rx: 10_000, tx: 10_000 }).await.unwrap();
        let written = Rc::new(Cell::new(0usize));
        let w = written.clone();
        spawn(async move {
            for i in 0..100 {
                let piece: Vec<u8> = (i * 1000..(i + 1) * 1000).map(byte).collect();
                here.write_all(&piece).await.unwrap();
                w.set(w.get() + 1000);
            }
        });
        let (mut there, _) = listener.accept().await;
        sleep(Duration::from_secs(2)).await;
        assert!((10_000..=21_000).contains(&written.get()), "{}", written.get());
        let mut all = vec![0; 100_000];
        for piece in all.chunks_mut(777) {
            there.read_exact(piece).await.unwrap();
            sleep(Duration::from_millis(1)).await;
        }
        assert!(all.iter().enumerate().all(|(i, b)| *b == byte(i)));
    });
}

#[test]
fn addresses_of_the_command_line() {
    let parse = |t: &str| Config::parse(t, 32 << 20);
    let c = parse("10.1.2.3/16,10.1.0.1").unwrap();
    assert_eq!(
        (c.address, c.gateway),
        (Cidr { address: Ipv4Addr::new(10, 1, 2, 3), prefix: 16 }, Some(Ipv4Addr::new(10, 1, 0, 1)))
    );
    for bad in ["", "10.1.2.3", "10.1.2.3/33", "10.1.2/8", "10.1.2.3/8,", "0.0.0.0/8", "224.0.0.1/8", "1.2.3.4/8,x"] {
        assert_eq!(
            parse(bad).err(),
            Some(ConfigError::Syntax(
                bad.split(',')
                    .next()
                    .map_or(bad, |a| if bad.contains(',') && a.parse::<Cidr>().is_ok() { bad } else { a })
                    .into()
            )),
            "{bad}"
        );
    }
    let line = crate::Cmdline::parse("ip=10.0.0.1/8 ip=10.0.0.2/8");
    assert_eq!(Config::from_cmdline(&line, 1, 0).unwrap().address.address, B);
    assert_eq!(Config::from_cmdline(&line, 2, 0).err(), Some(ConfigError::Missing("ip")));
}

#[test]
fn a_prepared_stack_says_nothing_until_it_knows_who_it_is() {
    crate::rng::seed_for_test(b"template");
    let device = FakeDevice::new(1, OFFLOADS | 1 << 5, vec![2, 0, 0, 0, 0, 1]);
    let stack = Stack::prepare(NetDevice::new(device.transport()).unwrap(), MANY);
    let listener = stack.listen(7, Buffers::default(), 2).unwrap();
    let waiting = stack.clone();
    block_on(async move { sleep(Duration::from_millis(5)).await });
    assert!(device.take(0).is_none() && device.take(1).is_none(), "no buffer given, nothing sent");

    // Another VM by now: the device's address is another.
    device.0.borrow_mut().config = vec![2, 0, 0, 0, 0, 9];
    crate::time::source::GENERATION.set(crate::time::generation() + 1);
    waiting.begin(Config { address: Cidr { address: A, prefix: 24 }, gateway: None, rx_buffers: MANY });
    let announcement = device.take(1).expect("an announcement").read();
    assert_eq!(announcement[HEADER + 6..HEADER + 12], [2, 0, 0, 0, 0, 9]);
    assert_eq!((0..).take_while(|_| device.take(0).is_some()).count(), usize::from(MANY.count));
    assert_eq!(stack.sockets(), 1);
    drop(listener);
}

/// Asks for a lull in the middle of a stream and waits for the answer.
async fn ask_for_a_lull(number: u32) {
    crate::lull::page::ASKED.set(number);
    let begin = Instant::now();
    while crate::lull::page::ANSWER.get() != number {
        assert!(begin.elapsed() < crate::lull::LULL_MAX, "no answer");
        sleep(Duration::from_micros(50)).await;
    }
}

#[test]
fn in_a_lull_nothing_is_under_way_and_afterwards_all_goes_on() {
    for (name, features) in [("lull", OFFLOADS), ("lull without offloads", 0)] {
        let (cable, a, b) = rig(features, 1500, MANY, name);
        block_on(async move {
            spawn(echo(b.listen(7, Buffers::default(), 4).unwrap()));
            let stream = spawn(async move {
                // Time goes by only where there is nothing to do: a piece every now and then, for longer than the lulls.
                let (mut read, mut write) =
                    a.connect(SocketAddrV4::new(B, 7), Buffers::default()).await.unwrap().into_split();
                spawn(async move {
                    for piece in 0..4000 {
                        write.write_all(&[byte(piece); 1000]).await.unwrap();
                        sleep(Duration::from_micros(10)).await;
                    }
                });
                for piece in 0..4000 {
                    let mut seen = [0; 1000];
                    read.read_exact(&mut seen).await.unwrap();
                    assert_eq!(seen, [byte(piece); 1000], "piece {piece}");
                }
            });
            for number in [1, 2, 3] {
                sleep(Duration::from_micros(300)).await;
                ask_for_a_lull(number).await;
                // What is left to be echoed is in B's buffers.
                sleep(Duration::from_millis(1)).await;
                let (frames, begin) = (cable.frames.get(), Instant::now());
                sleep(Duration::from_millis(5)).await;
                assert!(begin.elapsed() < crate::lull::LULL_MAX);
                assert_eq!(cable.frames.get(), frames, "{name}, lull {number}");
                // The last is taken back by nobody, and ends by itself.
                if number != 3 {
                    crate::lull::page::ASKED.set(0);
                }
            }
            stream.await;
        });
    }
}
