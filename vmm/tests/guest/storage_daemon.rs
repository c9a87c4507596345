//! A disk of another process: QEMU's storage daemon.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// QEMU's storage daemon with a raw image, which ends with the test.
pub struct StorageDaemon {
    child: Child,
    /// Where it listens.
    pub socket: PathBuf,
}

impl StorageDaemon {
    /// Serves `image` by vhost-user-blk at `socket`.
    pub fn start(socket: &Path, image: &str, queues: u16) -> StorageDaemon {
        let disk = format!("file,node-name=disk,filename={image}");
        StorageDaemon::run(socket, queues, &["--blockdev", &disk])
    }

    /// The same, with at most so many requests a second.
    pub fn slow(socket: &Path, image: &str, requests: u64) -> StorageDaemon {
        let group = format!("throttle-group,id=slow,limits.iops-total={requests}");
        let file = format!("file,node-name=file,filename={image}");
        let disk = "throttle,node-name=disk,file=file,throttle-group=slow";
        StorageDaemon::run(socket, 1, &["--object", &group, "--blockdev", &file, "--blockdev", disk])
    }

    fn run(socket: &Path, queues: u16, disk: &[&str]) -> StorageDaemon {
        let _ = std::fs::remove_file(socket);
        let at = socket.display();
        let mut child = Command::new("qemu-storage-daemon")
            .args(disk)
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={at}"
            ))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon (Debian: qemu-system-common)");
        while !is_listening(socket) {
            assert!(child.try_wait().unwrap().is_none(), "the storage daemon has ended");
            std::thread::yield_now();
        }
        StorageDaemon { child, socket: socket.to_owned() }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The file is there a moment before connections are accepted; a connection to find out would be served.
fn is_listening(socket: &Path) -> bool {
    /// The kernel's `__SO_ACCEPTCON`, in the column of flags.
    const LISTENS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/thread-self/net/unix").unwrap();
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(3) == Some(LISTENS) && words.last() == socket.to_str()
    })
}
