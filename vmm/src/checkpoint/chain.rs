//! Reading checkpoints: one, and all it needs.
//!
//! Always true of what [`open`] returns: each link names the next by its id and the checksum of its header, the last needs
//! none, all are of guests of one size, and each memory file is as long as its pages say. The checksums of pages are not looked at here.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use migration::checkpoint::{CHAIN_MAX, Checkpoint, STATE_FILE_MAX};

use super::{MEMORY_FILE, STATE_FILE, at};
use crate::error::{Error, Result};

/// A checkpoint of a chain.
pub(super) struct Link {
    pub dir: PathBuf,
    pub checkpoint: Checkpoint,
    pub memory: File,
}

/// Opens a file that must be one: nothing is waited for.
fn file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a file")) }
}

fn refused(dir: &Path, why: impl std::fmt::Display) -> Error {
    Error::State(format!("checkpoint {}: {why}", dir.display()))
}

/// Reads a state file; the checkpoint, and the checksum of its header. A place where there is none is a mistake in `path`.
pub(super) fn read_state(dir: &Path) -> Result<(Checkpoint, u64)> {
    let path = dir.join(STATE_FILE);
    let mut bytes = Vec::new();
    file(&path)
        .and_then(|file| file.take(STATE_FILE_MAX as u64 + 1).read_to_end(&mut bytes))
        .map_err(at("path", &path))?;
    if bytes.len() > STATE_FILE_MAX {
        return Err(refused(dir, format!("its state file is longer than {STATE_FILE_MAX} bytes")));
    }
    let checkpoint = Checkpoint::parse(&bytes).map_err(|e| refused(dir, e))?;
    Ok((checkpoint, Checkpoint::seal(&bytes).unwrap_or_default()))
}

/// A checkpoint and all it needs, the newest first.
pub(super) fn open(dir: &Path) -> Result<Vec<Link>> {
    let mut chain: Vec<Link> = Vec::new();
    let mut next = Some((dir.to_owned(), None));
    while let Some((dir, expected)) = next {
        if chain.len() == CHAIN_MAX {
            return Err(refused(&dir, format!("needs more than {CHAIN_MAX} others")));
        }
        let (checkpoint, seal) = match (read_state(&dir), chain.last()) {
            (Err(Error::Config(e)), Some(child)) => {
                let why = e.into_iter().map(|e| e.message).collect::<String>();
                return Err(refused(&child.dir, format!("its parent is missing: {why}")));
            }
            (read, _) => read?,
        };
        if let Some(child) = chain.last() {
            if Some((checkpoint.id, seal)) != expected {
                return Err(refused(&child.dir, format!("{} is not its parent", dir.display())));
            }
            if checkpoint.limit != child.checkpoint.limit {
                return Err(refused(&child.dir, format!("its parent {} is of another guest", dir.display())));
            }
        }
        let path = dir.join(MEMORY_FILE);
        let memory = file(&path).map_err(|e| refused(&dir, format!("{}: {e}", path.display())))?;
        let len = memory.metadata().map_err(|e| refused(&dir, e))?.len();
        if len < checkpoint.pages.memory_file_len() {
            let needed = checkpoint.pages.memory_file_len();
            return Err(refused(&dir, format!("its memory file was cut: {len} bytes, not {needed}")));
        }
        next = checkpoint.parent.as_ref().map(|p| (dir.join(&p.path), Some((p.id, p.seal))));
        chain.push(Link { dir, checkpoint, memory });
    }
    Ok(chain)
}
