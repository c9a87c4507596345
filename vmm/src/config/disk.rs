//! What a user says of a disk.

use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{field, pairs};
use crate::error::FieldError;
use crate::limit::Limits;

/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 16;
/// Longest serial number (VIRTIO_BLK_ID_BYTES).
pub const SERIAL_MAX: usize = 20;
/// Longest path of a unix socket (`sun_path` less its NUL).
pub const SOCKET_PATH_MAX: usize = 107;

/// What is in an image file. Never guessed: a guest writes what it likes to a raw one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes and nothing else.
    #[default]
    Raw,
    /// QEMU's qcow2, with its backing files if it has some.
    Qcow2,
    /// VMware's, to be read only.
    Vmdk,
}

impl FromStr for DiskFormat {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "raw" => Ok(DiskFormat::Raw),
            "qcow2" => Ok(DiskFormat::Qcow2),
            "vmdk" => Ok(DiskFormat::Vmdk),
            _ => Err(format!("{s:?}: must be raw, qcow2 or vmdk")),
        }
    }
}

/// A virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name in metrics and messages; `disk0` and so on if not given.
    #[serde(default)]
    pub id: String,
    /// Image file or block device.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// Instead of a path: unix socket of a vhost-user-blk back end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// What is in the file.
    #[serde(default)]
    pub format: DiskFormat,
    /// Past the page cache (O_DIRECT): where file system and alignment allow it if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// Request queues.
    #[serde(default = "one")]
    pub queues: u16,
    /// What VIRTIO_BLK_T_GET_ID says; the id if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Most requests and bytes a second.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

impl Default for DiskConfig {
    fn default() -> DiskConfig {
        DiskConfig {
            id: String::new(),
            path: PathBuf::new(),
            vhost_user: None,
            readonly: false,
            format: DiskFormat::Raw,
            direct: None,
            queues: 1,
            serial: None,
            limits: Limits::default(),
        }
    }
}

fn is_empty(path: &std::path::Path) -> bool {
    path.as_os_str().is_empty()
}

fn one() -> u16 {
    1
}

impl DiskConfig {
    /// What is wrong with it, each by the path of its field below `at`.
    pub(crate) fn mistakes(&self, at: &str) -> Vec<FieldError> {
        let mut out = self.limits.mistakes(&format!("{at}.limits"));
        let mut bad = |name: &str, message: String| out.push(FieldError::new(format!("{at}.{name}"), message));
        match &self.vhost_user {
            None if is_empty(&self.path) => bad("path", "needs an image (path) or a back end (vhost_user)".into()),
            None => {
                if let Err(e) = std::fs::metadata(&self.path) {
                    bad("path", format!("{}: {e}", self.path.display()));
                }
            }
            Some(socket) => {
                if socket.as_os_str().len() > SOCKET_PATH_MAX || is_empty(socket) {
                    bad("vhost_user", format!("a path of 1 to {SOCKET_PATH_MAX} bytes"));
                } else if let Err(e) = std::fs::metadata(socket) {
                    bad("vhost_user", format!("{}: {e}; start the back end first", socket.display()));
                }
                for (name, given) in [
                    ("path", !is_empty(&self.path)),
                    ("format", self.format != DiskFormat::Raw),
                    ("direct", self.direct.is_some()),
                    ("readonly", self.readonly),
                    ("serial", self.serial.is_some()),
                    ("limits", !self.limits.is_none()),
                ] {
                    if given {
                        bad(name, "is the back end's to decide with vhost_user".into());
                    }
                }
            }
        }
        if !(1..=QUEUES_MAX).contains(&self.queues) {
            bad("queues", format!("must be from 1 to {QUEUES_MAX}"));
        }
        if self.serial.as_ref().is_some_and(|s| s.len() > SERIAL_MAX || !s.bytes().all(|b| b.is_ascii_graphic())) {
            bad("serial", format!("at most {SERIAL_MAX} printable ASCII characters without spaces"));
        }
        if self.format == DiskFormat::Vmdk && !self.readonly {
            bad("format", "vmdk can only be read: set readonly".into());
        }
        if self.format != DiskFormat::Raw && self.direct == Some(true) {
            bad("direct", "only raw images can be read and written past the page cache".into());
        }
        out
    }

    /// From `key=value,…`.
    pub(super) fn from_flag(s: &str) -> Result<DiskConfig, FieldError> {
        let mut disk = DiskConfig::default();
        for pair in pairs(s) {
            match pair? {
                ("id", v) => disk.id = v.to_owned(),
                ("path", v) => disk.path = v.into(),
                ("vhost_user", v) => disk.vhost_user = Some(v.into()),
                ("readonly", v) => disk.readonly = field("readonly", v)?,
                ("format", v) => disk.format = field("format", v)?,
                ("direct", v) => disk.direct = Some(field("direct", v)?),
                ("queues", v) => disk.queues = field("queues", v)?,
                ("serial", v) => disk.serial = Some(v.to_owned()),
                ("ops", v) => disk.limits.ops = Some(field("ops", v)?),
                ("bytes", v) => disk.limits.bytes = Some(field("bytes", v)?),
                (key, _) => {
                    let known = "id, path, vhost_user, readonly, format, direct, queues, serial, ops, bytes";
                    return Err(FieldError::new(key, format!("unknown; known are {known}")));
                }
            }
        }
        match is_empty(&disk.path) && disk.vhost_user.is_none() {
            true => Err(FieldError::new("path", "is missing")),
            false => Ok(disk),
        }
    }
}
