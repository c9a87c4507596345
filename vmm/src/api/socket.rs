//! The unix socket of the control interface.
//!
//! Always true: only its owner may use it; a file somebody listens on, or that is no socket, is never replaced; the file goes
//! when the process ends in order.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, host};

/// A bound socket, and its file while this lives.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    inode: u64,
    listener: Option<UnixListener>,
}

impl ControlSocket {
    /// Binds `path`, replacing the stale file of a process that is gone.
    pub fn bind(path: &Path) -> Result<ControlSocket> {
        let what = || format!("control socket {}", path.display());
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
        // SAFETY: no memory is involved. Called before there are other threads that make files.
        let umask = unsafe { libc::umask(0o177) };
        let listener = UnixListener::bind(path);
        // SAFETY: as above.
        unsafe { libc::umask(umask) };
        let listener = listener.map_err(host(what()))?;
        listener.set_nonblocking(true).map_err(host(what()))?;
        let inode = fs::symlink_metadata(path).map_err(host(what()))?.ino();
        Ok(ControlSocket { path: path.to_owned(), inode, listener: Some(listener) })
    }

    /// The listener, once.
    pub fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Not one that somebody has put there since.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
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
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(ControlSocket::bind(&path).unwrap_err().to_string().contains("another process"));
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(ControlSocket::bind(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
