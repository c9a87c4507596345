//! A disk of another process: QEMU's storage daemon.

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
        let _ = std::fs::remove_file(socket);
        let at = socket.display();
        let mut child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("file,node-name=disk,filename={image}"))
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={at}"
            ))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon (Debian: qemu-system-common)");
        while !socket.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the storage daemon has ended");
            std::thread::yield_now();
        }
        StorageDaemon { child, socket: socket.to_owned() }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
