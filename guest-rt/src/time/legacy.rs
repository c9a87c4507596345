//! The clock where no VMM of ours supplies one: TSC frequency from the PIT or the LAPIC timer, date from the RTC.
use super::{clock, tsc};
use crate::platform::{inb, lapic_count, lapic_start, outb};
use guest_abi::ClockPage;

const PIT_HZ: u64 = 1_193_182;
/// Length of the measurement.
const CALIBRATION_MS: u64 = 10;
/// The LAPIC timer of QEMU and KVM: one tick a nanosecond.
const LAPIC_KHZ: u64 = 1_000_000;
/// Reads of a port before the device is taken for absent.
const PATIENCE: u32 = 1_000_000;
/// Lowest and highest TSC frequency that is believed.
const KHZ: core::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// Measures and reads all there is to know.
pub(super) fn calibrate() -> ClockPage {
    let (khz, source) = match pit() {
        Some(khz) => (khz, "PIT"),
        None => (lapic(), "LAPIC timer"),
    };
    let (mult, shift) = clock::scale(khz);
    let real = rtc();
    log::debug!("TSC {khz} kHz by the {source}; RTC {}", if real.is_some() { "read" } else { "absent" });
    ClockPage {
        seq: 0,
        generation: 1,
        tsc_base: tsc(),
        mono_ns_base: 0,
        real_ns_base: real.unwrap_or(0) * 1_000_000_000,
        mult,
        shift,
    }
}

/// TSC frequency in kHz by channel 0 of the PIT; `None` if it does not run. (Channel 2 would need port 0x61, which
/// QEMU's microvm has not.)
fn pit() -> Option<u64> {
    outb(0x43, 0x30); // channel 0, low then high byte, mode 0: down from there, once
    outb(0x40, 0xff);
    outb(0x40, 0xff);
    let wanted = PIT_HZ * CALIBRATION_MS / 1000;
    let (first, start) = (pit_count(), tsc());
    for _ in 0..PATIENCE {
        let (count, end) = (pit_count(), tsc());
        let ticks = u64::from(first.checked_sub(count)?);
        if ticks >= wanted {
            let khz = (end - start) * PIT_HZ / ticks / 1000;
            return KHZ.contains(&khz).then_some(khz);
        }
        if end - start > KHZ.end() * CALIBRATION_MS * 2 {
            break;
        }
    }
    None
}

/// The current count of channel 0.
fn pit_count() -> u16 {
    outb(0x43, 0x00); // hold it for reading
    u16::from_le_bytes([inb(0x40), inb(0x40)])
}

/// TSC frequency in kHz by the LAPIC timer, which the shim lets us start and read.
fn lapic() -> u64 {
    lapic_start(u32::MAX);
    let (from, start) = (lapic_count(), tsc());
    let wanted = (LAPIC_KHZ * CALIBRATION_MS) as u32;
    for _ in 0..PATIENCE {
        let count = lapic_count();
        let end = tsc();
        if from - count >= wanted {
            return ((end - start) * LAPIC_KHZ / u64::from(from - count)).clamp(*KHZ.start(), *KHZ.end());
        }
    }
    panic!("no clock: neither PIT nor LAPIC timer runs");
}

fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

/// Seconds since 1970 from the CMOS clock, which is taken to be in UTC.
fn rtc() -> Option<u64> {
    if cmos(0x0a) == 0xff {
        return None;
    }
    let read = || [0x00, 0x02, 0x04, 0x07, 0x08, 0x09].map(cmos);
    let mut last = [0; 6];
    for _ in 0..PATIENCE {
        // Not while it is being updated, and the same twice.
        if cmos(0x0a) & 0x80 != 0 {
            continue;
        }
        let now = read();
        if now == last {
            break;
        }
        last = now;
    }
    let status = cmos(0x0b);
    let value = |byte: u8| u64::from(if status & 4 == 0 { (byte >> 4) * 10 + (byte & 15) } else { byte });
    let hour = match status & 2 {
        0 => value(last[2] & 0x7f) % 12 + if last[2] & 0x80 != 0 { 12 } else { 0 },
        _ => value(last[2]),
    };
    let [second, minute, day, month, year] = [last[0], last[1], last[3], last[4], last[5]].map(value);
    ((1..=12).contains(&month) && (1..=31).contains(&day))
        .then(|| clock::unix_seconds(2000 + year, month, day, hour, minute, second))
}
