//! A pseudo terminal: any terminal program can be the console.
//!
//! Always true: the other side is kept open here, so that a terminal program may come and go; text nobody reads fills the
//! kernel's buffer and is lost beyond.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Result, host};

/// Longest name of a terminal.
const NAME_MAX: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Pty {
    ours: File,
    _theirs: File,
    path: PathBuf,
}

impl Pty {
    pub fn open() -> Result<Pty> {
        Pty::make().map_err(host("serial: pseudo terminal"))
    }

    fn make() -> io::Result<Pty> {
        let check = |rc: libc::c_int| if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) };
        // SAFETY: no memory is involved; the result is checked.
        let fd =
            check(unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC) })?;
        // SAFETY: the descriptor was just made and has no other owner.
        let ours = unsafe { File::from_raw_fd(fd) };
        let mut name = [0u8; NAME_MAX];
        // SAFETY: the descriptor is a pseudo terminal; the buffer is valid for its length.
        unsafe {
            check(libc::grantpt(fd))?;
            check(libc::unlockpt(fd))?;
            match libc::ptsname_r(fd, name.as_mut_ptr().cast(), NAME_MAX) {
                0 => {}
                e => return Err(io::Error::from_raw_os_error(e)),
            }
        }
        let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
        let path = PathBuf::from(name.to_str().map_err(io::Error::other)?);
        let theirs = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path)?;
        // The guest does the line editing, not the host.
        // SAFETY: an all-zero termios is a value; it is valid for both calls.
        unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            check(libc::tcgetattr(theirs.as_raw_fd(), &mut settings))?;
            libc::cfmakeraw(&mut settings);
            check(libc::tcsetattr(theirs.as_raw_fd(), libc::TCSANOW, &settings))?;
        }
        Ok(Pty { ours, _theirs: theirs, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        super::read_now(self.ours.as_raw_fd(), buffer).unwrap_or(0)
    }

    pub fn write(&mut self, text: &[u8]) {
        // What does not fit is lost.
        let _ = self.ours.write_all(text);
    }
}

impl AsRawFd for Pty {
    fn as_raw_fd(&self) -> RawFd {
        self.ours.as_raw_fd()
    }
}
