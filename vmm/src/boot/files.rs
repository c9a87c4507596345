//! The files a VM is started from, kept open.
//!
//! Owns their descriptors: a reset begins the VM again from what it was started from, also when the process has become another
//! user's, sees another root directory, or may not open files any more. A file that was replaced by another of its name
//! meanwhile is not seen; one that was written to is.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Result, host};

/// An open file and its name.
#[derive(Debug)]
pub struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl BootFile {
    /// Opens `path`; `what` it is stands in errors.
    pub fn open(what: &'static str, path: &Path) -> Result<BootFile> {
        let file = File::open(path).map_err(host(format!("{what} {}", path.display())))?;
        Ok(BootFile { what, path: path.to_owned(), file })
    }

    /// Its name when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    pub fn size(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(host(self.name()))?.len())
    }

    /// To be read from its beginning. There is one position: one reader at a time.
    pub fn from_start(&self) -> Result<File> {
        let mut file = self.file.try_clone().map_err(host(self.name()))?;
        file.seek(SeekFrom::Start(0)).map_err(host(self.name()))?;
        Ok(file)
    }

    fn name(&self) -> String {
        format!("{} {}", self.what, self.path.display())
    }
}

/// What a VM is started from.
#[derive(Debug)]
pub struct BootFiles {
    /// The image.
    pub image: BootFile,
    /// The initial RAM disk.
    pub initrd: Option<BootFile>,
}

impl BootFiles {
    /// Opens both.
    pub fn open(image: &Path, initrd: Option<&Path>) -> Result<BootFiles> {
        let initrd = initrd.map(|path| BootFile::open("initrd", path)).transpose()?;
        Ok(BootFiles { image: BootFile::open("image", image)?, initrd })
    }
}
