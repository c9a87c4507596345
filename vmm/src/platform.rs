//! The platform device of a direct start: park, console, end, boot marks (`guest_abi::platform`).
//!
//! Everything stored here is hostile: addresses are checked, text is bounded by the register's 16 bits of length.

use std::io::Write;

use guest_abi::platform::{BOOT_MARK, CONSOLE, EXIT, PARK};
use vm_memory::{Bytes, GuestAddress};

use crate::console::Console;
use crate::memory::GuestRam;
use crate::stats::{BootTimes, Stats};

pub use crate::layout::PLATFORM_BASE;
/// Size of the page.
pub const PLATFORM_SIZE: u64 = 0x1000;

/// What the vCPU thread must do after a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Go on.
    None,
    /// Park for at most so many nanoseconds.
    Park(u64),
    /// The guest has ended.
    Exit(u32),
}

/// Handles a store of `data` at `offset` of the page.
pub fn store(offset: u64, data: &[u8], ram: &GuestRam, console: &mut Console, stats: &Stats) -> Action {
    let value = data.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    match (offset, data.len()) {
        (PARK, 8) => return Action::Park(value),
        (EXIT, 4) => return Action::Exit(value as u32),
        (CONSOLE, 8) => {
            let mut text = vec![0u8; (value >> 48) as usize];
            match ram.read_slice(&mut text, GuestAddress(value & 0xffff_ffff_ffff)) {
                Ok(()) => {
                    let _ = console.write_all(&text);
                }
                Err(e) => log::debug!("console text of the guest: {e}"),
            }
        }
        (BOOT_MARK, 4) => {
            if let Some(mark) = (value as usize).checked_sub(1).and_then(|i| stats.boot.marks.get(i)) {
                BootTimes::reach(mark);
            }
        }
        _ => stats.vcpu.unclaimed.inc(),
    }
    Action::None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SerialOutput;

    #[test]
    fn hostile_stores_do_nothing() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut console = Console::open(&SerialOutput::None).unwrap();
        let stats = Stats::default();
        let mut put = |offset, data: &[u8]| store(offset, data, &ram, &mut console, &stats);
        for offset in 0..PLATFORM_SIZE {
            for len in [1, 2, 4, 8] {
                let action = put(offset, &[0xff; 8][..len]);
                match (offset, len) {
                    (PARK, 8) => assert_eq!(action, Action::Park(u64::MAX)),
                    (EXIT, 4) => assert_eq!(action, Action::Exit(u32::MAX)),
                    _ => assert_eq!(action, Action::None),
                }
            }
        }
        assert_eq!(put(BOOT_MARK, &0u32.to_le_bytes()), Action::None);
    }

    #[test]
    fn text_reaches_the_console() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        ram.write_slice(b"hello", GuestAddress(0x100)).unwrap();
        let mut console = Console::open(&SerialOutput::File(path.clone())).unwrap();
        store(CONSOLE, &(5u64 << 48 | 0x100).to_le_bytes(), &ram, &mut console, &Stats::default());
        store(CONSOLE, &(5u64 << 48 | 0xfff).to_le_bytes(), &ram, &mut console, &Stats::default());
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
    }
}
