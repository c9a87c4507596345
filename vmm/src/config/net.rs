//! What a user says of a network device.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::disk::SOCKET_PATH_MAX;
use super::{MacAddress, field, pairs};
use crate::error::FieldError;
use crate::limit::Limits;

/// Most queue pairs.
pub const QUEUES_MAX: u16 = 16;
/// Longest interface name (IFNAMSIZ less its NUL).
pub const TAP_NAME_MAX: usize = 15;
/// Smallest MTU (RFC 791).
const MTU_MIN: u16 = 68;

/// Use of /dev/vhost-net.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// Where it exists and the VM has an interrupt controller.
    #[default]
    Auto,
    /// Always; the VM does not start without.
    On,
    /// Never.
    Off,
}

impl FromStr for Vhost {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Vhost::Auto),
            "on" => Ok(Vhost::On),
            "off" => Ok(Vhost::Off),
            _ => Err(format!("{s:?}: must be auto, on or off")),
        }
    }
}

/// A virtio-net device: on a tap, or of another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name in metrics and in the orders of a port; `net0` and so on if not given.
    #[serde(default)]
    pub id: String,
    /// Tap by name; created if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Tap as an open file descriptor of this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<RawFd>,
    /// Instead of a tap: unix socket of a vhost-user-net back end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// MAC of the guest's side; a random local one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// MTU announced to the guest; the tap's if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs offered to the guest, each with a queue of the tap.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// Whether the kernel's vhost-net moves the frames.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vhost: Vhost,
    /// Limits of what the guest receives.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub rx_limits: Limits,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub tx_limits: Limits,
}

impl Default for NetConfig {
    fn default() -> NetConfig {
        NetConfig {
            id: String::new(),
            tap: None,
            fd: None,
            vhost_user: None,
            mac: None,
            mtu: None,
            queues: 1,
            vhost: Vhost::Auto,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
        }
    }
}

fn one() -> u16 {
    1
}

fn is_one(n: &u16) -> bool {
    *n == 1
}

fn is_default(vhost: &Vhost) -> bool {
    *vhost == Vhost::default()
}

impl NetConfig {
    /// What is wrong with it, each by the path of its field below `at`.
    pub(crate) fn mistakes(&self, at: &str) -> Vec<FieldError> {
        let mut out = self.rx_limits.mistakes(&format!("{at}.rx_limits"));
        out.extend(self.tx_limits.mistakes(&format!("{at}.tx_limits")));
        let limited = !(self.rx_limits.is_none() && self.tx_limits.is_none());
        let mut bad = |name: &str, message: String| {
            let field = if name.is_empty() { at.to_owned() } else { format!("{at}.{name}") };
            out.push(FieldError::new(field, message));
        };
        match (&self.tap, self.fd, &self.vhost_user) {
            (None, None, None) => {
                bad("", "needs a tap, by name (tap) or as descriptor (fd), or a back end (vhost_user)".into());
            }
            (Some(tap), None, None) => {
                if tap.is_empty() || tap.len() > TAP_NAME_MAX || tap.contains(['/', ' ', '%', '\0']) {
                    bad("tap", format!("{tap:?} is not an interface name"));
                }
            }
            (None, Some(fd), None) => {
                if fd < 3 {
                    bad("fd", format!("{fd} is not a tap"));
                }
                if self.queues > 1 {
                    bad("queues", "a tap given as fd has one queue".into());
                }
            }
            (None, None, Some(socket)) => {
                if socket.as_os_str().is_empty() || socket.as_os_str().len() > SOCKET_PATH_MAX {
                    bad("vhost_user", format!("a path of 1 to {SOCKET_PATH_MAX} bytes"));
                } else if let Err(e) = std::fs::metadata(socket) {
                    bad("vhost_user", format!("{}: {e}; start the back end first", socket.display()));
                }
                if self.queues > 1 {
                    bad("queues", "a vhost_user device has one queue pair".into());
                }
                if self.vhost == Vhost::On {
                    bad("vhost", "vhost-net and vhost_user exclude each other".into());
                }
                if limited {
                    let name = if self.rx_limits.is_none() { "tx_limits" } else { "rx_limits" };
                    bad(name, "is the back end's to decide with vhost_user".into());
                }
            }
            _ => bad("", "tap, fd and vhost_user exclude each other".into()),
        }
        if self.mac.is_some_and(|m| m.is_multicast() || m == MacAddress::default()) {
            bad("mac", "must be a unicast address".into());
        }
        if self.mtu.is_some_and(|m| m < MTU_MIN) {
            bad("mtu", format!("at least {MTU_MIN}"));
        }
        if !(1..=QUEUES_MAX).contains(&self.queues) {
            bad("queues", format!("{}: must be 1 to {QUEUES_MAX}", self.queues));
        }
        if self.vhost == Vhost::On && limited {
            bad("vhost", "with limits only auto or off: the kernel knows no limits".into());
        }
        out
    }

    /// From `key=value,…`.
    pub(super) fn from_flag(s: &str) -> Result<NetConfig, FieldError> {
        let mut net = NetConfig::default();
        for pair in pairs(s) {
            match pair? {
                ("id", v) => net.id = v.to_owned(),
                ("tap", v) => net.tap = Some(v.to_owned()),
                ("fd", v) => net.fd = Some(field("fd", v)?),
                ("vhost_user", v) => net.vhost_user = Some(v.into()),
                ("mac", v) => net.mac = Some(field("mac", v)?),
                ("mtu", v) => net.mtu = Some(field("mtu", v)?),
                ("queues", v) => net.queues = field("queues", v)?,
                ("vhost", v) => net.vhost = field("vhost", v)?,
                ("rx_ops", v) => net.rx_limits.ops = Some(field("rx_ops", v)?),
                ("rx_bytes", v) => net.rx_limits.bytes = Some(field("rx_bytes", v)?),
                ("tx_ops", v) => net.tx_limits.ops = Some(field("tx_ops", v)?),
                ("tx_bytes", v) => net.tx_limits.bytes = Some(field("tx_bytes", v)?),
                (key, _) => {
                    let known = "id, tap, fd, vhost_user, mac, mtu, queues, vhost, rx_ops, rx_bytes, tx_ops, tx_bytes";
                    return Err(FieldError::new(key, format!("unknown; known are {known}")));
                }
            }
        }
        Ok(net)
    }
}
