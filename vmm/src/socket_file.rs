//! A listening unix socket and its file.
//!
//! Always true: only its owner may connect; a file somebody listens on, or that is no socket, is never replaced; the
//! file goes with this, unless somebody has put another there since.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, host};
use crate::sandbox::files::{self, Use};

/// Connections that may wait to be accepted.
const BACKLOG: libc::c_int = 64;

/// See the module.
#[derive(Debug)]
pub struct SocketFile {
    // Dropped first: nobody finds a file at which nobody listens.
    name: SocketName,
    listener: UnixListener,
}

/// The file alone, which goes with this.
#[derive(Debug)]
pub struct SocketName {
    path: PathBuf,
    /// Held open, so that no later file gets its inode number.
    file: File,
}

impl SocketFile {
    /// Listens at `path`, which is the configuration's `field`; never blocks. The stale file of a process that is gone is
    /// replaced.
    pub fn bind(field: &str, path: &Path) -> Result<SocketFile> {
        let what = || format!("{field}: socket {}", path.display());
        match fs::symlink_metadata(path) {
            Ok(m) if !m.file_type().is_socket() => {
                return Err(Error::Conflict(format!("{}: exists and is not a socket", what())));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(host(what()))?;
                }
                Ok(_) => return Err(Error::Conflict(format!("{}: another process listens on it", what()))),
                Err(e) => return Err(host(what())(e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(host(what())(e)),
        }
        let socket = socket().map_err(host(what()))?;
        // The file gets the mode of the socket: so nobody else can connect in between, and no other thread's files are
        // concerned as with umask(2).
        // SAFETY: no memory is involved.
        if unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) } != 0 {
            return Err(host(what())(io::Error::last_os_error()));
        }
        let (address, len) = address(path).map_err(host(what()))?;
        // SAFETY: the address is valid for its length.
        let rc = unsafe { libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
        // SAFETY: no memory is involved.
        if rc != 0 || unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } != 0 {
            return Err(host(what())(io::Error::last_os_error()));
        }
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(host(what()))?;
        files::allow_beside(path, Use::Remove);
        let name = SocketName { path: path.to_owned(), file };
        Ok(SocketFile { name, listener: UnixListener::from(socket) })
    }

    /// Gives the listener away, to a server that closes it when it ends: who comes after that is refused, while the file is
    /// still there.
    pub fn split(self) -> (UnixListener, SocketName) {
        (self.listener, self.name)
    }

    /// The next connection that waits, not blocking; `None` if none does.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsRawFd for SocketFile {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path).map(|m| (m.dev(), m.ino()));
        let ours = self.file.metadata().map(|m| (m.dev(), m.ino()));
        if matches!((there, ours), (Ok(there), Ok(ours)) if there == ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects to the socket at `path` without ever waiting: a listener that has no room is an error.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket()?;
    let (address, len) = address(path)?;
    // SAFETY: the address is valid for its length.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
    if rc != 0 { Err(io::Error::last_os_error()) } else { Ok(UnixStream::from(socket)) }
}

/// A stream socket that does not block.
fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as u16, sun_path: [0; 108] };
    // One is kept for the NUL.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a path a socket can have"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, (size_of::<libc::sa_family_t>() + bytes.len() + 1) as libc::socklen_t))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_is_replaced_live_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = SocketFile::bind("vsock.path", &path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(socket.accept().unwrap().is_none());
        let _client = connect(&path).unwrap();
        assert!(socket.accept().unwrap().is_some());
        let e = SocketFile::bind("vsock.path", &path).unwrap_err().to_string();
        assert!(e.contains("another process") && e.contains("vsock.path"), "{e}");
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(SocketFile::bind("vsock.path", &path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(connect(&dir.path().join("x".repeat(200))).is_err());
    }

    #[test]
    fn a_listener_given_away_ends_before_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, name) = SocketFile::bind("api-sock", &path).unwrap().split();
        let _client = connect(&path).unwrap();
        drop(listener);
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        // Another process may take the place meanwhile, and keeps it.
        let other = SocketFile::bind("api-sock", &path).unwrap();
        drop(name);
        connect(&path).unwrap();
        drop(other);
        assert!(!path.exists());
    }
}
