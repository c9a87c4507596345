use super::*;
use crate::exec::{block_on, register, spawn, yield_now};
use crate::rng::Rng;
use crate::time::{Duration, sleep, timeout};
use crate::virtio::fake::{Chain, FakeDevice};

const SIZE: usize = 8 << 20;

/// A disk in memory that finishes its requests late and in any order.
struct FakeDisk {
    device: FakeDevice,
    content: RefCell<Vec<u8>>,
    held: RefCell<Vec<Chain>>,
    rng: RefCell<Rng>,
    /// What it does with the next requests: the status, or None to do it right.
    statuses: RefCell<Vec<u8>>,
    /// Requests seen, by kind.
    seen: RefCell<Vec<(u32, usize)>>,
    /// Finishes nothing.
    stopped: Cell<bool>,
    most_held: Cell<usize>,
}

impl FakeDisk {
    fn finish(&self, chain: Chain) {
        let request = chain.read();
        let kind = u32::from_le_bytes(request[..4].try_into().unwrap());
        let at = u64::from_le_bytes(request[8..16].try_into().unwrap()) as usize * 512;
        let room = chain.room() - 1;
        self.seen.borrow_mut().push((kind, room.max(request.len() - 16)));
        let mut content = self.content.borrow_mut();
        let status = self.statuses.borrow_mut().pop().unwrap_or(0);
        let written = match kind {
            0 => chain.write(&[&content[at..at + room], &[status][..]].concat()),
            1 => {
                content[at..at + request.len() - 16].copy_from_slice(&request[16..]);
                chain.write(&[status])
            }
            4 => chain.write(&[status]),
            8 => chain.write(&[&b"serial number\0......"[..], &[status][..]].concat()),
            kind => panic!("request {kind}"),
        };
        self.device.give(0, u32::from(chain.head), written);
    }
}

impl exec::Device for FakeDisk {
    fn poll(&self) -> bool {
        let mut held = self.held.borrow_mut();
        let before = held.len();
        while let Some(chain) = self.device.take(0) {
            held.push(chain);
        }
        self.most_held.set(self.most_held.get().max(held.len()));
        let mut any = held.len() > before;
        if !self.stopped.get() {
            let count = self.rng.borrow_mut().next_u32() % 9;
            for _ in 0..count {
                if held.is_empty() {
                    break;
                }
                let i = self.rng.borrow_mut().next_u32() as usize % held.len();
                self.finish(held.swap_remove(i));
                any = true;
            }
            any |= !held.is_empty();
        }
        any
    }
    fn pending(&self) -> bool {
        !self.stopped.get() && !self.held.borrow().is_empty()
    }
    fn kick(&self) {}
}

fn config(seg_max: u32, size_max: u32) -> Vec<u8> {
    let mut c = vec![0; 64];
    c[..8].copy_from_slice(&((SIZE / 512) as u64).to_le_bytes());
    c[8..12].copy_from_slice(&size_max.to_le_bytes());
    c[12..16].copy_from_slice(&seg_max.to_le_bytes());
    c[20..24].copy_from_slice(&4096u32.to_le_bytes());
    c
}

fn rig(features: u64, config: Vec<u8>, seed: &str) -> (Rc<FakeDisk>, BlockDevice) {
    let device = FakeDevice::new(2, features, config);
    let fake = Rc::new(FakeDisk {
        device: device.clone(),
        content: RefCell::new(vec![0; SIZE]),
        held: RefCell::default(),
        rng: RefCell::new(Rng::from_seed(seed.as_bytes())),
        statuses: RefCell::default(),
        seen: RefCell::default(),
        stopped: Cell::new(false),
        most_held: Cell::new(0),
    });
    register(fake.clone());
    let disk = BlockDevice::new(device.transport()).unwrap();
    assert!(device.is_live());
    (fake, disk)
}

const ALL: u64 = bit::SEG_MAX | bit::SIZE_MAX | bit::FLUSH | bit::BLK_SIZE | feature::INDIRECT_DESC;

/// Random reads and writes of several tasks, each in its own region, against a model.
fn random_traffic(features: u64, seg_max: u32, size_max: u32, seed: &'static str) -> Rc<FakeDisk> {
    let (fake, disk) = rig(features, config(seg_max, size_max), seed);
    block_on(async move {
        let tasks: Vec<_> = (0..8u64)
            .map(|t| {
                let disk = disk.clone();
                spawn(async move {
                    let mut rng = Rng::from_seed(&[seed.as_bytes(), &[t as u8]].concat());
                    let base = t << 20;
                    let mut model = vec![0u8; 1 << 20];
                    for _ in 0..60 {
                        let mut pieces: Vec<usize> =
                            (0..1 + rng.next_u32() % 40).map(|_| 512 * (1 + rng.next_u32() as usize % 40)).collect();
                        let mut total: usize = pieces.iter().sum();
                        while total > 1 << 19 {
                            total -= pieces.pop().unwrap();
                        }
                        let at = 512 * (rng.next_u32() as usize % (((1 << 20) - total) / 512));
                        if rng.next_u32() & 1 == 0 {
                            let data: Vec<Vec<u8>> =
                                pieces.iter().map(|&n| rng.next_u64().to_le_bytes().repeat(n / 8)).collect();
                            model[at..at + total].copy_from_slice(&data.concat());
                            let (back, result) = disk.write(base + at as u64, data.clone()).await;
                            assert_eq!((back == data, result), (true, Ok(())));
                        } else {
                            let buffers = pieces.iter().map(|&n| vec![0xee; n]).collect();
                            let (data, result) = disk.read(base + at as u64, buffers).await;
                            assert_eq!(result, Ok(()));
                            assert_eq!(data.iter().map(Vec::len).collect::<Vec<_>>(), pieces);
                            assert!(data.concat() == model[at..at + total], "read what was written");
                        }
                    }
                    disk.flush().await.unwrap();
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
    });
    fake
}

#[test]
fn traffic_in_any_order_of_completion() {
    for (seed, features, seg_max, size_max) in [
        ("tables", ALL, 254, 1 << 20),
        ("chains", ALL & !feature::INDIRECT_DESC, 254, 1 << 20),
        ("few segments", ALL, 3, 1 << 20),
        ("small segments", ALL & !feature::INDIRECT_DESC, 126, 4096),
        ("odd segment size", ALL, 254, 5000),
        ("nothing but VERSION_1", 0, 0, 0),
    ] {
        let fake = random_traffic(features, seg_max, size_max, seed);
        assert!(fake.most_held.get() > 1, "{seed}: several at once");
        let flushes = fake.seen.borrow().iter().filter(|(kind, _)| *kind == 4).count();
        assert_eq!(flushes, if features & bit::FLUSH != 0 { 8 } else { 0 }, "{seed}");
    }
}

#[test]
fn more_requests_than_the_ring_holds_wait() {
    let (fake, disk) = rig(ALL & !feature::INDIRECT_DESC, config(254, 1 << 20), "full");
    fake.stopped.set(true);
    block_on(async move {
        let tasks: Vec<_> = (0..300u64)
            .map(|i| {
                let disk = disk.clone();
                spawn(async move { disk.write(i * 512, vec![vec![i as u8; 512]]).await.1 })
            })
            .collect();
        for _ in 0..5 {
            yield_now().await;
        }
        assert_eq!(fake.held.borrow().len(), 85, "256 descriptors, 3 a request");
        fake.stopped.set(false);
        for t in tasks {
            assert_eq!(t.await, Ok(()));
        }
        assert!((0..300).all(|i| fake.content.borrow()[i * 512] == i as u8));
    });
}

#[test]
fn buffers_of_a_dropped_future_stay_until_the_device_is_done() {
    let (fake, disk) = rig(ALL, config(254, 1 << 20), "drop");
    fake.stopped.set(true);
    struct Watched(Vec<u8>, Rc<Cell<u32>>);
    impl AsMut<[u8]> for Watched {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }
    impl Drop for Watched {
        fn drop(&mut self) {
            self.1.set(self.1.get() + 1);
        }
    }
    block_on(async move {
        let dropped = Rc::new(Cell::new(0));
        let buffers = vec![Watched(vec![0; 4096], dropped.clone()), Watched(vec![0; 512], dropped.clone())];
        assert!(timeout(Duration::from_millis(1), disk.read(0, buffers)).await.is_err());
        assert_eq!(dropped.get(), 0, "the device still writes there");
        fake.stopped.set(false);
        while dropped.get() < 2 {
            sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn what_the_device_says_is_what_the_caller_gets() {
    let (fake, disk) = rig(ALL, config(254, 1 << 20), "status");
    block_on(async move {
        for (status, error) in
            [(1, BlockError::Io), (2, BlockError::Unsupported), (77, BlockError::Answer { written: 1, status: 77 })]
        {
            fake.statuses.borrow_mut().push(status);
            assert_eq!(disk.write(0, vec![vec![0u8; 512]]).await.1, Err(error));
            fake.statuses.borrow_mut().push(status);
            assert!(disk.flush().await.is_err());
        }
        assert_eq!(disk.serial().await.unwrap(), "serial number");
        let size = SIZE as u64;
        for (at, length) in [(size, 512), (size - 512, 1024), (u64::MAX - 511, 512), (0, MAX_TRANSFER + 512)] {
            let result = disk.read(at, vec![vec![0u8; length]]).await.1;
            assert_eq!(result, Err(BlockError::Range { offset: at, length: length as u64 }));
        }
        for (at, length) in [(1, 512), (0, 511)] {
            let result = disk.read(at, vec![vec![0u8; length]]).await.1;
            assert_eq!(result, Err(BlockError::Alignment { offset: at, length: length as u64 }));
        }
        assert_eq!(disk.read(5, Vec::<Vec<u8>>::new()).await.1, Err(BlockError::Alignment { offset: 5, length: 0 }));
        assert_eq!(disk.read(512, vec![Vec::<u8>::new()]).await.1, Ok(()));
    });
}

#[test]
fn a_short_answer_is_an_error() {
    let (fake, disk) = rig(ALL, config(254, 1 << 20), "short");
    fake.stopped.set(true);
    block_on(async move {
        let read = spawn(async move { disk.read(0, vec![vec![0u8; 1024]]).await.1 });
        yield_now().await;
        yield_now().await;
        let chain = fake.held.borrow_mut().pop().unwrap();
        // Status 0 in its place, but the ring says that less was written.
        chain.write(&[0; 1025]);
        fake.device.give(0, u32::from(chain.head), 513);
        assert_eq!(read.await, Err(BlockError::Answer { written: 513, status: 0 }));
    });
}

#[test]
fn a_device_that_breaks_the_rules_is_reset_and_given_up() {
    let (fake, disk) = rig(ALL, config(254, 1 << 20), "broken");
    fake.stopped.set(true);
    block_on(async move {
        let d = disk.clone();
        let read = spawn(async move { d.read(0, vec![vec![0u8; 512]]).await });
        yield_now().await;
        yield_now().await;
        let resets = fake.device.0.borrow().resets;
        fake.device.give(0, 200, 0);
        let (buffers, result) = read.await;
        assert_eq!(result, Err(BlockError::Broken(QueueError::NotInFlight(200))));
        assert_eq!(buffers.len(), 1, "the buffers come back");
        assert_eq!(fake.device.0.borrow().resets, resets + 1, "after the device was reset");
        assert!(matches!(disk.flush().await, Err(BlockError::Broken(_))));
    });
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let (fake, disk) = rig(ALL | bit::RO, config(254, 1 << 20), "ro");
    block_on(async move {
        assert!(disk.is_read_only());
        assert_eq!(disk.write(0, vec![vec![1u8; 512]]).await.1, Err(BlockError::ReadOnly));
        assert_eq!(disk.read(0, vec![vec![1u8; 512]]).await.1, Ok(()));
        assert_eq!(fake.seen.borrow().len(), 1);
    });
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    for bad in [config(0, 1 << 20), config(254, 511)] {
        let device = FakeDevice::new(2, ALL, bad);
        assert!(matches!(BlockDevice::new(device.transport()), Err(VirtioError::Config(_))));
        assert!(!device.is_live());
    }
    let mut huge = config(254, 1 << 20);
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let device = FakeDevice::new(2, ALL, huge);
    assert!(matches!(BlockDevice::new(device.transport()), Err(VirtioError::Config(_))));
}
