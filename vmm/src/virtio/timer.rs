//! A timer as a descriptor, for devices that must do something later.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::{Result, host};

/// See the module.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer that does not run.
    pub fn new() -> Result<Timer> {
        // SAFETY: no memory is involved; the result is checked.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(host("timer")(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(Timer(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes it readable every `period` from now on; never again with zero.
    pub fn every(&self, period: Duration) -> Result<()> {
        let spec = libc::timespec { tv_sec: period.as_secs() as i64, tv_nsec: period.subsec_nanos().into() };
        let spec = libc::itimerspec { it_interval: spec, it_value: spec };
        // SAFETY: the specification is valid for the call; the old one is not asked for.
        let rc = unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &spec, std::ptr::null_mut()) };
        if rc != 0 { Err(host("timer")(io::Error::last_os_error())) } else { Ok(()) }
    }

    /// Whether it has expired since the last call.
    pub fn expired(&self) -> bool {
        let mut times = 0u64;
        // SAFETY: the buffer is valid for eight bytes.
        let n = unsafe { libc::read(self.0.as_raw_fd(), std::ptr::from_mut(&mut times).cast(), 8) };
        n == 8
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
