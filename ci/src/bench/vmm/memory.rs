//! What a process that runs a VM needs beside the memory of its guest.
use anyhow::{Context, Result, bail};

const MIB: u64 = 1 << 20;

/// Resident bytes of a process less those of its guest memory.
pub fn beyond_guest(pid: u32, guest_bytes: u64) -> Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read smaps")?;
    let mut rest = 0;
    let mut guest_seen = false;
    for (size, resident) in mappings(&smaps) {
        if size >= guest_bytes && !guest_seen {
            guest_seen = true;
            // A mapping next to guest memory may be shown as one with it.
            rest += (size - guest_bytes).min(resident.saturating_sub(guest_bytes));
        } else {
            rest += resident;
        }
    }
    if !guest_seen {
        bail!("process {pid} has no mapping of {} MiB: cannot tell guest memory from the rest", guest_bytes / MIB);
    }
    Ok(rest)
}

/// (size, resident) of every mapping, in bytes.
fn mappings(smaps: &str) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next().and_then(|v| v.parse::<u64>().ok()));
        match (name, value) {
            (Some("Size:"), Some(kib)) => all.push((kib * 1024, 0)),
            (Some("Rss:"), Some(kib)) => {
                if let Some(last) = all.last_mut() {
                    last.1 = kib * 1024;
                }
            }
            _ => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_are_read() {
        let smaps = "7f00-7f01 rw-p 00 00:00 0\nSize:      32768 kB\nKernelPageSize: 4 kB\nRss:   1024 kB\nPss: 1 kB\n\
                     7f05-7f06 r--p\nSize: 8 kB\nRss: 4 kB\n";
        assert_eq!(mappings(smaps), [(32 << 20, 1 << 20), (8192, 4096)]);
    }

    #[test]
    fn this_process_has_a_mapping_to_tell_apart() {
        let big = vec![1u8; 64 << 20];
        let rest = beyond_guest(std::process::id(), 64 << 20).unwrap();
        assert!(rest > 100_000 && rest < (60 << 20), "{rest} {}", big.len());
        assert!(beyond_guest(std::process::id(), 1 << 45).is_err());
    }
}
