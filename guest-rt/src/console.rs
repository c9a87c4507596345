//! The console: `println!`, and the logger behind the `log` crate.
//!
//! A line is formatted into a buffer on the stack and printed at once: one exit a line under our VMM, no
//! allocation, so it also works in a panic. Lines longer than [`LINE`] are printed in pieces.
use crate::{cmdline::Cmdline, platform, time};
use core::fmt::{self, Write};

/// Longest line printed in one piece.
pub const LINE: usize = 1024;

/// Collects a line and prints it when it is full or dropped.
pub struct LineBuffer {
    bytes: [u8; LINE],
    len: usize,
}

impl LineBuffer {
    /// An empty line.
    pub const fn new() -> Self {
        LineBuffer { bytes: [0; LINE], len: 0 }
    }

    fn flush(&mut self) {
        if self.len > 0 {
            platform::print(&self.bytes[..self.len]);
            self.len = 0;
        }
    }
}

impl Default for LineBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for LineBuffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.as_bytes().chunks(LINE) {
            if piece.len() > LINE - self.len {
                self.flush();
            }
            self.bytes[self.len..self.len + piece.len()].copy_from_slice(piece);
            self.len += piece.len();
        }
        Ok(())
    }
}

impl Drop for LineBuffer {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Prints one line; behind [`crate::println!`].
pub fn print_line(arguments: fmt::Arguments<'_>) {
    let mut line = LineBuffer::new();
    // Writing to the buffer cannot fail; a Display that fails leaves a shorter line.
    let _ = line.write_fmt(arguments);
    let _ = line.write_str("\n");
}

/// Prints a line on the console.
#[macro_export]
macro_rules! println {
    ($($arguments:tt)*) => { $crate::console::print_line(::core::format_args!($($arguments)*)) };
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let now = time::Instant::now().as_nanos();
            print_line(format_args!(
                "[{:5}.{:06}] {:5} {}: {}",
                now / 1_000_000_000,
                now / 1_000 % 1_000_000,
                record.level(),
                record.target(),
                record.args()
            ));
        }
    }

    fn flush(&self) {}
}

/// Sets the logger up. `log=off|error|warn|info|debug|trace` on the command line, default info.
pub(crate) fn init(cmdline: &Cmdline) {
    static LOGGER: Logger = Logger;
    let level = cmdline.get("log").and_then(|l| l.parse().ok()).unwrap_or(log::LevelFilter::Info);
    // Fails only if a logger is set already, and this runs once.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}
