//! Waiting for several descriptors with a time limit.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Most descriptors waited for at once.
pub const WAIT_MAX: usize = 16;

/// For what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Readable, or closed.
    Read,
    /// Writable, or closed.
    Write,
}

/// Waits until one of the descriptors is ready or the time is over (`None`: for ever); bit n of the answer is set if
/// `what[n]` is ready. A signal ends the wait.
///
/// # Panics
/// With more than [`WAIT_MAX`] descriptors.
pub fn wait(what: &[(RawFd, Interest)], timeout: Option<Duration>) -> io::Result<u32> {
    assert!(what.len() <= WAIT_MAX);
    let mut fds = [libc::pollfd { fd: -1, events: 0, revents: 0 }; WAIT_MAX];
    for (slot, (fd, interest)) in fds.iter_mut().zip(what) {
        slot.fd = *fd;
        slot.events = if *interest == Interest::Read { libc::POLLIN } else { libc::POLLOUT };
    }
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    let spec_ptr = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the array holds as many entries as said, the timeout is null or valid, no signal mask is given.
    let n = unsafe { libc::ppoll(fds.as_mut_ptr(), what.len() as libc::nfds_t, spec_ptr, std::ptr::null()) };
    if n < 0 {
        let e = io::Error::last_os_error();
        return if e.kind() == io::ErrorKind::Interrupted { Ok(0) } else { Err(e) };
    }
    let bits = fds.iter().enumerate().filter(|(_, f)| f.revents != 0).fold(0, |bits, (i, _)| bits | 1 << i);
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    /// An error here makes a loop around it poll: a destination did, for the half second behind each port.
    #[test]
    fn a_time_beyond_what_the_kernel_counts_is_waited_for_all_the_same() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        writer.write_all(&[1]).unwrap();
        assert_eq!(wait(&[(reader.as_raw_fd(), Interest::Read)], Some(Duration::MAX)).unwrap(), 1);
    }
}
