use super::*;
use crate::engine::mappings;
use core::net::Ipv4Addr;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 10));

fn ask(version: u32, procedure: u32, arguments: &[u8]) -> Result<Vec<u8>, Rejection> {
    let mut out = Writer::default();
    let mappings = mappings(111, true, 2049, 20048);
    call(&mappings, LOCAL, version, procedure, &mut Reader::new(arguments), &mut out)?;
    Ok(out.into_bytes())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn rpcb(program: u32, version: u32, netid: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    out.u32(program).u32(version).opaque(netid).opaque(b"").opaque(b"");
    out.into_bytes()
}

fn string(bytes: &[u8]) -> String {
    String::from_utf8(Reader::new(bytes).opaque(100).unwrap().to_vec()).unwrap()
}

#[test]
fn getport() {
    assert_eq!(ask(2, 3, &words(&[100_003, 3, 6, 0])), Ok(words(&[2049])));
    assert_eq!(ask(2, 3, &words(&[100_005, 3, 6, 0])), Ok(words(&[20048])));
    assert_eq!(ask(2, 3, &words(&[100_003, 3, 17, 0])), Ok(words(&[0])), "NFS is not on UDP");
    assert_eq!(ask(2, 3, &words(&[100_003, 4, 6, 0])), Ok(words(&[2049])), "NFS itself says which versions it has");
    assert_eq!(ask(2, 3, &words(&[100_021, 4, 6, 0])), Ok(words(&[0])));
    assert_eq!(ask(2, 3, &words(&[100_021, 4, 6])), Err(Rejection::GarbageArguments));
}

#[test]
fn dump() {
    let dump = ask(2, 4, &[]).unwrap();
    assert_eq!(dump[..20], words(&[1, 100_000, 2, 6, 111]));
    assert_eq!(dump.len(), 8 * 20 + 4, "three versions on two transports, NFS, MOUNT, end");
    assert_eq!(dump[7 * 20..], words(&[1, 100_005, 3, 6, 20048, 0]));
}

#[test]
fn getaddr() {
    assert_eq!(string(&ask(3, 3, &rpcb(100_003, 3, b"tcp")).unwrap()), "10.77.0.10.8.1");
    assert_eq!(string(&ask(4, 3, &rpcb(100_005, 3, b"tcp")).unwrap()), "10.77.0.10.78.80");
    assert_eq!(string(&ask(4, 3, &rpcb(100_003, 3, b"tcp6")).unwrap()), "");
    assert_eq!(string(&ask(4, 9, &rpcb(100_003, 4, b"tcp")).unwrap()), "", "GETVERSADDR is exact");
    assert_eq!(string(&ask(4, 9, &rpcb(100_003, 3, b"tcp")).unwrap()), "10.77.0.10.8.1");
}

#[test]
fn registrations_are_refused_and_the_rest_is_not_there() {
    assert_eq!(ask(2, 1, &words(&[1, 1, 6, 1])), Ok(words(&[0])));
    assert_eq!(ask(4, 2, &rpcb(1, 1, b"tcp")), Ok(words(&[0])));
    assert_eq!(ask(2, 5, &[]), Err(Rejection::ProcedureUnavailable));
    assert_eq!(ask(1, 0, &[]), Err(Rejection::ProgramMismatch { low: 2, high: 4 }));
    assert_eq!(ask(5, 0, &[]), Err(Rejection::ProgramMismatch { low: 2, high: 4 }));
}
