//! Numbers out of an input. Whatever the bytes are, they say something; after the end everything is zero.

/// An input that is being read.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(&'a [u8]);

/// Values at which arithmetic goes wrong.
const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    16,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x1ff,
    0x200,
    0xfff,
    0x1000,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

impl<'a> Input<'a> {
    /// From the first byte.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `n` bytes, or fewer at the end.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn number(&mut self, n: usize) -> u64 {
        self.bytes(n).iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// A byte below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n.max(1)
    }

    /// Little-endian.
    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    /// Little-endian.
    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    /// Little-endian.
    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    /// Small, at an edge, or anything.
    pub fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => u64::from(self.u8()),
            1 => EDGES[self.below(EDGES.len())],
            2 => u64::from(self.u32()),
            _ => self.u64(),
        }
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}
