//! Namespaces (namespaces(7)), entered before anything is opened and before there are other threads.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::error::{Error, FieldError, Result, host};

/// Where ip-netns(8) keeps the network namespaces that have a name.
const NAMED: &str = "/run/netns";

/// What a process can have of its own without being born into it.
const OWN: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;

/// Enters a network namespace: a file, or a name where there is no `/` in it.
pub fn enter_network(namespace: &Path) -> Result<()> {
    let path = match namespace.to_str() {
        Some(name) if !name.contains('/') => Path::new(NAMED).join(name),
        _ => PathBuf::from(namespace),
    };
    let wrong = |e: io::Error| Error::Config(vec![FieldError::new("--netns", format!("{}: {e}", path.display()))]);
    let file = File::open(&path).map_err(wrong)?;
    // SAFETY: no memory is involved.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(wrong(io::Error::last_os_error()));
    }
    Ok(())
}

/// Leaves the namespaces of whoever started this process. What is mounted outside later is seen here, but not the other way round.
pub fn unshare() -> Result<()> {
    let failed = |what: &str| host(format!("--unshare: {what}"))(io::Error::last_os_error());
    // SAFETY: no memory is involved.
    if unsafe { libc::unshare(OWN) } != 0 {
        return Err(failed("namespaces of its own"));
    }
    let flags = libc::MS_REC | libc::MS_SLAVE;
    // SAFETY: the path is valid for the call; the other pointers may be null (mount(2), changing the propagation type).
    if unsafe { libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), flags, std::ptr::null()) } != 0 {
        return Err(failed("mounts"));
    }
    Ok(())
}
