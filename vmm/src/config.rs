//! The configuration of a VM, as JSON file or flags.
//!
//! Owns the shapes a user writes and their checks. Always true: a [`Config`] that [`Config::validate`] accepted can fail
//! later only for what the host lacks. All mistakes are reported at once, each by the path of its field.

pub mod cli;
mod devices;
mod disk;
mod net;
pub(crate) mod parts;
mod tls;
mod units;

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, FieldError, Result};
use crate::layout::{CPUS_MAX, DEVICES_MAX};
use crate::memory::{HUGE_PAGE, MEMORY_MAX};
pub use devices::{BALLOON_ID, BalloonConfig, RNG_ID, RngConfig, VSOCK_ID, VsockConfig};
pub use disk::{DiskConfig, DiskFormat, QUEUES_MAX as DISK_QUEUES_MAX};
pub use net::{NetConfig, Vhost};
pub use parts::ConfigPatch;
pub use tls::{TlsConfig, TlsFiles};
pub use units::{MacAddress, MemorySize, optional_socket_address_schema, socket_address_schema};

/// Most disks of a VM.
pub const DISKS_MAX: usize = 8;
/// Most network devices of a VM.
pub const NETS_MAX: usize = 8;
/// Most devices there can be one of.
const SINGLE_MAX: usize = 3;
const _: () = assert!(DISKS_MAX + NETS_MAX + SINGLE_MAX <= DEVICES_MAX);
/// Longest id of a device and longest name of a VM.
pub const ID_MAX: usize = 64;
/// Largest configuration file.
const FILE_MAX: u64 = 1 << 20;
/// Longest command line of Linux (COMMAND_LINE_SIZE less its NUL).
pub const LINUX_CMDLINE_MAX: usize = 2047;

/// How the image is started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BootMode {
    /// Directly in ring 3 where the image has the note for it, else PVH.
    #[default]
    Auto,
    /// Directly in ring 3.
    Direct,
    /// PVH.
    Pvh,
    /// The Linux boot protocol, for a bzImage.
    Linux,
}

/// What a reset by the guest does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// As a machine does (`reboot`); but our own images, which end by a reset where they find no better way, end (`exit`).
    #[default]
    Auto,
    /// The VM begins again, in this process.
    Reboot,
    /// The VM ends.
    Exit,
}

impl OnReset {
    /// What it comes to for an image; `ours`: it carries the note for a direct start.
    pub fn of_image(self, ours: bool) -> OnReset {
        match (self, ours) {
            (OnReset::Auto, true) => OnReset::Exit,
            (OnReset::Auto, false) => OnReset::Reboot,
            (given, _) => given,
        }
    }
}

/// Where the 16550 at 0x3f8 and the guest's console print to, and where the former's input comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SerialOutput {
    /// The process's standard output.
    #[default]
    Stdout,
    /// Nowhere.
    None,
    /// The process's standard output and input; keys go to the guest as they are.
    Stdio,
    /// A pseudo terminal that is made for it.
    Pty,
    /// Appended to a file.
    File(PathBuf),
    /// Whoever connects to this unix socket, one at a time.
    Socket(PathBuf),
}

/// A whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// For people.
    #[serde(default)]
    pub name: String,
    /// Key of the ownership record; 0: none.
    #[serde(default)]
    pub vm_id: u64,
    /// ELF image or Linux bzImage.
    #[serde(default)]
    pub image: PathBuf,
    /// Initial RAM disk, for Linux.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// How it is started.
    #[serde(default)]
    pub boot: BootMode,
    /// Kernel command line; for our own images devices are appended.
    #[serde(default)]
    pub cmdline: String,
    /// Guest memory.
    #[serde(default)]
    pub memory: MemorySize,
    /// Guest memory can be given to other processes; so it is in any case where a device needs it (vhost-user).
    #[serde(default)]
    pub memory_shared: bool,
    /// vCPUs.
    #[serde(default = "one_cpu")]
    pub cpus: u32,
    /// What a reset by the guest does.
    #[serde(default)]
    pub on_reset: OnReset,
    /// Disks.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Entropy source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngConfig>,
    /// Memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Streams between programs of host and guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Console output.
    #[serde(default)]
    pub serial: SerialOutput,
    /// Where the ownership record lives: a D-module's CF address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_socket_address_schema")]
    pub arbiter: Option<SocketAddr>,
    /// How ports of this VM are protected. Without it the VM cannot be ported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

impl Config {
    /// Reads and checks a JSON file.
    pub fn read(path: &Path) -> Result<Config> {
        let wrong =
            |e: std::io::Error| Error::Config(vec![FieldError::new("config", format!("{}: {e}", path.display()))]);
        // What a file says of its length binds neither a device nor a file that grows.
        let file = std::fs::File::open(path).map_err(wrong)?;
        let mut bytes = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(wrong)?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(Error::Config(vec![FieldError::new("config", format!("more than {FILE_MAX} bytes"))]));
        }
        Config::from_json(&bytes)
    }

    /// Whether guest memory is to be given to other processes.
    pub fn shares_memory(&self) -> bool {
        self.memory_shared || self.outside_device().is_some()
    }

    /// A device whose queues another process works, if there is one.
    pub fn outside_device(&self) -> Option<&str> {
        let disks = self.disks.iter().filter(|d| d.vhost_user.is_some()).map(|d| d.id.as_str());
        disks.chain(self.nets.iter().filter(|n| n.vhost_user.is_some()).map(|n| n.id.as_str())).next()
    }

    /// Gives devices without an id one, then checks everything that can be checked without touching devices.
    pub fn validate(&mut self) -> Result<()> {
        let mut errors = Vec::new();
        let mut bad = |field: String, message: String| errors.push(FieldError { field, message });
        if self.name.len() > ID_MAX {
            bad("name".into(), format!("longer than {ID_MAX} bytes"));
        }
        match std::fs::metadata(&self.image) {
            _ if self.image.as_os_str().is_empty() => bad("image".into(), "is missing".into()),
            Err(e) => bad("image".into(), format!("{}: {e}", self.image.display())),
            Ok(m) if !m.is_file() => bad("image".into(), format!("{}: not a file", self.image.display())),
            Ok(_) => {}
        }
        if let Some(initrd) = &self.initrd {
            match std::fs::metadata(initrd) {
                Err(e) => bad("initrd".into(), format!("{}: {e}", initrd.display())),
                Ok(m) if !m.is_file() => bad("initrd".into(), format!("{}: not a file", initrd.display())),
                Ok(_) => {}
            }
        }
        if self.cpus == 0 || self.cpus > CPUS_MAX {
            bad("cpus".into(), format!("{}: from 1 to {CPUS_MAX}", self.cpus));
        }
        let memory = self.memory.bytes();
        if memory == 0 || !memory.is_multiple_of(HUGE_PAGE as u64) || memory > MEMORY_MAX {
            bad("memory".into(), format!("{memory} bytes: must be a multiple of 2 MiB, from 2 MiB to 1 TiB"));
        }
        // Less for a guest that starts directly in ring 3; that is known when the image has been read.
        if self.cmdline.len() > LINUX_CMDLINE_MAX || self.cmdline.contains('\0') {
            bad("cmdline".into(), format!("longer than {LINUX_CMDLINE_MAX} bytes or with a NUL"));
        }
        if self.disks.len() > DISKS_MAX {
            bad("disks".into(), format!("{} disks, at most {DISKS_MAX}", self.disks.len()));
        }
        if self.nets.len() > NETS_MAX {
            bad("nets".into(), format!("{} network devices, at most {NETS_MAX}", self.nets.len()));
        }
        let mut ids = std::collections::HashSet::new();
        for (i, disk) in self.disks.iter_mut().enumerate() {
            name_device(&mut disk.id, "disk", i);
            check_id(&disk.id, &format!("disks[{i}].id"), &mut ids, &mut bad);
            for e in disk.mistakes(&format!("disks[{i}]")) {
                bad(e.field, e.message);
            }
        }
        let mut taps = std::collections::HashSet::new();
        for (i, net) in self.nets.iter_mut().enumerate() {
            name_device(&mut net.id, "net", i);
            check_id(&net.id, &format!("nets[{i}].id"), &mut ids, &mut bad);
            for e in net.mistakes(&format!("nets[{i}]")) {
                bad(e.field, e.message);
            }
            if let Some(tap) = net.tap.as_ref().filter(|tap| !taps.insert((*tap).clone())) {
                bad(format!("nets[{i}].tap"), format!("{tap} is used twice"));
            }
        }
        if let Some(rng) = &self.rng {
            check_id(RNG_ID, "rng", &mut ids, &mut bad);
            rng.limits.mistakes("rng.limits").into_iter().for_each(|e| bad(e.field, e.message));
        }
        if let Some(balloon) = &self.balloon {
            check_id(BALLOON_ID, "balloon", &mut ids, &mut bad);
            balloon.validate(self.memory, &mut bad);
        }
        if let SerialOutput::Socket(path) = &self.serial {
            devices::check_socket_path("serial.socket", path, 0, &mut bad);
        }
        if let Some(vsock) = &self.vsock {
            check_id(VSOCK_ID, "vsock", &mut ids, &mut bad);
            vsock.validate(&mut bad);
        }
        if let Some(tls) = &self.tls {
            tls.mistakes("tls").into_iter().for_each(|e| bad(e.field, e.message));
        }
        if errors.is_empty() { Ok(()) } else { Err(Error::Config(errors)) }
    }
}

fn one_cpu() -> u32 {
    1
}

/// Splits `key=value,key=value`.
fn pairs(s: &str) -> impl Iterator<Item = std::result::Result<(&str, &str), FieldError>> {
    s.split(',')
        .map(|part| part.split_once('=').ok_or_else(|| FieldError::new("", format!("{part:?} is not KEY=VALUE"))))
}

fn field<T: std::str::FromStr<Err: std::fmt::Display>>(key: &str, value: &str) -> std::result::Result<T, FieldError> {
    value.parse().map_err(|e: T::Err| FieldError::new(key, e.to_string()))
}

fn name_device(id: &mut String, kind: &str, index: usize) {
    if id.is_empty() {
        *id = format!("{kind}{index}");
    }
}

fn check_id(id: &str, field: &str, ids: &mut std::collections::HashSet<String>, bad: &mut impl FnMut(String, String)) {
    if id.len() > ID_MAX || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        bad(field.into(), format!("{id:?}: at most {ID_MAX} letters, digits, '-' and '_'"));
    } else if !ids.insert(id.to_owned()) {
        bad(field.into(), format!("{id} is used twice"));
    }
}

#[cfg(test)]
mod tests;
