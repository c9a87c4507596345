//! Makes inputs out of inputs. The same seed gives the same.

/// Longest input that is made.
pub const INPUT_MAX: usize = 4096;

/// A generator of numbers (xorshift); not zero.
#[derive(Debug, Clone, Copy)]
pub struct Random(u64);

impl Random {
    /// From any seed.
    pub fn new(seed: u64) -> Random {
        // The finaliser of splitmix64: seeds that are close together are far apart afterwards.
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Random((z ^ z >> 31) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One below `n`, and 0 if there is none.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() >> 11) as usize % n.max(1)
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.number() >> 24) as u8).collect()
    }
}

/// A new input: one of the seeds, changed in some places, or nothing but noise.
pub fn input(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = match seeds.is_empty() || random.below(8) == 0 {
        true => {
            let n = 1 << random.below(10);
            random.bytes(n)
        }
        false => seeds[random.below(seeds.len())].clone(),
    };
    for _ in 0..random.below(8) {
        change(&mut bytes, seeds, random);
    }
    bytes.truncate(INPUT_MAX.max(seeds.iter().map(Vec::len).max().unwrap_or(0)));
    bytes
}

fn change(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    let rest = bytes.len() - at;
    match random.below(8) {
        0 if rest > 0 => bytes[at] ^= 1 << random.below(8),
        1 if rest > 0 => bytes[at] = (random.number() >> 24) as u8,
        2 => {
            // A number at an edge, in place of what is there.
            let width = 1 << random.below(4);
            let edges = [0, 1, 0x7f, 0xff, 0x1000, 0xffff, 0x7fff_ffff, u64::from(u32::MAX), u64::MAX];
            let value = edges[random.below(edges.len())].wrapping_sub(random.below(2) as u64);
            for (to, from) in bytes[at..].iter_mut().zip(&value.to_le_bytes()[..width]) {
                *to = *from;
            }
        }
        3 => {
            let n = 1 + random.below(16);
            let new = random.bytes(n);
            bytes.splice(at..at, new);
        }
        4 => {
            let n = random.below(32).min(rest);
            bytes.drain(at..at + n);
        }
        5 => {
            // A piece of it once more.
            let n = random.below(64).min(rest);
            let piece = bytes[at..at + n].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, piece);
        }
        6 if !seeds.is_empty() => {
            // A piece of another.
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len() + 1);
            let n = random.below(128).min(other.len() - from);
            bytes.splice(at..at, other[from..from + n].iter().copied());
        }
        7 if random.below(4) == 0 => bytes.truncate(at),
        _ => {}
    }
}
