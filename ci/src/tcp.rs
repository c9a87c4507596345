//! What the client's kernel knows of its TCP connections: which socket it is, and how much was sent again.
use crate::lab::Host;
use anyhow::{Context, Result};
use std::net::Ipv4Addr;
use std::process::Command;

/// A connection as `ss` shows it.
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
}

/// The established connections of process `pid` on a host to `server`.
pub fn connections(host: &Host, pid: u32, server: Ipv4Addr) -> Result<Vec<Connection>> {
    let list = established(host, server)?;
    let owner = format!("pid={pid},");
    Ok(list.lines().filter(|l| l.contains(&owner)).map(parse).collect())
}

/// Segments that the connections of a host to `server` that are open now have sent again so far. Other connections of the
/// host (a port's, say) do not count.
pub fn retransmits_to(host: &Host, server: Ipv4Addr) -> Result<u64> {
    Ok(established(host, server)?.lines().map(|line| parse(line).retransmits).sum())
}

/// What `ss` says of the connections of a host to `server`, a line each.
fn established(host: &Host, server: Ipv4Addr) -> Result<String> {
    let mut ss = Command::new("ss");
    ss.args(["-tinepOH", "state", "established", "dst", &server.to_string()]);
    host.output(&mut ss)
}

fn parse(line: &str) -> Connection {
    // Recv-Q Send-Q Local Peer …, then name:value words.
    let mut connection =
        Connection { local: line.split_whitespace().nth(2).unwrap_or("").to_owned(), ..Connection::default() };
    for word in line.split_whitespace() {
        if let Some(inode) = word.strip_prefix("ino:") {
            connection.inode = inode.parse().unwrap_or(0);
        } else if let Some(counts) = word.strip_prefix("retrans:") {
            // In flight now / in all.
            connection.retransmits = counts.rsplit('/').next().and_then(|n| n.parse().ok()).unwrap_or(0);
        }
    }
    connection
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
    fn ss_lines_are_read() {
        let line = "0      0      10.77.0.2:50342 10.77.0.10:2049 users:((\"nfs-cp\",pid=77,fd=4)) ino:991 sk:2 <-> cubic \
                    wscale:7,7 rto:204 rtt:1.5/2 bytes_sent:8 bytes_retrans:3 retrans:0/12 rcv_rtt:1";
        let c = parse(line);
        assert_eq!(c, Connection { local: "10.77.0.2:50342".into(), inode: 991, retransmits: 12 });
        assert!(c.is_same(&Connection { retransmits: 0, ..c.clone() }));
        assert!(!c.is_same(&Connection { inode: 5, ..c.clone() }));
        assert!(!Connection::default().is_same(&Connection::default()));
        assert_eq!(parse("0 0 1.2.3.4:5 6.7.8.9:10 ino:4 sk:2").retransmits, 0);
    }

    #[test]
    fn snmp_counters_are_found_by_name() {
        let text = "Ip: A B\nIp: 1 2\nTcp: InSegs RetransSegs InErrs\nTcp: 100 7 0\n";
        assert_eq!(counter(text, "Tcp:", "RetransSegs"), Some(7));
        assert_eq!(counter(text, "Tcp:", "Nothing"), None);
    }
}
