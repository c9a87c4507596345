//! The N-module's words on the command line.
//!
//! | word | meaning | default |
//! |---|---|---|
//! | `ip=ADDRESS/PREFIX[,GATEWAY]` | own IPv4 address | none: must be given |
//! | `gw=ADDRESS` | gateway | none |
//! | `dmodule=ADDRESS:PORT` | the D-module | none: must be given |
//! | `volume=NAME` | volume of exports that name none | `vol0` |
//! | `export=PATH[:VOLUME]` | what may be mounted; may be repeated | `/` and the volume's name |
//! | `no_root_squash` | root on a client is root here | root is nobody |
//! | `insecure` | clients may use ports from 1024 on | they may not |
//!
//! Words of the run time (`virtio_mmio.device=`, `log=`, …) are left alone.
use alloc::{format, string::String, vec::Vec};
use core::fmt::Display;
use core::net::{Ipv4Addr, SocketAddrV4};
use core::str::FromStr;
use nfs::export::{Access, Export};

#[cfg(test)]
mod tests;

/// Most exports.
pub const EXPORTS_MAX: usize = 16;

/// A word that is missing or not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Missing.
    #[error("command line: {0}= is missing")]
    Missing(&'static str),
    /// Not understood.
    #[error("command line: {word}={value}: {reason}")]
    Invalid {
        /// Its key.
        word: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: String,
    },
}

/// The N-module's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Own address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
    /// Gateway.
    pub gateway: Option<Ipv4Addr>,
    /// Where the D-module listens.
    pub dmodule: SocketAddrV4,
    /// What may be mounted.
    pub exports: Vec<Export>,
    /// By whom.
    pub access: Access,
}

impl Config {
    /// Reads a command line.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let values = |key: &'static str| {
            text.split_ascii_whitespace().filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
        };
        let required = |key| values(key).next_back().ok_or(ConfigError::Missing(key));
        let flag = |key| text.split_ascii_whitespace().any(|word| word == key);

        let network = required("ip")?;
        // The run time knows the gateway in this form too.
        let (network, gateway) =
            network.split_once(',').map_or((network, None), |(network, gateway)| (network, Some(gateway)));
        let gateway = values("gw").next_back().or(gateway);
        let (address, prefix) =
            network.split_once('/').ok_or_else(|| invalid("ip", network, "the length of the prefix is missing"))?;
        let prefix: u8 = parse("ip", prefix)?;
        if !(1..=32).contains(&prefix) {
            return Err(invalid("ip", network, "the prefix has 1 to 32 bits"));
        }
        let volume = values("volume").next_back().unwrap_or("vol0");
        let mut exports = values("export").map(|value| export(value, volume)).collect::<Result<Vec<_>, _>>()?;
        if exports.is_empty() {
            exports.push(Export { path: format!("/{volume}"), volume: volume.into() });
        }
        if exports.len() > EXPORTS_MAX {
            return Err(invalid("export", &exports[EXPORTS_MAX].path, "too many exports"));
        }
        Ok(Config {
            address: parse("ip", address)?,
            prefix,
            gateway: gateway.map(|gateway| parse("gw", gateway)).transpose()?,
            dmodule: parse("dmodule", required("dmodule")?)?,
            exports,
            access: Access { root_squash: !flag("no_root_squash"), insecure_ports: flag("insecure") },
        })
    }
}

fn export(value: &str, volume: &str) -> Result<Export, ConfigError> {
    let (path, volume) = value.split_once(':').unwrap_or((value, volume));
    if !path.starts_with('/') || path.len() > nfs::mount::PATH_MAX {
        return Err(invalid("export", value, "not an absolute path"));
    }
    if volume.is_empty() {
        return Err(invalid("export", value, "the name of the volume is missing"));
    }
    Ok(Export { path: path.into(), volume: volume.into() })
}

fn parse<T: FromStr<Err: Display>>(word: &'static str, value: &str) -> Result<T, ConfigError> {
    value.parse().map_err(|reason| invalid(word, value, &format!("{reason}")))
}

fn invalid(word: &'static str, value: &str, reason: &str) -> ConfigError {
    ConfigError::Invalid { word, value: value.into(), reason: reason.into() }
}
