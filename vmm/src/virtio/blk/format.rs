//! Images with a format of their own (qcow2, vmdk), through the crate imago.
//!
//! Owns the open image, the lock on it and on its backing files. Always true: no format is ever guessed from what is in a file:
//! a qcow2 image that names a backing file without its format is refused; backing files are only read.
//! Survives: images that lie about themselves, as errors.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use imago::file::File;
use imago::format::Format;
use imago::format::PreallocateMode;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::{DenyImplicitOpenGate, ImplicitOpenGate};
use imago::qcow2::Qcow2;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, StorageOpenOptions};

use super::SECTOR;
use super::image::lock;
use crate::config::DiskFormat;
use crate::error::{Error, Result, host};

/// Longest chain of backing files.
const CHAIN_MAX: usize = 16;

/// See the module.
pub(super) struct FormatImage {
    /// Written to for what may not happen beside other I/O.
    access: RwLock<FormatAccess<File>>,
    readonly: bool,
    _locks: Vec<std::fs::File>,
}

impl FormatImage {
    /// Opens the image and its backing files.
    pub fn open(path: &Path, format: DiskFormat, readonly: bool) -> Result<FormatImage> {
        let what = || format!("disk {}", path.display());
        let locks = Locks::default();
        locks.take(path, readonly)?;
        let gate = Gate { depth: 0, locks: locks.clone() };
        let open = || match format {
            DiskFormat::Raw => Err(io::Error::other("a raw image has no format")),
            DiskFormat::Qcow2 => {
                names_its_backing_format(path)?;
                Qcow2::<File>::builder(open_file(path, !readonly)?).write(!readonly).open(gate).map(FormatAccess::new)
            }
            DiskFormat::Vmdk => {
                Vmdk::<File>::builder(open_file(path, !readonly)?).write(!readonly).open(gate).map(FormatAccess::new)
            }
        };
        let access = open().map_err(host(what()))?;
        Ok(FormatImage { access: RwLock::new(access), readonly, _locks: locks.into_files() })
    }

    fn with<T>(&self, f: impl FnOnce(&FormatAccess<File>) -> T) -> T {
        f(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn with_alone<T>(&self, f: impl FnOnce(&mut FormatAccess<File>) -> T) -> T {
        f(&mut self.access.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.with(FormatAccess::size) / SECTOR
    }

    /// Whether it must not be written.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Makes the disk larger if it is smaller than `bytes`.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        self.with(|a| if bytes > a.size() { a.resize_grow(bytes, PreallocateMode::Zero) } else { Ok(()) })
    }

    /// Reads.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.with(|a| a.read(bytes, offset))
    }

    /// Writes.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
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

    /// All that was written before is on the disk afterwards.
    pub fn flush(&self) -> io::Result<()> {
        self.with(|a| {
            a.flush()?;
            a.sync()
        })
    }
}

/// The files locked so far.
#[derive(Clone, Default)]
struct Locks(Arc<Mutex<Vec<std::fs::File>>>);

impl Locks {
    fn take(&self, path: &Path, readonly: bool) -> Result<()> {
        let what = || format!("disk {}", path.display());
        let file = std::fs::File::options().read(true).write(!readonly).open(path).map_err(host(what()))?;
        lock(&file, readonly).map_err(|e| match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => {
                Error::Conflict(format!("{}: in use by another process; an image has one writer", what()))
            }
            _ => host(format!("{}: lock", what()))(e),
        })?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(file);
        Ok(())
    }

    fn into_files(self) -> Vec<std::fs::File> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who opens what an image refers to.
struct Gate {
    depth: usize,
    locks: Locks,
}

impl ImplicitOpenGate<File> for Gate {
    fn open_format<F: FormatDriverBuilder<File>>(&mut self, builder: F) -> io::Result<FormatAccess<File>> {
        if self.depth == CHAIN_MAX {
            return Err(io::Error::other(format!("more than {CHAIN_MAX} backing files")));
        }
        if F::FORMAT != Format::Raw {
            let path = builder.get_image_path().ok_or_else(|| io::Error::other("a backing file without a name"))?;
            if F::FORMAT == Format::Qcow2 {
                names_its_backing_format(&path)?;
            }
        }
        let gate = Gate { depth: self.depth + 1, locks: self.locks.clone() };
        builder.open(gate).map(FormatAccess::new)
    }

    fn open_storage(&mut self, builder: StorageOpenOptions) -> io::Result<File> {
        if let Some(path) = builder.get_filename() {
            self.locks.take(path, true).map_err(io::Error::other)?;
        }
        imago::Storage::open(builder.write(false))
    }
}

fn open_file(path: &Path, write: bool) -> io::Result<File> {
    imago::Storage::open(StorageOpenOptions::new().filename(path).write(write))
}

/// Refuses an image whose backing file would have to be looked at for its format.
fn names_its_backing_format(path: &Path) -> io::Result<()> {
    let image = Qcow2::<File>::builder(open_file(path, false)?).backing(None).open(DenyImplicitOpenGate::default())?;
    match (image.implicit_backing_file(), image.implicit_backing_format()) {
        (Some(file), None) => Err(io::Error::other(format!(
            "{} does not say which format its backing file {file} has; say it with: qemu-img rebase -u -b {file} -F FORMAT",
            path.display()
        ))),
        _ => Ok(()),
    }
}
