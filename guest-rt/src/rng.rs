//! Random numbers: ChaCha20 as a generator, reseeded from fresh entropy.
//!
//! Seeded from the boot-info page's entropy, RDRAND where the CPU has it, and the TSC, all mixed by ChaCha's own
//! permutation (none is used as it is). The VMM writes new entropy on spawn and port; [`reseed`] mixes it in.
//! Good for sequence numbers, ports, verifiers and ids.
use crate::local::local;
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

local! {
    static RNG: RefCell<Rng> = RefCell::new(Rng::empty());
}

/// Seeds the generator at boot.
#[cfg(not(test))]
pub(crate) fn init() {
    reseed();
}

/// Mixes in the entropy there is now. Called at boot and when the VM was restored or ported.
#[cfg(not(test))]
pub fn reseed() {
    let identity = crate::identity::identity();
    RNG.with(|r| {
        let mut r = r.borrow_mut();
        r.mix(&identity.entropy);
        r.mix(&crate::time::tsc().to_le_bytes());
        for _ in 0..4 {
            if let Some(word) = crate::identity::rdrand() {
                r.mix(&word.to_le_bytes());
            }
        }
    });
}

/// 32 random bits.
pub fn random_u32() -> u32 {
    RNG.with(|r| r.borrow_mut().next_u32())
}

/// 64 random bits.
pub fn random_u64() -> u64 {
    RNG.with(|r| r.borrow_mut().next_u64())
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
    RNG.with(|r| *r.borrow_mut() = Rng::from_seed(seed));
}

#[cfg(test)]
mod tests;
