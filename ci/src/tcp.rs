//! What the client's kernel knows of its TCP connections: which socket it is, and how much was sent again.
//!
//! The kernel is asked over netlink, by a thread in the host's network: a process of its own for each question (`ss`)
//! takes a processor from what is being measured.
use crate::lab::Host;
use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use std::net::{IpAddr, Ipv4Addr};

/// Bytes of an answer: the kernel fills at most 32 KiB at a time.
const ANSWER: usize = 32 << 10;
/// Where `tcpi_total_retrans` is in the kernel's `struct tcp_info` (linux/tcp.h), which only grows at its end.
const TOTAL_RETRANS: usize = 100;

/// A connection as the kernel shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Local address and port.
    pub local: String,
    /// Inode of the socket: another socket has another one.
    pub inode: u64,
    /// Segments sent again so far.
    pub retransmits: u64,
}

impl Connection {
    /// Whether both are the same socket of the same connection.
    pub fn is_same(&self, other: &Connection) -> bool {
        self.inode != 0 && self.local == other.local && self.inode == other.inode
    }

    fn of(answer: &InetResponse) -> Self {
        let id = &answer.header.socket_id;
        let retransmits = answer.nlas.iter().find_map(|attribute| match attribute {
            Nla::TcpInfo(info) => total_retransmits(info),
            _ => None,
        });
        Connection {
            local: format!("{}:{}", id.source_address, id.source_port),
            inode: answer.header.inode.into(),
            retransmits: retransmits.unwrap_or(0),
        }
    }
}

/// `tcpi_total_retrans` of a `struct tcp_info`.
fn total_retransmits(info: &[u8]) -> Option<u64> {
    let field = info.get(TOTAL_RETRANS..)?.first_chunk::<4>()?;
    Some(u32::from_ne_bytes(*field).into())
}

/// The established connections of process `pid` on a host to `server`.
pub fn connections(host: &Host, pid: u32, server: Ipv4Addr) -> Result<Vec<Connection>> {
    let mut all = host.enter(|| established(server))?;
    let owned = sockets(pid)?;
    all.retain(|connection| owned.contains(&connection.inode));
    Ok(all)
}

/// Segments that the connections of a host to `server` that are open now have sent again so far. Other connections of the
/// host (a port's, say) do not count.
pub fn retransmits_to(host: &Host, server: Ipv4Addr) -> Result<u64> {
    Ok(host.enter(|| established(server))?.iter().map(|connection| connection.retransmits).sum())
}

/// Inodes of the sockets a process has open.
fn sockets(pid: u32) -> Result<Vec<u64>> {
    let directory = format!("/proc/{pid}/fd");
    let mut inodes = Vec::new();
    for entry in std::fs::read_dir(&directory).with_context(|| format!("cannot read {directory}"))? {
        // What has been closed meanwhile has no target.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok());
        inodes.extend(inode);
    }
    Ok(inodes)
}

/// The established connections to `server` of the network the calling thread is in (sock_diag(7)).
fn established(server: Ipv4Addr) -> Result<Vec<Connection>> {
    const NO_SOCKET: &str = "cannot ask the kernel for TCP connections (sock_diag)";
    let socket = Socket::new(NETLINK_SOCK_DIAG).context(NO_SOCKET)?;
    socket.connect(&SocketAddr::new(0, 0)).context(NO_SOCKET)?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let question = InetRequest {
        family: libc::AF_INET as u8,
        protocol: libc::IPPROTO_TCP as u8,
        extensions: ExtensionFlags::INFO,
        states: StateFlags::ESTABLISHED,
        socket_id: SocketId::new_v4(),
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(question).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0).context(NO_SOCKET)?;
    let mut found = Vec::new();
    let mut answer = vec![0; ANSWER];
    loop {
        let size = socket.recv(&mut &mut answer[..], 0).context(NO_SOCKET)?;
        let mut rest = answer.get(..size).context("an answer of sock_diag that is longer than asked for")?;
        while !rest.is_empty() {
            let part = NetlinkMessage::<SockDiagMessage>::deserialize(rest).context("an answer of sock_diag")?;
            // Parts begin at multiples of four bytes.
            let length = (part.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            match part.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(one))
                    if one.header.socket_id.destination_address == IpAddr::V4(server) =>
                {
                    found.push(Connection::of(&one));
                }
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(e) => bail!("{NO_SOCKET}: {e}"),
                _ => {}
            }
        }
    }
}

/// Segments that all connections of a host have sent again so far.
pub fn retransmits(host: &Host) -> Result<u64> {
    host.enter(retransmits_here)
}

/// The same in the network the calling thread is in.
pub fn retransmits_here() -> Result<u64> {
    let snmp = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
    counter(&snmp, "Tcp:", "RetransSegs").context("/proc/net/snmp has no RetransSegs")
}

/// Why segments were sent again, of all connections of a host so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Causes {
    /// Tail loss probes (RFC 8985, 7): sent after about two round trips of silence, whether or not anything was lost.
    pub loss_probes: u64,
    /// Retransmission timer ran out.
    pub timeouts: u64,
    /// Fast retransmits.
    pub fast: u64,
}

/// Reads [`Causes`].
pub fn causes(host: &Host) -> Result<Causes> {
    host.enter(|| {
        let netstat = std::fs::read_to_string("/proc/thread-self/net/netstat")?;
        let get =
            |name: &str| counter(&netstat, "TcpExt:", name).with_context(|| format!("/proc/net/netstat has no {name}"));
        Ok(Causes { loss_probes: get("TCPLossProbes")?, timeouts: get("TCPTimeouts")?, fast: get("TCPFastRetrans")? })
    })
}

/// A counter in a file of header and value lines.
fn counter(text: &str, line: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter(|l| l.starts_with(line));
    let column = lines.next()?.split_whitespace().position(|w| w == name)?;
    lines.next()?.split_whitespace().nth(column)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_of_an_established_connection() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let local = client.local_addr().unwrap().to_string();
        let all = established(Ipv4Addr::LOCALHOST).unwrap();
        let found = all.iter().find(|c| c.local == local).expect("the connection is not among them");
        assert!(sockets(std::process::id()).unwrap().contains(&found.inode));
        assert!(found.is_same(&Connection { retransmits: found.retransmits + 1, ..found.clone() }));
        assert!(!found.is_same(&Connection { inode: found.inode + 1, ..found.clone() }));
        assert!(!Connection::default().is_same(&Connection::default()));
        assert!(!established(Ipv4Addr::new(192, 0, 2, 1)).unwrap().iter().any(|c| c.local == local));
    }

    #[test]
    fn retransmits_are_read_where_the_kernel_has_them() {
        let mut info = [0; 104];
        info[100..].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(total_retransmits(&info), Some(7));
        assert_eq!(total_retransmits(&info[..103]), None);
    }

    #[test]
    fn snmp_counters_are_found_by_name() {
        let text = "Ip: A B\nIp: 1 2\nTcp: InSegs RetransSegs InErrs\nTcp: 100 7 0\n";
        assert_eq!(counter(text, "Tcp:", "RetransSegs"), Some(7));
        assert_eq!(counter(text, "Tcp:", "Nothing"), None);
    }
}
