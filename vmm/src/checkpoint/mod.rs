//! Checkpoints: a VM in a directory, and back.
//!
//! The formats are `migration::checkpoint`'s; the state is what a port sends, by the same code ([`crate::port`]). Here is what is
//! done with files and VMs: [`take`] writes a checkpoint while the VM goes on running, [`restore`] makes a VM of one. Always
//! true: a directory with the name that was asked for holds a whole checkpoint, whatever was killed or full when; a
//! checkpoint that could not be taken leaves the VM as it was; what does not fit together is refused before a guest runs.
//!
//! Survived: full and failing disks, SIGKILL and power failure at any instant (the directory gets its name last), checkpoints that
//! were cut, changed or mixed up. Not survived: a memory file that is changed or cut while a VM runs on top of it.

mod chain;
mod directory;
mod fill;
pub(crate) mod lineage;
mod pages;
mod place;
pub mod restore;
mod saved;
pub mod take;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, NetConfig, SerialOutput, TlsConfig};
use crate::error::{Error, FieldError};
use crate::sandbox::files;

pub use saved::Saved;

/// Name of the file with everything but memory.
pub const STATE_FILE: &str = "state";
/// Name of the file with the pages.
pub const MEMORY_FILE: &str = "memory";
/// Name of an empty file: the VM has been restored from this final checkpoint, who comes later makes a copy.
pub const RESTORED_FILE: &str = "restored";

/// Body of `POST /v1/vm/checkpoint`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Directory that is to be made.
    pub path: PathBuf,
    /// Only what has changed since this one, the last checkpoint of the VM, which is needed for a restore as well.
    #[serde(default)]
    pub parent: Option<PathBuf>,
    /// The VM ends with the checkpoint.
    #[serde(default)]
    pub stop: bool,
    /// Goes on recording which pages change, so that the next checkpoint can be given this one as its parent. Costs the guest a fault for
    /// the first write to a page, and keeps vhost-net off its queues.
    #[serde(default = "yes")]
    pub track: bool,
}

fn yes() -> bool {
    true
}

/// A checkpoint that was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CheckpointReport {
    /// Its random id.
    pub id: String,
    /// Its directory.
    pub path: PathBuf,
    /// Id of its parent.
    pub parent: Option<String>,
    /// Pages it speaks of.
    pub pages: u64,
    /// Of them, those in the memory file; the others are zero.
    pub raw_pages: u64,
    /// Length of what was written: pages and state file.
    pub bytes: u64,
    /// Pages that were copied while the guest stood still.
    pub residue_pages: u64,
    /// Times memory was gone through while the guest ran.
    pub rounds: u32,
    /// How long the guest stood still, in microseconds; missing if it had been paused or ended with the checkpoint.
    pub pause_us: Option<u64>,
    /// From the order to the end, in microseconds.
    pub elapsed_us: u64,
    /// Whether the guest waited for something, so that instances can be spawned from this one.
    pub at_rest: bool,
    /// Whether the VM has ended with it.
    pub stopped: bool,
}

/// Where a restored guest's memory is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RestoreMemory {
    /// The first checkpoint's memory file is mapped copy-on-write; what later ones add is read.
    #[default]
    Map,
    /// All of it is read before the guest runs, into large pages where the host has some.
    Read,
}

impl std::str::FromStr for RestoreMemory {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "map" => Ok(RestoreMemory::Map),
            "read" => Ok(RestoreMemory::Read),
            _ => Err(format!("{s:?}: must be map or read")),
        }
    }
}

/// Body of `PUT /v1/vm/restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Directory of the checkpoint.
    pub path: PathBuf,
    /// Where memory is.
    #[serde(default)]
    pub memory: RestoreMemory,
    /// Whether the checksums of mapped pages are checked before the guest runs. Those of pages that are read always are.
    #[serde(default = "yes")]
    pub verify: bool,
    /// Name of the VM, if not as the checkpoint says.
    #[serde(default)]
    pub name: Option<String>,
    /// Taps of this host, by the ids of the checkpoint's network devices; for one that is not named, what the checkpoint says holds.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Images of this host, by the ids of the checkpoint's disks; for one that is not named, what the checkpoint says holds.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Path of the vsock device's socket, if not as the checkpoint says.
    #[serde(default)]
    pub vsock: Option<PathBuf>,
    /// Console, if not as the checkpoint says.
    #[serde(default)]
    pub serial: Option<SerialOutput>,
    /// Where the ownership record lives, if not as the checkpoint says.
    #[serde(default)]
    #[schemars(schema_with = "crate::config::optional_socket_address_schema")]
    pub arbiter: Option<SocketAddr>,
    /// How ports of the VM are protected: the checkpoint does not say. Without it the VM cannot be ported.
    #[serde(default)]
    pub tls: Option<TlsConfig>,
}

impl RestoreRequest {
    /// From a directory, everything else as usual.
    pub fn new(path: PathBuf) -> RestoreRequest {
        RestoreRequest {
            path,
            memory: RestoreMemory::default(),
            verify: true,
            name: None,
            nets: Vec::new(),
            disks: Vec::new(),
            vsock: None,
            serial: None,
            arbiter: None,
            tls: None,
        }
    }
}

/// What failed with a path somebody gave, by the name of the field.
fn at(field: &'static str, path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.display().to_string();
    move |e| wrong(field, format!("{path}: {e}{}", files::hint(&e)))
}

fn wrong(field: &str, message: impl Into<String>) -> Error {
    Error::Config(vec![FieldError::new(field, message)])
}
