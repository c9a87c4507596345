//! Reads and writes of a disk, so many at a time, for a number of operations or a time, whichever is over first.
use alloc::{format, rc::Rc, string::String, vec, vec::Vec};
use core::cell::Cell;
use core::str::FromStr;
use guest_rt::spawn;
use guest_rt::time::{Duration, Instant};
use guest_rt::virtio::blk::{BlockDevice, MAX_TRANSFER};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Most operations at once.
const DEPTH_MAX: usize = 128;
/// What a host's O_DIRECT is content with.
const ALIGN: usize = 4096;

/// Where the operations go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Random,
    Sequential,
}

/// `KIND:BYTES:DEPTH:OPERATIONS:MS`, KIND one of `randread`, `randwrite`, `seqread`, `seqwrite`.
#[derive(Clone, Debug)]
pub struct Job {
    order: Order,
    writes: bool,
    bytes: usize,
    depth: usize,
    operations: u64,
    limit: Duration,
}

impl FromStr for Job {
    type Err = String;
    fn from_str(text: &str) -> Result<Job, String> {
        let mut words = text.split(':');
        let (order, writes) = match words.next() {
            Some("randread") => (Order::Random, false),
            Some("randwrite") => (Order::Random, true),
            Some("seqread") => (Order::Sequential, false),
            Some("seqwrite") => (Order::Sequential, true),
            other => return Err(format!("{other:?} is no kind")),
        };
        let mut number = || words.next().and_then(|w| w.parse::<u64>().ok()).ok_or("KIND:BYTES:DEPTH:OPERATIONS:MS");
        let (bytes, depth) = (number()? as usize, number()? as usize);
        let (operations, limit) = (number()?, Duration::from_millis(number()?));
        if bytes == 0 || bytes > MAX_TRANSFER || !bytes.is_multiple_of(ALIGN) {
            return Err(format!("{bytes} bytes an operation"));
        }
        if !(1..=DEPTH_MAX).contains(&depth) || operations == 0 {
            return Err(format!("{operations} operations, {depth} at a time"));
        }
        Ok(Job { order, writes, bytes, depth, operations, limit })
    }
}

#[derive(Clone, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

/// An aligned buffer.
struct Buffer(Vec<Page>);

impl Buffer {
    fn new(bytes: usize) -> Buffer {
        let mut pages = vec![Page::new_zeroed(); bytes / ALIGN];
        // Something else than zeroes, and pages that are there before the time is taken.
        pages.as_mut_bytes().fill(0x5a);
        Buffer(pages)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_bytes()
    }
}

/// What the tasks of one job share.
struct Progress {
    started: Cell<u64>,
    random: Cell<u64>,
    end: Instant,
}

impl Progress {
    /// The offset of the next operation, or none if it was the last.
    fn next(&self, job: &Job, places: u64) -> Option<u64> {
        let n = self.started.get();
        if n == job.operations || Instant::now() >= self.end {
            return None;
        }
        self.started.set(n + 1);
        let place = match job.order {
            Order::Sequential => n % places,
            Order::Random => {
                // xorshift64: the same places in each run.
                let mut x = self.random.get();
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                self.random.set(x);
                x % places
            }
        };
        Some(place * job.bytes as u64)
    }
}

/// Does a job; operations done, and nanoseconds they took.
pub async fn run(disk: &BlockDevice, job: &Job) -> Result<(u64, u64), String> {
    let places = disk.capacity() / job.bytes as u64;
    if places == 0 {
        return Err("the disk is too small".into());
    }
    let buffers: Vec<Buffer> = (0..job.depth).map(|_| Buffer::new(job.bytes)).collect();
    let start = Instant::now();
    let progress =
        Rc::new(Progress { started: Cell::new(0), random: Cell::new(0x9e37_79b9_7f4a_7c15), end: start + job.limit });
    let mut tasks = Vec::new();
    for buffer in buffers {
        let (disk, job, progress) = (disk.clone(), job.clone(), progress.clone());
        tasks.push(spawn(async move {
            let mut buffers = vec![buffer];
            while let Some(offset) = progress.next(&job, places) {
                let (back, result) = match job.writes {
                    true => disk.write(offset, buffers).await,
                    false => disk.read(offset, buffers).await,
                };
                buffers = back;
                result.map_err(|e| format!("{} bytes at {offset}: {e}", job.bytes))?;
            }
            Ok::<(), String>(())
        }));
    }
    for task in tasks {
        task.await?;
    }
    Ok((progress.started.get(), start.elapsed().as_nanos() as u64))
}
