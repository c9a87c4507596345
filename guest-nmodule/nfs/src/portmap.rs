//! Portmap version 2 and rpcbind versions 3 and 4 (RFC 1833), as far as clients ask: where a program listens. The
//! registrations are fixed; SET and UNSET over the network are refused.
use crate::rpc::Rejection;
use crate::xdr::{Reader, Writer};
use alloc::{format, string::String};
use core::net::IpAddr;

/// Program number.
pub const PROGRAM: u32 = 100_000;
/// Versions, lowest and highest.
pub const VERSIONS: (u32, u32) = (2, 4);
/// Well-known port.
pub const PORT: u16 = 111;

const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
/// Longest netid, address or owner that is looked at.
const STRING_MAX: usize = 128;
/// Transport semantics of rpcbind version 4 (netconfig.h): connectionless; stream with orderly release.
const SEMANTICS_CLTS: u32 = 1;
const SEMANTICS_COTS_ORD: u32 = 3;

/// A transport a program is registered on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Where one version of a program listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Program number.
    pub program: u32,
    /// Version.
    pub version: u32,
    /// Transport.
    pub transport: Transport,
    /// Port.
    pub port: u16,
}

impl Mapping {
    fn protocol(&self) -> u32 {
        match self.transport {
            Transport::Tcp => IPPROTO_TCP,
            Transport::Udp => IPPROTO_UDP,
        }
    }

    fn netid(&self, local: IpAddr) -> &'static str {
        match (self.transport, local.is_ipv4()) {
            (Transport::Tcp, true) => "tcp",
            (Transport::Tcp, false) => "tcp6",
            (Transport::Udp, true) => "udp",
            (Transport::Udp, false) => "udp6",
        }
    }

    fn universal_address(&self, local: IpAddr) -> String {
        format!("{local}.{}.{}", self.port >> 8, self.port & 0xff)
    }
}

/// Executes one call whose results go to `out`. `local` is the server's address as the client knows it.
pub fn call(
    mappings: &[Mapping],
    local: IpAddr,
    version: u32,
    procedure: u32,
    arguments: &mut Reader<'_>,
    out: &mut Writer,
) -> Result<(), Rejection> {
    if !(VERSIONS.0..=VERSIONS.1).contains(&version) {
        return Err(Rejection::ProgramMismatch { low: VERSIONS.0, high: VERSIONS.1 });
    }
    match (version, procedure) {
        (_, 0) => {}
        (2, 1 | 2) => {
            for _ in 0..4 {
                arguments.u32()?;
            }
            out.bool(false);
        }
        (2, 3) => {
            let (program, version, protocol) = (arguments.u32()?, arguments.u32()?, arguments.u32()?);
            arguments.u32()?;
            let found = find(mappings, program, version, false, |mapping| mapping.protocol() == protocol);
            out.u32(found.map_or(0, |mapping| mapping.port.into()));
        }
        (2, 4) => {
            for mapping in mappings {
                out.bool(true).u32(mapping.program).u32(mapping.version);
                out.u32(mapping.protocol()).u32(mapping.port.into());
            }
            out.bool(false);
        }
        (3 | 4, 1 | 2) => {
            decode_rpcb(arguments)?;
            out.bool(false);
        }
        (3 | 4, 3) | (4, 9) => {
            let (program, version, netid) = decode_rpcb(arguments)?;
            let wanted = |mapping: &Mapping| netid.is_empty() || mapping.netid(local).as_bytes() == netid;
            let found = find(mappings, program, version, procedure == 9, wanted);
            out.opaque(found.map_or(String::new(), |mapping| mapping.universal_address(local)).as_bytes());
        }
        (3 | 4, 4) => {
            for mapping in mappings {
                out.bool(true).u32(mapping.program).u32(mapping.version);
                out.opaque(mapping.netid(local).as_bytes());
                out.opaque(mapping.universal_address(local).as_bytes()).opaque(b"superuser");
            }
            out.bool(false);
        }
        (4, 11) => {
            let (program, version, _) = decode_rpcb(arguments)?;
            for mapping in mappings.iter().filter(|mapping| (mapping.program, mapping.version) == (program, version)) {
                let (semantics, protocol) = match mapping.transport {
                    Transport::Tcp => (SEMANTICS_COTS_ORD, "tcp"),
                    Transport::Udp => (SEMANTICS_CLTS, "udp"),
                };
                out.bool(true).opaque(mapping.universal_address(local).as_bytes());
                out.opaque(mapping.netid(local).as_bytes()).u32(semantics);
                out.opaque(if local.is_ipv4() { b"inet" } else { b"inet6" }).opaque(protocol.as_bytes());
            }
            out.bool(false);
        }
        _ => return Err(Rejection::ProcedureUnavailable),
    }
    Ok(())
}

/// The mapping of this version, else (unless `exact`) of any version: its server then says which versions it has.
fn find(
    mappings: &[Mapping],
    program: u32,
    version: u32,
    exact: bool,
    wanted: impl Fn(&Mapping) -> bool,
) -> Option<&Mapping> {
    let candidates = || mappings.iter().filter(|mapping| mapping.program == program && wanted(mapping));
    let same = candidates().find(|mapping| mapping.version == version);
    if exact { same } else { same.or_else(|| candidates().next()) }
}

/// Program, version and netid of a `struct rpcb`.
fn decode_rpcb<'a>(arguments: &mut Reader<'a>) -> Result<(u32, u32, &'a [u8]), Rejection> {
    let (program, version) = (arguments.u32()?, arguments.u32()?);
    let netid = arguments.opaque(STRING_MAX)?;
    arguments.opaque(STRING_MAX)?;
    arguments.opaque(STRING_MAX)?;
    Ok((program, version, netid))
}

#[cfg(test)]
mod tests;
