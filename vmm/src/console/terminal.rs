//! Standard input, and the settings of the terminal it may be.
//!
//! On a terminal in whose foreground this process is, every key is the guest's: no line editing, no signals by keys.
//! Ctrl-A x ends the VM, Ctrl-A Ctrl-A is a Ctrl-A for the guest. Always true: the terminal gets back the settings it
//! had when the process ends, in order, by exit(3), by a panic, or by a fatal signal; only SIGKILL leaves it as it is
//! (`reset` helps).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Result, host};

const STDIN: RawFd = libc::STDIN_FILENO;
/// Most keys that wait for the guest.
const HELD_MAX: usize = 4096;
/// Ctrl-A, the key before a command to the monitor.
const ESCAPE: u8 = 1;
/// Signals that end the process past everything that puts the terminal right; SIGTERM and SIGINT only until there is who
/// ends it in order.
const FATAL: [libc::c_int; 11] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
];

/// The settings to be put back, and whether they are to be.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
static CHANGED: AtomicBool = AtomicBool::new(false);

/// See the module.
#[derive(Debug)]
pub(super) struct Input {
    terminal: bool,
    escaped: bool,
    ended: bool,
    /// Keys the guest has not taken yet: a terminal is read at once, for some of them are the monitor's.
    held: VecDeque<u8>,
}

impl Input {
    pub fn open() -> Result<Input> {
        // SAFETY: no memory is involved.
        let (terminal, foreground) = unsafe { (libc::isatty(STDIN) == 1, libc::tcgetpgrp(STDIN) == libc::getpgrp()) };
        if terminal && foreground {
            take_over().map_err(host("serial: terminal"))?;
        } else if terminal {
            log::warn!("serial: this process is in the background of its terminal and takes no input from it");
        }
        Ok(Input { terminal, escaped: false, ended: terminal && !foreground, held: VecDeque::new() })
    }

    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        if self.terminal {
            self.look();
            let n = buffer.len().min(self.held.len());
            for (to, from) in buffer.iter_mut().zip(self.held.drain(..n)) {
                *to = from;
            }
            return n;
        }
        match super::read_now(STDIN, buffer) {
            Some(0) if !buffer.is_empty() => self.ended = true,
            Some(n) if !self.ended => return n,
            _ => {}
        }
        0
    }

    /// Reads what was typed on a terminal, if it is one, and obeys what of it is for the monitor.
    pub fn look(&mut self) {
        let mut keys = [0; 64];
        while self.terminal && !self.ended {
            match super::read_now(STDIN, &mut keys) {
                None => break,
                Some(0) => self.ended = true,
                Some(n) => self.typed(&keys[..n]),
            }
        }
    }

    fn typed(&mut self, keys: &[u8]) {
        for byte in keys.iter().copied() {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => {
                    // The end in order, as from outside.
                    // SAFETY: no memory is involved.
                    unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
                }
                // Ctrl-A Ctrl-A is one; other keys are the guest's after all. More than it takes are lost.
                _ if self.held.len() < HELD_MAX => self.held.push_back(byte),
                _ => {}
            }
        }
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        STDIN
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        give_back();
    }
}

/// Makes every key the guest's.
fn take_over() -> io::Result<()> {
    let check = |rc: libc::c_int| if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: an all-zero termios is a value; it is valid for the call.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::tcgetattr(STDIN, &mut settings) })?;
    let before = *BEFORE.get_or_init(|| settings);
    CHANGED.store(true, Ordering::Release);
    // SAFETY: the handler is a function for this purpose.
    unsafe { libc::atexit(at_exit) };
    for signal in FATAL {
        // SAFETY: the action is valid; its handler does only what is allowed in one, and the default action follows it. A
        // stack of its own for the case that the thread's is used up.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fatal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
            check(libc::sigaction(signal, &action, std::ptr::null_mut()))?;
        }
    }
    // SAFETY: as above. The output's settings stay: the monitor's own messages go there as well.
    unsafe { libc::cfmakeraw(&mut settings) };
    settings.c_oflag = before.c_oflag;
    // SAFETY: as above.
    check(unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, &settings) })
}

/// Puts the terminal right, once. Only what is allowed in a signal handler.
fn give_back() {
    if CHANGED.swap(false, Ordering::AcqRel)
        && let Some(before) = BEFORE.get()
    {
        // SAFETY: the settings are valid for the call. A process that has gone to the background meanwhile would be
        // stopped by this call if it did not ignore the signal.
        unsafe {
            libc::signal(libc::SIGTTOU, libc::SIG_IGN);
            libc::tcsetattr(STDIN, libc::TCSANOW, before);
        }
    }
}

extern "C" fn at_exit() {
    give_back();
}

extern "C" fn on_fatal(signal: libc::c_int) {
    // SAFETY: allowed in a handler; an all-zero action is a value and valid for the call.
    let default = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_DFL
    };
    // Else somebody has taken the signal over since, to end in order, and has called this on the way.
    if default {
        give_back();
        // SAFETY: allowed in a handler. The default action is in place again: this ends the process.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_is_the_monitors_and_keys_that_wait_are_bounded() {
        let mut input = Input { terminal: true, escaped: false, ended: true, held: VecDeque::new() };
        input.typed(b"a\x01");
        // across reads, twice for itself, and with a key that is no command
        input.typed(b"\x01b\x01cd");
        assert_eq!(input.held, b"a\x01bcd");
        let mut buffer = [0; 4];
        assert_eq!((input.read(&mut buffer), &buffer), (4, b"a\x01bc"));
        for _ in 0..HELD_MAX {
            input.typed(b"xyz");
        }
        assert_eq!(input.held.len(), HELD_MAX);
    }
}
