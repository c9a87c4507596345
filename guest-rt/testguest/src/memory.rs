//! The memory functions in assembly against the obvious Rust, and the heap.
use alloc::{boxed::Box, format, string::String, vec, vec::Vec};
use core::hint::black_box;
use guest_rt::println;
use guest_rt::time::{Duration, Instant};

unsafe extern "C" {
    fn memcpy(d: *mut u8, s: *const u8, n: usize) -> *mut u8;
    fn memmove(d: *mut u8, s: *const u8, n: usize) -> *mut u8;
    fn memset(d: *mut u8, c: i32, n: usize) -> *mut u8;
    fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32;
    fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32;
    fn strlen(s: *const u8) -> usize;
}

const SIZE: usize = 4096;

/// Lengths around every threshold of the assembly.
fn lengths() -> impl Iterator<Item = usize> {
    (0..140).chain([500, 511, 512, 513, 767, 768, 769, 800, 1024, 1500])
}

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// Pages [`write_for_ever`] works on.
const WRITTEN_PAGES: usize = 2048;
/// Words of a page it writes: so that a page takes it a few microseconds, however quick its first write is.
const WORDS: usize = PAGE / 8;
const PAGE: usize = 4096;

/// Writes page after page as quickly as it can, while others get their turn, and compares what it has written the time before:
/// more than a port can copy without slowing the guest down.
///
/// A page takes at least `pace`: how fast memory is written is then the test's choice, not the machine's.
pub async fn write_for_ever(pace: Duration) {
    let mut pages = vec![0u64; WRITTEN_PAGES * WORDS];
    for round in 1u64.. {
        for page in pages.chunks_exact_mut(WORDS) {
            let start = Instant::now();
            for word in page {
                assert_eq!(black_box(*word), round - 1, "memory has changed by itself");
                *word = round;
            }
            guest_rt::yield_now().await;
            while start.elapsed() < pace {
                guest_rt::yield_now().await;
            }
        }
    }
}

/// Blocks [`allocate_for_ever`] has at a time, at most.
const BLOCKS: usize = 400;
/// The longest of them.
const LONGEST: usize = 150_000;

/// Allocates, writes, grows, compares and frees blocks of all sizes, whole pages among them, while others get their turn: what it has freed
/// nobody needs, what it has not is as it was written.
pub async fn allocate_for_ever() {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    let mut pages: Vec<Box<Page>> = Vec::new();
    let whole = |block: &[u8]| {
        let fill = block[0];
        assert!(block.iter().all(|b| *b == fill), "a block of {} bytes has changed by itself", block.len());
    };
    loop {
        let random = guest_rt::rng::random_u64() as usize;
        let (what, fill, size, at) = (random % 8, (random >> 8) as u8, 1 + (random >> 16) % LONGEST, random >> 40);
        match what {
            0..4 if blocks.len() < BLOCKS => {
                let size = if what == 0 { 1 + size % 100 } else { size };
                // Without writing zeros first: what is there is not expected to be anything.
                let mut block = Vec::with_capacity(size);
                block.extend(core::iter::repeat_n(fill, size));
                blocks.push(block);
            }
            4 if !blocks.is_empty() => {
                let at = at % blocks.len();
                let fill = blocks[at][0];
                blocks[at].resize(size, fill);
                blocks[at].shrink_to_fit();
            }
            5 if pages.len() < 4 * BLOCKS => pages.extend((0..32).map(|_| Box::new(Page([fill; PAGE])))),
            6 if !pages.is_empty() => {
                let from = at % pages.len();
                pages.drain(from..).for_each(|page| whole(&page.0));
            }
            _ if !blocks.is_empty() => whole(&blocks.swap_remove(at % blocks.len())),
            _ => {}
        }
        guest_rt::yield_now().await;
    }
}

/// What the heap takes for a page.
#[repr(align(4096))]
struct Page([u8; PAGE]);

pub fn run() -> Result<(), String> {
    let fresh = pattern();
    for n in lengths() {
        for (d, s) in [(0, 2048), (3, 2051), (2048, 1), (100, 100 + n), (64, 72), (72, 64), (64, 65), (65, 64), (9, 40)]
        {
            let overlap = d < s + n && s < d + n;
            let mut expected = fresh.clone();
            for i in 0..n {
                // Byte by byte, or it would be made a memcpy.
                expected[d + i] = black_box(fresh[s + i]);
            }
            for (name, function) in [("memcpy", memcpy as unsafe extern "C" fn(_, _, _) -> _), ("memmove", memmove)] {
                if overlap && name == "memcpy" {
                    continue;
                }
                let mut got = fresh.clone();
                let p = got.as_mut_ptr();
                // SAFETY: both ranges lie inside the buffer.
                let r = unsafe { function(p.add(d), p.add(s), n) };
                if got != expected || r as usize != p as usize + d {
                    return Err(format!("{name} of {n} bytes from {s} to {d}"));
                }
            }
        }
        for c in [0, 0x5a, 0x1ff] {
            let (mut got, mut expected) = (fresh.clone(), fresh.clone());
            for b in &mut expected[5..5 + n] {
                *b = black_box(c as u8);
            }
            // SAFETY: inside the buffer.
            unsafe { memset(got.as_mut_ptr().add(5), c, n) };
            if got != expected {
                return Err(format!("memset of {n} bytes"));
            }
        }
        for at in (0..n).step_by(3).chain([n]) {
            let mut other = fresh.clone();
            if at < n {
                other[at] = other[at].wrapping_add(100);
            }
            let expected =
                fresh[..n].iter().zip(&other[..n]).map(|(a, b)| i32::from(*a) - i32::from(*b)).find(|d| *d != 0);
            // SAFETY: inside the buffers.
            let (got, same) =
                unsafe { (memcmp(fresh.as_ptr(), other.as_ptr(), n), bcmp(fresh.as_ptr(), other.as_ptr(), n)) };
            if got.signum() != expected.unwrap_or(0).signum() || (same == 0) != expected.is_none() {
                return Err(format!("memcmp of {n} bytes that differ at {at}"));
            }
        }
        let mut string = vec![1u8; n];
        string.push(0);
        // SAFETY: the string ends in a NUL.
        if unsafe { strlen(string.as_ptr()) } != n {
            return Err(format!("strlen of {n}"));
        }
    }
    let boxes: Vec<Vec<u64>> = (0..1000).map(|i| vec![i; 1 + i as usize % 300]).collect();
    for (i, b) in boxes.iter().enumerate() {
        if b.iter().any(|&v| v != i as u64) {
            return Err(format!("allocation {i} was overwritten"));
        }
    }
    println!("memory functions and heap are right");
    Ok(())
}
