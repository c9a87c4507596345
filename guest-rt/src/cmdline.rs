//! The kernel command line: words separated by blanks, `key`, `key=value` or `key="value with blanks"`.
use alloc::{string::String, vec::Vec};

/// Most devices taken from the command line.
pub const MAX_DEVICES: usize = 32;

/// A parsed command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cmdline {
    text: String,
    words: Vec<(String, Option<String>)>,
}

/// A device announced by `virtio_mmio.device=<size>@<base>:<irq>[:<id>]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Size of the register window in bytes.
    pub size: u64,
    /// Guest-physical address of the registers.
    pub base: u64,
    /// Interrupt line (not used: the drivers poll).
    pub irq: u32,
}

impl Cmdline {
    /// Parses a command line. Never fails: what is not understood is a word like any other.
    pub fn parse(text: &str) -> Cmdline {
        let mut words = Vec::new();
        let mut rest = text.trim_ascii_start();
        while !rest.is_empty() {
            let mut quoted = false;
            let end = rest
                .char_indices()
                .find(|&(_, c)| {
                    quoted ^= c == '"';
                    !quoted && c.is_ascii_whitespace()
                })
                .map_or(rest.len(), |(i, _)| i);
            let (word, after) = rest.split_at(end);
            words.push(match word.split_once('=') {
                Some((key, value)) => (key.into(), Some(value.trim_matches('"').into())),
                None => (word.trim_matches('"').into(), None),
            });
            rest = after.trim_ascii_start();
        }
        Cmdline { text: text.into(), words }
    }

    /// The whole line.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The value of the last `key=value`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.words.iter().rev().find(|(k, v)| k == key && v.is_some()).and_then(|(_, v)| v.as_deref())
    }

    /// All values of `key=value`, in order.
    pub fn get_all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.words.iter().filter(move |(k, _)| k == key).filter_map(|(_, v)| v.as_deref())
    }

    /// Whether `key` is there, with or without a value.
    pub fn has(&self, key: &str) -> bool {
        self.words.iter().any(|(k, _)| k == key)
    }

    /// The value of `key` as a number: decimal or `0x…`, with an optional suffix K, M or G.
    pub fn number(&self, key: &str) -> Option<u64> {
        number(self.get(key)?)
    }

    /// The virtio-mmio devices, in order; a word that does not parse gives `Err(word)`.
    pub fn mmio_devices(&self) -> impl Iterator<Item = Result<MmioDevice, &str>> {
        self.get_all("virtio_mmio.device").take(MAX_DEVICES).map(|word| device(word).ok_or(word))
    }
}

fn device(word: &str) -> Option<MmioDevice> {
    let (size, rest) = word.split_once('@')?;
    let (base, rest) = rest.split_once(':')?;
    let irq = rest.split(':').next()?;
    Some(MmioDevice { size: number(size)?, base: number(base)?, irq: u32::try_from(number(irq)?).ok()? })
}

/// Decimal or hexadecimal, with an optional suffix K, M or G.
pub fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests;
