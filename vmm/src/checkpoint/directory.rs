//! The directory of a checkpoint, before it has its name.
//!
//! Owns a directory `.NAME.partial` beside the place where NAME is to be. Always true: NAME appears, whole and on the disk, by one rename or not
//! at all; what is given up is removed. What a process that was killed left behind is removed by the next that wants the name; while one
//! is at it (it holds a lock on the memory file), others are refused.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{MEMORY_FILE, STATE_FILE, at, wrong};
use crate::error::{Error, Result};

/// Only for the user: it is all of a guest's memory.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// See the module.
pub(super) struct Staging {
    path: PathBuf,
    parent: PathBuf,
    partial: PathBuf,
    /// The memory file, locked.
    memory: File,
    done: bool,
}

impl Staging {
    /// Makes the directory under its preliminary name. `path` must not exist.
    pub fn create(path: &Path) -> Result<Staging> {
        let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| {
            wrong("path", format!("{:?} does not end in the name of a directory (in UTF-8)", path.display()))
        })?;
        let parent = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let parent = fs::canonicalize(parent).map_err(at("path", parent))?;
        let (path, partial) = (parent.join(name), parent.join(format!(".{name}.partial")));
        match fs::symlink_metadata(&path) {
            Ok(_) => return Err(wrong("path", format!("{}: exists already", path.display()))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at("path", &path)(e)),
        }
        let make = || DirBuilder::new().mode(DIR_MODE).create(&partial);
        match make() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                clear(&partial)?;
                make()
            }
            result => result,
        }
        .map_err(at("path", &partial))?;
        let memory = create(&partial.join(MEMORY_FILE))
            .and_then(|file| file.try_lock().map(|()| file).map_err(io::Error::from))
            .map_err(|e| {
                let _ = fs::remove_dir_all(&partial);
                at("path", &partial)(e)
            })?;
        Ok(Staging { path, parent, partial, memory, done: false })
    }

    /// Where the checkpoint will be: an absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory it will be in.
    pub fn parent(&self) -> &Path {
        &self.parent
    }

    /// The memory file.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Writes the state file, brings everything to the disk and gives the directory its name.
    pub fn finish(mut self, state: &[u8]) -> Result<()> {
        self.publish(state).map_err(at("path", &self.path))?;
        self.done = true;
        Ok(())
    }

    fn publish(&self, state: &[u8]) -> io::Result<()> {
        self.memory.sync_all()?;
        let mut file = create(&self.partial.join(STATE_FILE))?;
        file.write_all(state)?;
        file.sync_all()?;
        File::open(&self.partial)?.sync_all()?;
        let parent = File::open(&self.parent)?;
        rename_new(&self.partial, &self.path)?;
        parent.sync_all().inspect_err(|_| {
            // Nobody can say whether the name is on the disk: the VM goes on, so it must not be.
            if let Err(e) = fs::rename(&self.path, &self.partial) {
                log::error!("{}: {e}: this checkpoint was given up, do not use it", self.path.display());
            }
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done
            && let Err(e) = fs::remove_dir_all(&self.partial)
        {
            log::warn!("{}: {e}", self.partial.display());
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(FILE_MODE).open(path)
}

/// Removes what a dead process left.
fn clear(partial: &Path) -> Result<()> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    match OpenOptions::new().write(true).custom_flags(flags).open(partial.join(MEMORY_FILE)).map(|f| f.try_lock()) {
        Ok(Err(TryLockError::WouldBlock)) => {
            return Err(Error::Conflict(format!("{}: somebody is writing a checkpoint there", partial.display())));
        }
        // It was killed before it had made the file, or the file is no obstacle.
        _ => log::info!("{}: what another process left is removed", partial.display()),
    }
    fs::remove_dir_all(partial).map_err(at("path", partial))
}

/// Renames, but does not replace.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let c = |p: &Path| std::ffi::CString::new(p.as_os_str().as_bytes()).map_err(io::Error::from);
    let (old, new) = (c(from)?, c(to)?);
    // SAFETY: both are C strings that live on.
    let rc =
        unsafe { libc::renameat2(libc::AT_FDCWD, old.as_ptr(), libc::AT_FDCWD, new.as_ptr(), libc::RENAME_NOREPLACE) };
    match io::Error::last_os_error() {
        _ if rc == 0 => Ok(()),
        // File systems that cannot. A directory that is not empty is not replaced by this either.
        e if e.raw_os_error() == Some(libc::EINVAL) => fs::rename(from, to),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_name_comes_last_and_what_is_given_up_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("one");
        let staging = Staging::create(&path).unwrap();
        assert_eq!(names(dir.path()), [".one.partial"]);
        drop(staging);
        assert!(names(dir.path()).is_empty());
        Staging::create(&path).unwrap().finish(b"state").unwrap();
        assert_eq!(names(dir.path()), ["one"]);
        assert_eq!(names(&path), ["memory", "state"]);
        assert!(Staging::create(&path).is_err_and(|e| e.to_string().contains("exists already")));
    }

    #[test]
    fn what_appears_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("one");
        let staging = Staging::create(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(staging.finish(b"state").is_err());
        assert_eq!(names(dir.path()), ["one"]);
        assert!(names(&path).is_empty());
    }

    #[test]
    fn leftovers_of_the_dead_go_and_the_living_are_let_be() {
        let dir = tempfile::tempdir().unwrap();
        let partial = dir.path().join(".one.partial");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join(MEMORY_FILE), b"half").unwrap();
        let at_it = Staging::create(&dir.path().join("one")).unwrap();
        let refused = Staging::create(&dir.path().join("one"));
        assert!(matches!(refused, Err(Error::Conflict(_))));
        at_it.finish(b"state").unwrap();
    }
}
