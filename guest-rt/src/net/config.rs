//! Addresses of a stack, also from the command line.
use crate::cmdline::Cmdline;
use crate::virtio::net::RxBuffers;
use core::net::Ipv4Addr;
use core::str::FromStr;

/// An IPv4 address with the length of its network prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// Address.
    pub address: Ipv4Addr,
    /// Bits of the network part.
    pub prefix: u8,
}

/// An address that does not parse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not there.
    #[error("{0}= is missing on the command line")]
    Missing(&'static str),
    /// Not an address.
    #[error("{0:?} is not ADDRESS/PREFIX or ADDRESS/PREFIX,GATEWAY")]
    Syntax(alloc::string::String),
}

impl FromStr for Cidr {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let (address, prefix) = (address.parse::<Ipv4Addr>().ok()?, prefix.parse::<u8>().ok()?);
            let unicast = !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast();
            (prefix <= 32 && unicast).then_some(Cidr { address, prefix })
        };
        parse().ok_or_else(|| ConfigError::Syntax(text.into()))
    }
}

/// What a [`super::Stack`] needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Own address.
    pub address: Cidr,
    /// Default gateway.
    pub gateway: Option<Ipv4Addr>,
    /// Receive buffers.
    pub rx_buffers: RxBuffers,
}

impl Config {
    /// From text: `10.0.0.2/24` or `10.0.0.2/24,10.0.0.1` with a gateway.
    pub fn parse(text: &str, memory_size: u64) -> Result<Config, ConfigError> {
        let (address, gateway) = match text.split_once(',') {
            Some((address, gateway)) => (address, Some(gateway.parse().map_err(|_| ConfigError::Syntax(text.into()))?)),
            None => (text, None),
        };
        Ok(Config { address: address.parse()?, gateway, rx_buffers: RxBuffers::for_memory(memory_size) })
    }

    /// From the `n`-th `ip=` of the command line, for the `n`-th network device.
    pub fn from_cmdline(cmdline: &Cmdline, n: usize, memory_size: u64) -> Result<Config, ConfigError> {
        Config::parse(cmdline.get_all("ip").nth(n).ok_or(ConfigError::Missing("ip"))?, memory_size)
    }
}
