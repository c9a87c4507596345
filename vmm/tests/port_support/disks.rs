//! Disks of the guest that verifies them without end, and the locks of their images.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use super::{Echo, Vmm, eventually};

/// Sizes are in these.
pub const MIB: u64 = 1 << 20;

/// Runs a program to its good end; what it prints.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A file of holes.
pub fn sparse(path: PathBuf, size: u64) -> String {
    File::create(&path).unwrap().set_len(size).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A writer's lock on an image, as any other program takes it; `None`: somebody has one.
pub fn lock(path: &str) -> Option<File> {
    locked(path, libc::F_WRLCK)
}

/// A reader's lock on an image; `None`: somebody has a writer's.
pub fn read_lock(path: &str) -> Option<File> {
    locked(path, libc::F_RDLCK)
}

fn locked(path: &str, kind: libc::c_int) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the call reads one flock.
    (unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0).then_some(file)
}

/// Rounds of the disk job that a guest has finished in this process.
pub fn rounds(vmm: &Vmm) -> usize {
    std::fs::read_to_string(&vmm.console).unwrap_or_default().matches("disk: round").count()
}

/// The guest verifies on here, and this process has the lock.
pub fn works(vmm: &mut Vmm, echo: &mut Echo, image: &str) {
    let before = rounds(vmm);
    eventually("the disk job goes on", || {
        assert!(vmm.is_alive(), "{}", std::fs::read_to_string(&vmm.console).unwrap());
        echo.turn();
        (rounds(vmm) > before + 4).then_some(())
    });
    assert!(lock(image).is_none(), "the image is locked");
}
