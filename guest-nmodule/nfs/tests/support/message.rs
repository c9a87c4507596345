//! Calls as bytes, and replies read back.
use nfs::engine::Peer;
use nfs::record::{Record, Reply};
use nfs::xdr::{Reader, Writer};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub const NFS: u32 = 100_003;
pub const MOUNT: u32 = 100_005;

/// A client on this port of 10.0.0.1.
pub fn peer(port: u16) -> Peer {
    Peer { client: SocketAddr::from(([10, 0, 0, 1], port)), local: IpAddr::V4(Ipv4Addr::new(10, 77, 0, 10)) }
}

/// A call with AUTH_SYS and arguments written by `arguments`.
pub fn call_as(
    (uid, gid): (u32, u32),
    xid: u32,
    program: u32,
    version: u32,
    procedure: u32,
    arguments: impl FnOnce(&mut Writer),
) -> Vec<u8> {
    let mut credential = Writer::default();
    credential.u32(1).opaque(b"client").u32(uid).u32(gid).u32(1).u32(gid);
    let mut out = Writer::default();
    out.u32(xid).u32(0).u32(2).u32(program).u32(version).u32(procedure);
    out.u32(1).opaque(&credential.into_bytes()).u32(0).u32(0);
    arguments(&mut out);
    out.into_bytes()
}

/// As [`call_as`], by root, on version 3.
pub fn call(xid: u32, program: u32, procedure: u32, arguments: impl FnOnce(&mut Writer)) -> Vec<u8> {
    call_as((0, 0), xid, program, 3, procedure, arguments)
}

pub fn record(message: Vec<u8>) -> Record {
    Record::whole(message)
}

/// A reply without its record mark, which is checked.
pub fn bytes(reply: &Reply) -> Vec<u8> {
    let all = reply.slices().concat();
    assert_eq!(all[..4], (0x8000_0000 | (all.len() as u32 - 4)).to_be_bytes());
    assert_eq!(all.len() % 4, 0);
    all[4..].to_vec()
}

/// Results of a call that was accepted and succeeded on the RPC level.
pub fn results(reply: &Reply, xid: u32) -> Vec<u8> {
    let bytes = bytes(reply);
    let mut reader = Reader::new(&bytes);
    let header: Vec<u32> = (0..6).map(|_| reader.u32().unwrap()).collect();
    assert_eq!(header, [xid, 1, 0, 0, 0, 0]);
    reader.rest().to_vec()
}

/// accept_stat of a call that was accepted.
pub fn accept_stat(reply: &Reply) -> u32 {
    let bytes = bytes(reply);
    let mut reader = Reader::new(&bytes);
    let header: Vec<u32> = (0..6).map(|_| reader.u32().unwrap()).collect();
    assert_eq!(header[1..5], [1, 0, 0, 0]);
    header[5]
}

/// Handle of a successful MNT's results.
pub fn mounted(results: &[u8]) -> Vec<u8> {
    let mut reader = Reader::new(results);
    assert_eq!(reader.u32(), Ok(0), "MNT failed");
    reader.opaque(64).unwrap().to_vec()
}
