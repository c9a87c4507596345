//! A small Linux machine for tests: Debian's cloud kernel, and an initial RAM disk ([`initrd()`]) with busybox, chosen programs
//! with the libraries they load, kernel modules, and an init script. Run by QEMU's software emulation of an AMD-V machine, it has
//! a `/dev/kvm` of its own; the same kernel is the guest there: see `cargo xtask test nested`.
//!
//! Always true: nothing is installed; the kernel is unpacked below the given directory and kept for the next time.
mod initrd;
mod kmod;
mod vmlinux;

pub use initrd::initrd;
pub use vmlinux::vmlinux;

use crate::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Debian's package that depends on the current cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bootable image.
    pub vmlinuz: PathBuf,
    /// `lib/modules/VERSION`.
    pub modules: PathBuf,
}

/// What goes into the initial RAM disk.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Programs (host path, path inside); the shared libraries they name go with them.
    pub programs: Vec<(PathBuf, String)>,
    /// Other files (host path, path inside).
    pub files: Vec<(PathBuf, String)>,
    /// Files (path inside, what is in them).
    pub texts: Vec<(String, String)>,
    /// Kernel modules by file name without `.ko`. Each goes to `/modules/NAME.ko` with those it needs; `/modules/NAME.order`
    /// says, one a line, what to load for it, itself last.
    pub modules: Vec<String>,
    /// `/init`, a busybox shell script.
    pub init: String,
}

/// The kernel, downloaded with apt and unpacked in `cache` unless it is there already.
pub fn kernel(cache: &Path) -> Result<Kernel, Error> {
    if let Some(found) = unpacked(cache)? {
        return Ok(found);
    }
    let download = cache.join("download");
    let deb = match fetch(&download) {
        Ok(deb) => deb,
        Err(_) => {
            // No package lists, or old ones.
            run(Command::new("apt-get").args(["-q", "update"]))?;
            fetch(&download)?
        }
    };
    // Unpacked beside and renamed, so that an interrupt leaves no half of a kernel.
    let partial = cache.join("partial");
    if partial.exists() {
        remove_dir(&partial)?;
    }
    run(Command::new("dpkg").arg("-x").arg(&deb).arg(&partial))?;
    let done = cache.join("kernel");
    std::fs::rename(&partial, &done).map_err(|source| Error::File { path: done, source })?;
    remove_dir(&download)?;
    unpacked(cache)?.ok_or_else(|| Error::Missing("vmlinuz in the kernel package".into()))
}

/// Downloads the kernel's package into an empty directory.
fn fetch(download: &Path) -> Result<PathBuf, Error> {
    if download.exists() {
        remove_dir(download)?;
    }
    create_dir(download)?;
    let depends = run(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
    let package = depends
        .lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "))
        .find(|p| p.starts_with("linux-image-"))
        .ok_or_else(|| Error::Missing(format!("package {META_PACKAGE}")))?;
    run(Command::new("apt-get").args(["-q", "download", package]).current_dir(download))?;
    find(download, &|name| name.ends_with(".deb"))?.ok_or_else(|| Error::Missing(package.to_owned()))
}

fn unpacked(cache: &Path) -> Result<Option<Kernel>, Error> {
    let root = cache.join("kernel");
    if !root.is_dir() {
        return Ok(None);
    }
    let vmlinuz = find(&root.join("boot"), &|name| name.starts_with("vmlinuz-"))?;
    let modules = find(&root.join("lib/modules"), &|_| true)?;
    Ok(vmlinuz.zip(modules).map(|(vmlinuz, modules)| Kernel { vmlinuz, modules }))
}

fn run(command: &mut Command) -> Result<String, Error> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let tool = words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let out = command.output().map_err(|source| Error::Tool { tool: tool.clone(), source })?;
    if !out.status.success() {
        let message = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        return Err(Error::Failed { tool, message });
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The first entry of a directory whose name passes.
fn find(dir: &Path, passes: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>, Error> {
    let at = |source| Error::File { path: dir.to_owned(), source };
    for entry in std::fs::read_dir(dir).map_err(at)? {
        let entry = entry.map_err(at)?;
        if entry.file_name().to_str().is_some_and(passes) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn find_deep(dir: &Path, passes: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>, Error> {
    let at = |source| Error::File { path: dir.to_owned(), source };
    for entry in std::fs::read_dir(dir).map_err(at)? {
        let entry = entry.map_err(at)?;
        if entry.file_type().map_err(at)?.is_dir() {
            if let Some(found) = find_deep(&entry.path(), passes)? {
                return Ok(Some(found));
            }
        } else if entry.file_name().to_str().is_some_and(passes) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn create_dir(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    std::fs::remove_dir_all(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    if let Some(parent) = to.parent() {
        create_dir(parent)?;
    }
    std::fs::copy(from, to).map(drop).map_err(|source| Error::File { path: from.to_owned(), source })
}
