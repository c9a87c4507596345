//! Images with a format of their own (qcow2, vmdk), through the crate imago.
//!
//! Owns the open image, the lock on it and on its backing files. Always true: no format is ever guessed from what is in a file:
//! a qcow2 image that names a backing file without its format is refused; backing files are only read; what is known of an image
//! (tables, sizes) was read under its lock, and is forgotten before the lock is given up.
//! Survives: images that lie about themselves, as errors.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use imago::file::File;
use imago::format::Format;
use imago::format::PreallocateMode;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::{DenyImplicitOpenGate, ImplicitOpenGate};
use imago::qcow2::Qcow2;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, StorageOpenOptions};

use super::SECTOR;
use super::image::{LOCK_PATIENCE, drop_cache, lock, lock_error, unlock};
use crate::config::DiskFormat;
use crate::error::{Result, host};

/// Longest chain of backing files.
const CHAIN_MAX: usize = 16;

/// See the module.
pub(super) struct FormatImage {
    path: PathBuf,
    format: DiskFormat,
    readonly: bool,
    /// `None` while another process has the image. Written to for what may not happen beside other I/O.
    access: RwLock<Option<FormatAccess<File>>>,
    sectors: AtomicU64,
    /// Behind `access`, which writes to it: locked as long as that is there.
    file: std::fs::File,
    backing: Backing,
}

impl FormatImage {
    /// Opens the image and its backing files.
    pub fn open(path: &Path, format: DiskFormat, readonly: bool) -> Result<FormatImage> {
        let image = FormatImage::open_unlocked(path, format, readonly)?;
        lock(&image.file, readonly, LOCK_PATIENCE).map_err(|e| lock_error(path, e))?;
        image.read().map_err(host(format!("disk {}", path.display())))?;
        Ok(image)
    }

    /// The file alone, which another process has locked: for [`FormatImage::take`]. Nothing is read.
    pub fn open_unlocked(path: &Path, format: DiskFormat, readonly: bool) -> Result<FormatImage> {
        let file = std::fs::File::options().read(true).write(!readonly).open(path);
        Ok(FormatImage {
            path: path.to_owned(),
            format,
            readonly,
            access: RwLock::new(None),
            sectors: AtomicU64::new(0),
            file: file.map_err(host(format!("disk {}", path.display())))?,
            backing: Backing::default(),
        })
    }

    /// Under the lock: opens what is in the file.
    fn read(&self) -> io::Result<()> {
        let gate = Gate { depth: 0, backing: self.backing.clone() };
        let options = || StorageOpenOptions::new().filename(&self.path).write(!self.readonly);
        let file = || File::from_open_file(self.file.try_clone()?, options());
        let access = match self.format {
            DiskFormat::Raw => return Err(io::Error::other("a raw image has no format")),
            DiskFormat::Qcow2 => {
                names_its_backing_format(&self.path, file()?)?;
                Qcow2::<File>::builder(file()?).write(!self.readonly).open(gate).map(FormatAccess::new)?
            }
            DiskFormat::Vmdk => {
                Vmdk::<File>::builder(file()?).write(!self.readonly).open(gate).map(FormatAccess::new)?
            }
        };
        self.sectors.store(access.size() / SECTOR, Ordering::Relaxed);
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = Some(access);
        Ok(())
    }

    /// Writes out and forgets what is known of the image, and gives its lock up. Nothing may be in flight.
    pub fn give(&self) -> io::Result<()> {
        self.flush()?;
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = None;
        unlock(&self.file)
    }

    /// Takes the lock, if nobody else has it, and reads the image anew; `forget`: what this host's page cache has is old.
    pub fn take(&self, forget: bool) -> io::Result<()> {
        lock(&self.file, self.readonly, Duration::ZERO)?;
        if forget {
            drop_cache(&self.file);
        }
        self.read().inspect_err(|_| {
            if let Err(e) = unlock(&self.file) {
                log::warn!("disk {}: {e}", self.path.display());
            }
        })
    }

    /// The open file.
    pub fn file(&self) -> &std::fs::File {
        &self.file
    }

    fn with<T>(&self, f: impl FnOnce(&FormatAccess<File>) -> io::Result<T>) -> io::Result<T> {
        self.access.read().unwrap_or_else(PoisonError::into_inner).as_ref().map_or_else(|| Err(away()), f)
    }

    fn with_alone<T>(&self, f: impl FnOnce(&mut FormatAccess<File>) -> io::Result<T>) -> io::Result<T> {
        self.access.write().unwrap_or_else(PoisonError::into_inner).as_mut().map_or_else(|| Err(away()), f)
    }

    /// Size in sectors; 0 as long as the image was never this process's.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// Whether it must not be written.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Makes the disk larger if it is smaller than `bytes`.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        self.with(|a| {
            let result = if bytes > a.size() { a.resize_grow(bytes, PreallocateMode::Zero) } else { Ok(()) };
            self.sectors.store(a.size() / SECTOR, Ordering::Relaxed);
            result
        })
    }

    /// Reads.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.with(|a| a.read(bytes, offset))
    }

    /// Writes.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(|a| a.write(bytes, offset))
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match unmap {
            true => self.with_alone(|a| a.discard_to_zero(offset, len)),
            false => self.with(|a| a.write_zeroes(offset, len)),
        }
    }

    /// Forgets a range.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with_alone(|a| a.discard_to_any(offset, len))
    }

    /// All that was written before is on the disk afterwards. Of an image that is another's there is nothing.
    pub fn flush(&self) -> io::Result<()> {
        match &*self.access.read().unwrap_or_else(PoisonError::into_inner) {
            Some(access) if !self.readonly => {
                access.flush()?;
                access.sync()
            }
            _ => Ok(()),
        }
    }
}

fn away() -> io::Error {
    io::Error::other("the image is another process's")
}

/// The backing files opened so far, locked for reading. They stay so while another process has the image: it may be opened
/// again where they cannot be found any more (a changed root).
#[derive(Clone, Default)]
struct Backing(Arc<Mutex<Vec<(PathBuf, std::fs::File)>>>);

impl Backing {
    fn open(&self, path: &Path) -> Result<std::fs::File> {
        let what = || format!("disk {}", path.display());
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !files.iter().any(|(known, _)| known == path) {
            let file = std::fs::File::open(path).map_err(host(what()))?;
            lock(&file, true, LOCK_PATIENCE).map_err(|e| lock_error(path, e))?;
            files.push((path.to_owned(), file));
        }
        let found = files.iter().find(|(known, _)| known == path).map(|(_, file)| file.try_clone());
        found.unwrap_or_else(|| Err(away())).map_err(host(what()))
    }
}

/// Who opens what an image refers to.
struct Gate {
    depth: usize,
    backing: Backing,
}

impl ImplicitOpenGate<File> for Gate {
    fn open_format<F: FormatDriverBuilder<File>>(&mut self, builder: F) -> io::Result<FormatAccess<File>> {
        if self.depth == CHAIN_MAX {
            return Err(io::Error::other(format!("more than {CHAIN_MAX} backing files")));
        }
        if F::FORMAT != Format::Raw {
            let path = builder.get_image_path().ok_or_else(|| io::Error::other("a backing file without a name"))?;
            if F::FORMAT == Format::Qcow2 {
                names_its_backing_format(&path, self.open_storage(StorageOpenOptions::new().filename(&path))?)?;
            }
        }
        let gate = Gate { depth: self.depth + 1, backing: self.backing.clone() };
        builder.open(gate).map(FormatAccess::new)
    }

    fn open_storage(&mut self, builder: StorageOpenOptions) -> io::Result<File> {
        let builder = builder.write(false);
        match builder.get_filename() {
            Some(path) => File::from_open_file(self.backing.open(path).map_err(io::Error::other)?, builder),
            None => imago::Storage::open(builder),
        }
    }
}

/// Refuses an image whose backing file would have to be looked at for its format.
fn names_its_backing_format(path: &Path, file: File) -> io::Result<()> {
    let image = Qcow2::<File>::builder(file).backing(None).open(DenyImplicitOpenGate::default())?;
    match (image.implicit_backing_file(), image.implicit_backing_format()) {
        (Some(file), None) => Err(io::Error::other(format!(
            "{} does not say which format its backing file {file} has; say it with: qemu-img rebase -u -b {file} -F FORMAT",
            path.display()
        ))),
        _ => Ok(()),
    }
}
