//! Random numbers: ChaCha20 as a generator, reseeded from fresh entropy.
//!
//! Seeded from the boot-info page's entropy, RDRAND where the CPU has it, and the TSC, all mixed by ChaCha's own
//! permutation (none is used as it is). Always true: what is there anew when the clock page's generation has changed (the
//! VMM writes new entropy for an instance) is mixed in before the next number is drawn, whoever draws it: copies of one VM
//! draw the same numbers only up to the instant they were copied.
//! Good for sequence numbers, ports, verifiers and ids.
use crate::local::local;
use crate::time;
use core::cell::RefCell;

/// The generator: 32 bytes of key, replaced after every block, so that past output cannot be found from it.
pub struct Rng {
    key: [u32; 8],
    block: [u32; 16],
    used: usize,
    counter: u64,
}

impl Rng {
    const fn empty() -> Rng {
        Rng { key: [0; 8], block: [0; 16], used: 16, counter: 0 }
    }

    /// From a seed, for tests.
    pub fn from_seed(seed: &[u8]) -> Rng {
        let mut rng = Rng::empty();
        rng.mix(seed);
        rng
    }

    /// Mixes bytes into the state.
    pub fn mix(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(32) {
            for (i, byte) in chunk.iter().enumerate() {
                self.key[i / 4] ^= u32::from(*byte) << (8 * (i % 4));
            }
            self.refill();
        }
    }

    fn refill(&mut self) {
        self.counter += 1;
        self.block = chacha20(&self.key, self.counter);
        self.key.copy_from_slice(&self.block[..8]);
        self.used = 8; // the first half became the key
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used >= 16 {
            self.refill();
        }
        self.used += 1;
        core::mem::take(&mut self.block[self.used - 1])
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }
}

fn chacha20(key: &[u32; 8], counter: u64) -> [u32; 16] {
    let mut s = [0u32; 16];
    s[..4].copy_from_slice(&[0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]);
    s[4..12].copy_from_slice(key);
    s[12] = counter as u32;
    s[13] = (counter >> 32) as u32;
    let start = s;
    for _ in 0..10 {
        for [a, b, c, d] in [
            [0, 4, 8, 12],
            [1, 5, 9, 13],
            [2, 6, 10, 14],
            [3, 7, 11, 15],
            [0, 5, 10, 15],
            [1, 6, 11, 12],
            [2, 7, 8, 13],
            [3, 4, 9, 14],
        ] {
            s[a] = s[a].wrapping_add(s[b]);
            s[d] = (s[d] ^ s[a]).rotate_left(16);
            s[c] = s[c].wrapping_add(s[d]);
            s[b] = (s[b] ^ s[c]).rotate_left(12);
            s[a] = s[a].wrapping_add(s[b]);
            s[d] = (s[d] ^ s[a]).rotate_left(8);
            s[c] = s[c].wrapping_add(s[d]);
            s[b] = (s[b] ^ s[c]).rotate_left(7);
        }
    }
    for (word, first) in s.iter_mut().zip(start) {
        *word = word.wrapping_add(first);
    }
    s
}

/// The generator, and the generation of the clock page it was last seeded in.
struct Seeded {
    rng: Rng,
    generation: Option<u32>,
}

local! {
    static RNG: RefCell<Seeded> = RefCell::new(Seeded { rng: Rng::empty(), generation: None });
}

/// Draws from the generator, which is seeded first if it has not been in this generation.
fn draw<R>(numbers: impl FnOnce(&mut Rng) -> R) -> R {
    RNG.with(|r| {
        let mut seeded = r.borrow_mut();
        let generation = Some(time::generation());
        if seeded.generation != generation {
            seeded.generation = generation;
            source::mix_into(&mut seeded.rng);
        }
        numbers(&mut seeded.rng)
    })
}

/// 32 random bits.
pub fn random_u32() -> u32 {
    draw(Rng::next_u32)
}

/// 64 random bits.
pub fn random_u64() -> u64 {
    draw(Rng::next_u64)
}

/// Fills a buffer with random bytes.
pub fn fill(bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random_u64().to_le_bytes()[..chunk.len()]);
    }
}

/// Makes a test's random numbers its own.
#[cfg(test)]
pub(crate) fn seed_for_test(seed: &[u8]) {
    let generation = Some(time::generation());
    RNG.with(|r| *r.borrow_mut() = Seeded { rng: Rng::from_seed(seed), generation });
}

/// Where entropy comes from.
#[cfg(not(test))]
mod source {
    use crate::identity::{identity, rdrand};
    /// Words of RDRAND.
    const WORDS: usize = 4;

    pub(super) fn mix_into(rng: &mut super::Rng) {
        rng.mix(&identity().entropy);
        rng.mix(&crate::time::tsc().to_le_bytes());
        for word in core::iter::repeat_with(rdrand).take(WORDS).flatten() {
            rng.mix(&word.to_le_bytes());
        }
    }
}

/// In host tests entropy is what they say.
#[cfg(test)]
pub(crate) mod source {
    std::thread_local! {
        pub(crate) static ENTROPY: core::cell::Cell<[u8; 32]> = const { core::cell::Cell::new([0; 32]) };
    }
    pub(super) fn mix_into(rng: &mut super::Rng) {
        rng.mix(&ENTROPY.get());
    }
}

#[cfg(test)]
mod tests;
