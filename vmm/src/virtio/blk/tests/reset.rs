//! Resets while the host works on requests.

use super::*;
use crate::memory::{HUGE_PAGE, Memory};

/// Reads begun before a reset, and their size: more than a disk is through with at once.
const REQUESTS: u64 = 64;
const LEN: u64 = 256 << 10;
const IMAGE: usize = (REQUESTS * LEN) as usize;
/// One buffer for each of them.
const BUFFERS: u64 = 4 << 20;
/// What memory is filled with when nobody may write to it any more.
const POISON: u8 = 0x5a;
/// Attempts at catching a disk at work.
const ATTEMPTS: usize = 50;

/// As the driver does it, and as a reset of the whole VM does.
const RESETS: [fn(&mut Bench); 2] = [|bench| bench.set(0x70, 0), |bench| bench.transport.power_on()];

fn on_a_large_machine(config: &DiskConfig) -> Disk {
    let memory = Memory::new(((BUFFERS as usize) + IMAGE).next_multiple_of(HUGE_PAGE)).unwrap();
    Disk(Bench::with_memory(Box::new(Blk::open(config).unwrap()), memory))
}

impl Disk {
    fn begin_many(&mut self) {
        for i in 0..REQUESTS {
            let header = HEADER + 0x200 + 0x10 * i;
            let sector = i * LEN / SECTOR;
            self.0.write(header, &[&[0; 8][..], &sector.to_le_bytes()].concat());
            let buffer = (BUFFERS + i * LEN, LEN as u32, WRITE);
            self.0.chain(0, &[(header, 16, 0), buffer, (STATUS + i, 1, WRITE)]);
        }
        self.0.transport.process();
    }

    fn in_flight(&mut self) -> usize {
        self.blk().engine.in_flight()
    }
}

#[test]
fn after_a_reset_nothing_is_under_way_and_nothing_is_written_to_memory() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(&image(&dir, IMAGE), true);
    let at = dir.path().join("qcow2");
    formats::qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.path.to_str().unwrap(), at.to_str().unwrap()]);
    let qcow2 = DiskConfig { format: DiskFormat::Qcow2, path: at, ..raw.clone() };
    let content = std::fs::read(&raw.path).unwrap();
    for config in [raw, qcow2] {
        for reset in RESETS {
            let mut d = on_a_large_machine(&config);
            let mut caught = 0;
            for _ in 0..ATTEMPTS {
                d.0.restart(0, 1);
                d.begin_many();
                let at_work = d.in_flight() > 0;
                reset(&mut d.0);
                assert_eq!((d.0.status(), d.in_flight()), (0, 0));
                // Memory has another use now, the rings as well.
                d.0.write(BUFFERS, &vec![POISON; IMAGE]);
                d.0.write(STATUS, &[POISON; REQUESTS as usize]);
                d.0.restart(0, 1);
                for _ in d.0.events.io.wait(Some(std::time::Duration::ZERO)).iter() {
                    d.0.transport.event();
                }
                assert!(d.0.used(0).is_empty(), "what was before the reset is answered after it");
                assert_eq!(d.request(0, 8, &[(BUFFER, 4096)]), (0, 4097));
                assert_eq!(d.0.read(BUFFER, 4096), content[4096..8192]);
                assert!(d.0.read(BUFFERS, IMAGE).iter().all(|b| *b == POISON));
                assert!(d.0.read(STATUS + 1, REQUESTS as usize - 1).iter().all(|b| *b == POISON));
                d.0.set(0x70, 0);
                caught += usize::from(at_work);
                if caught == 3 {
                    break;
                }
            }
            assert!(caught > 0, "the disk was never at work when it was reset");
        }
    }
}
