//! A small file system for what a process writes, filled to the last block and inode, and freed again.
//!
//! A tmpfs in a mount namespace of the calling thread and its children: nobody else sees it, and nothing is left of it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const BLOCK: u64 = 4096;
/// The two images of the D-module's ownership table, of which a change replaces the older one; and where an image has its sequence.
const OWNER_IMAGES: [u64; 2] = [2 * BLOCK, 3 * BLOCK];
const SEQUENCE_AT: u64 = 8;

/// See the module.
pub struct Disk(PathBuf);

/// The calling thread mounts for itself from here on.
pub fn own_mounts() {
    // SAFETY: no memory is involved; only this thread changes its namespace.
    let rc = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the paths are valid for the call; the other pointers may be null (mount(2), changing the propagation type).
    let rc = unsafe {
        let flags = libc::MS_REC | libc::MS_PRIVATE;
        libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), flags, std::ptr::null())
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

impl Disk {
    /// At a directory that is there. After [`own_mounts`].
    pub fn mount(path: &Path) -> Disk {
        let at = c_path(path);
        let options = c"size=16m,nr_inodes=2k,huge=never";
        // SAFETY: all are valid for the call.
        let rc = unsafe { libc::mount(c"tmpfs".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast()) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        Disk(path.into())
    }

    /// No file can be made, and none grows by a byte: each ends where a block ends. Nobody writes meanwhile.
    pub fn fill(&self) {
        for entry in std::fs::read_dir(&self.0).unwrap() {
            let entry = entry.unwrap();
            let length = entry.metadata().unwrap().len();
            if entry.file_type().unwrap().is_file() && !length.is_multiple_of(BLOCK) {
                let mut file = OpenOptions::new().append(true).open(entry.path()).unwrap();
                file.write_all(&vec![b'\n'; (BLOCK - length % BLOCK) as usize]).unwrap();
            }
        }
        let mut filler = File::create(self.filler(0)).unwrap();
        fails_with_full((0..).find_map(|_| filler.write_all(&[0; BLOCK as usize]).err()));
        fails_with_full((1..).find_map(|n| File::create(self.filler(n)).err()));
    }

    /// There is room again.
    pub fn free(&self) {
        for n in 0.. {
            if std::fs::remove_file(self.filler(n)).is_err() {
                break;
            }
        }
    }

    /// The same for the D-module's disk in this file: a write needs room even where something was written before, as on storage that
    /// is thinly provisioned or copies on write. The D-module stands still meanwhile.
    pub fn fill_under(&self, image: &Path) {
        let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
        let sequence = |at: &u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at + SEQUENCE_AT).unwrap();
            u64::from_le_bytes(bytes)
        };
        let older = OWNER_IMAGES.into_iter().min_by_key(sequence).unwrap();
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        let rc = unsafe { libc::fallocate(file.as_raw_fd(), mode, older as i64, BLOCK as i64) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        self.fill();
        fails_with_full(file.write_all_at(&[0; BLOCK as usize], older).err());
    }

    fn filler(&self, number: usize) -> PathBuf {
        self.0.join(format!("filler{number}"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let at = c_path(&self.0);
        // SAFETY: the path is valid for the call.
        unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) };
    }
}

fn c_path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().unwrap()).unwrap()
}

fn fails_with_full(error: Option<std::io::Error>) {
    assert_eq!(error.and_then(|e| e.raw_os_error()), Some(libc::ENOSPC));
}
