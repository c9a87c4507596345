//! Which image it is, as far as two processes can tell, which may be on two hosts.
//!
//! Always true: an image that cannot be told to be the same one is taken for another. Within one host device and inode numbers
//! say it. Between hosts a file must have the same inode number (as a file of a network file system has) and be seen locked,
//! which only the other process can have done; a block device must give itself the same name.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde::{Deserialize, Serialize};

use crate::port::stamp;

/// Longest name of a block device that is looked at.
const WWID_MAX: usize = 256;

/// See the module. The numbers are the kernel's (stat(2)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Id of the disk.
    pub id: String,
    /// The boot of the host that says so: its numbers of devices mean something to nobody else.
    pub boot: [u8; 16],
    /// A block device, not a file.
    pub is_device: bool,
    /// Number of the device, or of the one the file is on.
    pub device: u64,
    /// Inode number of a file.
    pub inode: u64,
    /// What a block device calls itself; may be empty.
    pub wwid: String,
    /// Length of file or device.
    pub bytes: u64,
}

impl Identity {
    /// That of an open file.
    pub fn of(id: &str, mut file: &File) -> io::Result<Identity> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        Ok(Identity {
            id: id.to_owned(),
            boot: stamp::now().boot,
            is_device,
            device: if is_device { metadata.rdev() } else { metadata.dev() },
            inode: if is_device { 0 } else { metadata.ino() },
            wwid: if is_device { wwid(metadata.rdev()) } else { String::new() },
            bytes: file.seek(SeekFrom::End(0))?,
        })
    }

    /// Whether both were found on one host.
    pub fn same_host(&self, other: &Identity) -> bool {
        self.boot == other.boot
    }

    /// Why `here` is not the image that the other process has (`self`), if so. `held`: it is seen locked by somebody.
    pub fn difference(&self, here: &Identity, held: bool) -> Option<String> {
        let kind = |is_device| if is_device { "a block device" } else { "a file" };
        if self.is_device != here.is_device {
            return Some(format!("{} here, {} at the source", kind(here.is_device), kind(self.is_device)));
        }
        if here.bytes < self.bytes {
            return Some(format!("has {} bytes here, {} at the source", here.bytes, self.bytes));
        }
        let another = format!("another image than at the source: {} of the same name", kind(self.is_device));
        let same = match (self.same_host(here), self.is_device) {
            (true, _) => (self.device, self.inode) == (here.device, here.inode),
            (false, true) if self.wwid.is_empty() || here.wwid.is_empty() => {
                return Some(
                    "a block device without a WWID: nobody can tell whether it is the one of the source".into(),
                );
            }
            (false, true) => self.wwid == here.wwid,
            (false, false) if self.inode == here.inode && !held => {
                return Some("the source's lock on the image is not seen here".into());
            }
            (false, false) => self.inode == here.inode,
        };
        (!same).then_some(another)
    }
}

/// The name a block device gives itself, over all hosts that see it.
fn wwid(device: u64) -> String {
    let dir = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let read = |name: &&str| std::fs::read_to_string(format!("{dir}/{name}")).ok();
    let found =
        ["wwid", "device/wwid", "dm/uuid", "md/uuid"].iter().filter_map(read).find(|text| !text.trim().is_empty());
    found.unwrap_or_default().trim().chars().take(WWID_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Identity {
        Identity {
            id: "disk0".into(),
            boot: [1; 16],
            is_device: false,
            device: 5,
            inode: 77,
            wwid: String::new(),
            bytes: 4096,
        }
    }

    #[test]
    fn on_one_host_numbers_decide() {
        assert_eq!(file().difference(&file(), false), None);
        assert_eq!(file().difference(&Identity { bytes: 8192, ..file() }, false), None, "it has grown");
        for other in [
            Identity { inode: 78, ..file() },
            Identity { device: 6, ..file() },
            Identity { is_device: true, ..file() },
            Identity { bytes: 4095, ..file() },
        ] {
            assert!(file().difference(&other, true).is_some(), "{other:?}");
        }
    }

    #[test]
    fn between_hosts_a_lock_or_a_name_decides() {
        let there = Identity { boot: [2; 16], device: 9, ..file() };
        assert_eq!(file().difference(&there, true), None);
        assert!(file().difference(&there, false).unwrap().contains("lock"));
        assert!(file().difference(&Identity { inode: 1, ..there.clone() }, true).unwrap().contains("another"));
        let device =
            |boot, wwid: &str| Identity { boot: [boot; 16], is_device: true, inode: 0, wwid: wwid.into(), ..file() };
        assert_eq!(device(1, "naa.5000").difference(&device(2, "naa.5000"), false), None);
        assert!(device(1, "naa.5000").difference(&device(2, "naa.5001"), true).unwrap().contains("another"));
        assert!(device(1, "").difference(&device(2, ""), true).unwrap().contains("WWID"));
    }

    #[test]
    fn a_file_is_itself_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(dir.path().join(name));
            let file = file.unwrap();
            file.set_len(512).unwrap();
            Identity::of("d", &file).unwrap()
        };
        std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("c")).unwrap();
        assert_eq!(of("a"), of("c"));
        assert!(of("a").difference(&of("b"), true).is_some());
        assert_eq!(of("a").bytes, 512);
    }
}
