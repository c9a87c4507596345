//! Instants that two hosts, or two processes of one host, can compare.

use std::sync::OnceLock;

use migration::message::Stamp;

/// Now.
pub fn now() -> Stamp {
    Stamp { boot: boot_id(), mono_ns: clock_ns(libc::CLOCK_MONOTONIC), real_ns: clock_ns(libc::CLOCK_REALTIME) }
}

/// A clock in nanoseconds.
pub fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid; both clocks exist everywhere, and a failure would leave 0.
    unsafe { libc::clock_gettime(clock, &mut time) };
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}

/// The kernel's random id of this boot of the host; zero (equal to nobody's) if it cannot be read.
fn boot_id() -> [u8; 16] {
    static ID: OnceLock<[u8; 16]> = OnceLock::new();
    *ID.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        u128::from_str_radix(&digits, 16).map_or_else(|_| random_id(), u128::to_be_bytes)
    })
}

fn random_id() -> [u8; 16] {
    crate::boot::info::random().unwrap_or_default()
}
