use super::*;
use crate::xdr::Reader;
use fabric::fs::{Status, VolumeId};
use fabric::op::Failure;
use proptest::prelude::*;

const CAPACITY: Capacity = Capacity { file_size_max: 1 << 44, links_max: 1000 };

fn attr(inode: u64) -> Attr {
    Attr {
        handle: FileHandle { volume: VolumeId(7), generation: 1, inode },
        kind: FileKind::Regular,
        mode: 0o644,
        links: 1,
        uid: 1000,
        gid: 100,
        size: 0x1_0000_0002,
        used: 4096,
        rdev: (0, 0),
        atime: Time(1_000_000_001),
        mtime: Time(2_000_000_002),
        ctime: Time(3_000_000_003),
    }
}

fn encoded(procedure: Procedure, limits: Limits, outcome: Result<Outcome, NfsStatus>) -> (Vec<u8>, Vec<u8>) {
    let mut out = Writer::default();
    let bulk = encode(procedure, limits, &CAPACITY, outcome, &mut out);
    (out.into_bytes(), bulk)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// fattr3 of `attr(5)`, as RFC 1813, 2.3.5 lays it out.
const FATTR3: [u32; 21] = [1, 0o644, 1, 1000, 100, 1, 2, 0, 4096, 0, 0, 0, 7, 0, 5, 1, 1, 2, 2, 3, 3];

#[test]
fn golden_getattr() {
    let (bytes, _) = encoded(Procedure::GetAttr, Limits::None, Ok(Ok(Reply::Attr(attr(5)))));
    assert_eq!(bytes, words(&[&[0], &FATTR3[..]].concat()));
}

#[test]
fn golden_read() {
    let reply = Reply::Data { data: vec![1, 2, 3, 4, 5], eof: true, attr: attr(5) };
    let (bytes, bulk) = encoded(Procedure::Read, Limits::None, Ok(Ok(reply)));
    assert_eq!(bytes, words(&[&[0, 1], &FATTR3[..], &[5, 1, 5]].concat()));
    assert_eq!(bulk, [1, 2, 3, 4, 5]);
}

#[test]
fn golden_write() {
    let wcc = Wcc { before: Some((9, Time(1), Time(2_000_000_000))), after: Some(attr(5)) };
    let reply = Reply::Written { count: 3, stability: fabric::fs::Stability::FileSync, verifier: 0x1_0000_0002, wcc };
    let (bytes, _) = encoded(Procedure::Write, Limits::None, Ok(Ok(reply)));
    assert_eq!(bytes, words(&[&[0, 1, 0, 9, 0, 1, 2, 0, 1], &FATTR3[..], &[3, 2, 1, 2]].concat()));
}

#[test]
fn golden_fsinfo_and_pathconf() {
    let (bytes, _) = encoded(Procedure::FsInfo, Limits::None, Ok(Ok(Reply::Attr(attr(5)))));
    let mib = 1 << 20;
    let info = [mib, mib, 4096, mib, mib, 4096, 65536, 1 << 12, 0, 0, 1, 0x1b];
    assert_eq!(bytes, words(&[&[0, 1], &FATTR3[..], &info].concat()));
    let (bytes, _) = encoded(Procedure::PathConf, Limits::None, Ok(Ok(Reply::Attr(attr(5)))));
    assert_eq!(bytes, words(&[&[0, 1], &FATTR3[..], &[1000, 255, 1, 1, 0, 1]].concat()));
}

#[test]
fn failures_have_the_shape_of_their_procedure() {
    let failure =
        Failure { status: Status::NotFound, wcc: Wcc { before: None, after: Some(attr(5)) }, wcc2: Wcc::default() };
    let told = |procedure| encoded(procedure, Limits::None, Ok(Err(failure.clone()))).0;
    assert_eq!(told(Procedure::GetAttr), words(&[2]));
    assert_eq!(told(Procedure::Lookup), words(&[&[2, 1], &FATTR3[..]].concat()));
    assert_eq!(told(Procedure::Remove), words(&[&[2, 0, 1], &FATTR3[..]].concat()));
    assert_eq!(told(Procedure::Rename), words(&[&[2, 0, 1], &FATTR3[..], &[0, 0]].concat()));
    assert_eq!(told(Procedure::Link), words(&[&[2, 0, 0, 1], &FATTR3[..]].concat()));
    let (bytes, _) = encoded(Procedure::Commit, Limits::None, Err(NfsStatus::BadHandle));
    assert_eq!(bytes, words(&[10001, 0, 0]));
}

#[test]
fn an_answer_to_another_question_is_a_server_fault() {
    let (bytes, _) = encoded(Procedure::Read, Limits::None, Ok(Ok(Reply::Attr(attr(5)))));
    assert_eq!(bytes, words(&[10006, 0]));
}

#[test]
fn times_out_of_range_are_clamped() {
    let told = |time| {
        let mut out = Writer::default();
        nfstime3(&mut out, Time(time));
        out.into_bytes()
    };
    assert_eq!(told(-1), words(&[0, 0]));
    assert_eq!(told(i64::MAX), words(&[u32::MAX, 999_999_999]));
    assert_eq!(told(u32::MAX as i64 * 1_000_000_000 + 5), words(&[u32::MAX, 5]));
}

fn entries(names: &[usize]) -> Vec<DirEntry> {
    let entry = |(index, length): (usize, &usize)| DirEntry {
        cookie: index as u64 + 1,
        inode: index as u64,
        name: vec![b'n'; *length],
        attr: (index % 3 != 2).then(|| attr(index as u64)),
    };
    names.iter().enumerate().map(entry).collect()
}

/// Reads a listing back: entries had, bytes that count as dircount, eof.
fn parse(bytes: &[u8], plus: bool) -> (usize, usize, bool) {
    let mut reader = Reader::new(bytes);
    assert_eq!(reader.u32(), Ok(0));
    assert_eq!(reader.u32(), Ok(1));
    reader.bytes(84).unwrap();
    assert_eq!(reader.array(), Ok(COOKIE_VERIFIER));
    let (mut count, mut dir) = (0, 0);
    while reader.bool().unwrap() {
        let before = reader.position();
        reader.u64().unwrap();
        reader.opaque(255).unwrap();
        assert_eq!(reader.u64(), Ok(count as u64 + 1));
        dir += 4 + reader.position() - before;
        if plus {
            if reader.bool().unwrap() {
                reader.bytes(84).unwrap();
            }
            if reader.bool().unwrap() {
                reader.opaque(64).unwrap();
            }
        }
        count += 1;
    }
    let eof = reader.bool().unwrap();
    assert!(reader.rest().is_empty());
    (count, dir, eof)
}

proptest! {
    #[test]
    fn listings_keep_their_limits(
        names in proptest::collection::vec(1usize..256, 0..40),
        dircount in 0u32..5000,
        maxcount in 0u32..10_000,
        plus: bool,
        eof: bool,
    ) {
        let limits = if plus { Limits::ReadDirPlus { dircount, maxcount } } else { Limits::ReadDir { count: maxcount } };
        let procedure = if plus { Procedure::ReadDirPlus } else { Procedure::ReadDir };
        let reply = Reply::Entries { entries: entries(&names), eof, dir: attr(1) };
        let (bytes, _) = encoded(procedure, limits, Ok(Ok(reply.clone())));
        if bytes[..4] == words(&[10005]) {
            // Not even the first entry fits.
            let (larger, _) = encoded(procedure, match limits {
                Limits::ReadDirPlus { .. } => Limits::ReadDirPlus { dircount: 300, maxcount: 600 },
                _ => Limits::ReadDir { count: 600 },
            }, Ok(Ok(reply)));
            parse(&larger, plus);
        } else {
            let (count, dir, told_eof) = parse(&bytes, plus);
            prop_assert!(bytes.len() - 4 <= maxcount as usize);
            prop_assert!(!plus || dir <= dircount as usize);
            prop_assert!(count > 0 || names.is_empty());
            prop_assert_eq!(told_eof, eof && count == names.len());
            if count < names.len() {
                // One entry more would not have fitted.
                let name = 24 + names[count] + padding(names[count]);
                let extra = if !plus { 0 } else if count % 3 == 2 { 8 } else { 88 + 8 + HANDLE_SIZE };
                prop_assert!(bytes.len() - 4 + name + extra > maxcount as usize || plus && dir + name > dircount as usize);
            }
        }
    }
}
