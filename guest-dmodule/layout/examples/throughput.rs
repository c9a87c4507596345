//! How fast the data layout is by itself: writes of 1 MiB with their consistency points, reads from its cache,
//! creation of files. The disk is one that takes everything and keeps nothing; the cache holds all that is read.
//! Arguments: MiB in all (default 512), rounds (default 5).
use fabric::fs::{CreateHow, Credential, SetAttr, Stability, Time, VolumeId};
use fabric::op::{Op, Reply, Request};
use layout::{Attempt, Block, BlockNumber, FSINFO_BLOCKS, FileSystem, FormatOptions, MountOptions, format};
use std::collections::HashMap;
use std::time::Instant;

const MIB: u64 = 1 << 20;

struct Rig {
    fs: FileSystem,
    /// What making the volume wrote: all that is ever read.
    made: HashMap<BlockNumber, Block>,
    requests: i64,
    runs: u64,
    blocks: u64,
}

impl Rig {
    fn sync(&mut self) {
        if let Some(cp) = self.fs.begin_consistency_point() {
            let mut next = None;
            for (number, _) in &cp.writes {
                self.runs += u64::from(next != Some(number.0));
                next = Some(number.0 + 1);
                self.blocks += 1;
            }
            drop(cp);
            self.fs.consistency_point_done();
        }
    }

    fn run(&mut self, request: &Request) -> Reply {
        self.requests += 1;
        loop {
            match self.fs.execute(request, Time(self.requests), None) {
                Attempt::Done(done) => return done.outcome.expect("operation failed"),
                Attempt::Busy => self.sync(),
                Attempt::Need(need) => {
                    for number in need {
                        self.fs.supply(number, self.made[&number].clone());
                    }
                }
            }
        }
    }
}

/// Time on the clock, and on the processor: the latter is what counts on a busy machine.
struct Timer {
    clock: Instant,
    cpu: f64,
}

fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e9
}

impl Timer {
    fn start() -> Self {
        Timer { clock: Instant::now(), cpu: cpu_seconds() }
    }

    fn spent(&self) -> (f64, f64) {
        (self.clock.elapsed().as_secs_f64(), cpu_seconds() - self.cpu)
    }

    fn report(&self, what: &str, bytes: u64) {
        let (clock, cpu) = self.spent();
        let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
        println!("{what:<40} {:>7.0} MB/s {:>7.0} MB/s of processor", rate(clock), rate(cpu));
    }

    fn each(&self, what: &str, count: u64) {
        let (clock, cpu) = self.spent();
        let each = |seconds: f64| seconds * 1e9 / count as f64;
        println!("{what:<40} {:>7.0} ns   {:>7.0} ns of processor", each(clock), each(cpu));
    }
}

fn root(op: Op) -> Request {
    Request { credential: Credential::ROOT, op }
}

fn mounted(total: u64) -> Rig {
    let blocks = total * 256 * 4 + 65_536;
    let options = FormatOptions {
        blocks,
        volume: VolumeId(1),
        name: "ram",
        uuid: [1, 2],
        seed: 3,
        root_mode: 0o777,
        root_owner: (0, 0),
        now: Time(0),
    };
    let new = format(&options).expect("format");
    let mut made: HashMap<BlockNumber, Block> = new.first.into_iter().collect();
    made.insert(new.last.0, new.last.1);
    let copies = FSINFO_BLOCKS.map(|number| made[&number].clone());
    let cache_blocks = (total as usize * 256 * 5 / 4).max(65_536);
    let options = MountOptions { verifier: 1, cache_blocks, dirty_blocks: 8192 };
    let fs = FileSystem::mount([copies[0].as_ref(), copies[1].as_ref()], blocks, options).expect("mount");
    Rig { fs, made, requests: 0, runs: 0, blocks: 0 }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|text| text.parse::<u64>().ok());
    let total = arguments.next().unwrap_or(512);
    let rounds = arguments.next().unwrap_or(5);
    let mut rig = mounted(total);
    let how = CreateHow::Guarded(SetAttr::default());
    let dir = rig.fs.root();
    let Reply::Created { attr, .. } = rig.run(&root(Op::Create { dir, name: b"file".to_vec(), how })) else {
        panic!("create")
    };
    let handle = attr.handle;
    let data: Vec<u8> = (0..MIB).map(|at| (at * 7 + at / 4096) as u8).collect();
    let mut request = root(Op::Write { handle, offset: 0, stability: Stability::Unstable, data });
    for round in 0..rounds {
        let timer = Timer::start();
        for at in 0..total {
            // The request is changed in place: making it is not the layout's work.
            if let Op::Write { offset, .. } = &mut request.op {
                *offset = at * MIB;
            }
            rig.run(&request);
        }
        rig.sync();
        timer
            .report(if round == 0 { "write 1 MiB, consistency points, new" } else { "the same, over it" }, total * MIB);
    }
    for _ in 0..rounds {
        let timer = Timer::start();
        for at in 0..total {
            let op = Op::Read { handle, offset: at * MIB, length: MIB as u32 };
            let Reply::Data { data, .. } = rig.run(&root(op)) else { panic!("read") };
            assert_eq!(data.len() as u64, MIB);
        }
        timer.report("read 1 MiB, cached", total * MIB);
    }
    let mut at = 12_345_u64;
    let count = 200_000;
    let timer = Timer::start();
    for _ in 0..count {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let offset = (at >> 20) % (total * 256) * 4096;
        rig.run(&root(Op::Read { handle, offset, length: 4096 }));
    }
    timer.each("read 4 KiB at random, cached", count);
    let timer = Timer::start();
    let count = 20_000;
    for number in 0..count {
        let name = format!("f{number}").into_bytes();
        rig.run(&root(Op::Create { dir, name, how }));
    }
    rig.sync();
    timer.each("create a file, consistency points", count);
    println!("blocks written in one run, on average    {:>7.0}", rig.blocks as f64 / rig.runs as f64);
}
