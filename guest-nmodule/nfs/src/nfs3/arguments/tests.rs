use super::*;
use crate::xdr::Writer;
use fabric::fs::VolumeId;
use proptest::prelude::*;

const DIR: FileHandle = FileHandle { volume: VolumeId(1), generation: 2, inode: 3 };

fn plan(procedure: Procedure, write: impl FnOnce(&mut Writer)) -> Result<Plan, XdrError> {
    let mut out = Writer::default();
    write(&mut out);
    decode(procedure, &mut Reader::new(&out.into_bytes()), None)
}

fn dir_name<'a>(out: &'a mut Writer, name: &[u8]) -> &'a mut Writer {
    out.opaque(&handle::encode(DIR)).opaque(name)
}

fn status(procedure: Procedure, write: impl FnOnce(&mut Writer)) -> NfsStatus {
    plan(procedure, write).unwrap().op.unwrap_err()
}

/// An empty sattr3.
const NO_ATTRIBUTES: [u8; 24] = [0; 24];

#[test]
fn names() {
    let lookup = |name: &'static [u8]| {
        plan(Procedure::Lookup, |out| {
            dir_name(out, name);
        })
        .unwrap()
        .op
    };
    assert_eq!(lookup(b"a"), Ok(Op::Lookup { dir: DIR, name: b"a".to_vec() }));
    assert_eq!(lookup(b".."), Ok(Op::Lookup { dir: DIR, name: b"..".to_vec() }));
    assert_eq!(lookup(&[b'x'; 256]), Err(NfsStatus::NameTooLong));
    for bad in [b"".as_slice(), b"a/b", b"a\0b"] {
        assert_eq!(lookup(bad), Err(NfsStatus::Invalid));
    }
    let told = |procedure, name: &'static [u8]| {
        status(procedure, |out| {
            dir_name(out, name).raw(&NO_ATTRIBUTES).opaque(b"t");
        })
    };
    for (procedure, name, expected) in [
        (Procedure::MakeDir, b".".as_slice(), NfsStatus::Exists),
        (Procedure::Symlink, b"..", NfsStatus::Exists),
        (Procedure::Remove, b".", NfsStatus::Invalid),
        (Procedure::RemoveDir, b".", NfsStatus::Invalid),
        (Procedure::RemoveDir, b"..", NfsStatus::Exists),
    ] {
        assert_eq!(told(procedure, name), expected);
    }
}

#[test]
fn broken_xdr_goes_before_bad_values() {
    let bad_handle = |out: &mut Writer| {
        out.opaque(b"rubbish");
    };
    assert_eq!(status(Procedure::GetAttr, bad_handle), NfsStatus::BadHandle);
    assert_eq!(plan(Procedure::Lookup, bad_handle), Err(XdrError::Truncated));
    let long = plan(Procedure::GetAttr, |out| {
        out.opaque(&[0; 65]);
    });
    assert_eq!(long, Err(XdrError::TooLong));
}

#[test]
fn set_attributes() {
    let full = |nanoseconds, guard: &[u32]| {
        plan(Procedure::SetAttr, |out| {
            out.opaque(&handle::encode(DIR));
            out.bool(true).u32(0o100_755).bool(true).u32(5).bool(true).u32(6).bool(true).u64(1 << 40);
            out.u32(1).u32(2).u32(10).u32(nanoseconds);
            guard.iter().for_each(|word| {
                out.u32(*word);
            });
        })
        .unwrap()
        .op
    };
    let set = SetAttr {
        mode: Some(0o755),
        uid: Some(5),
        gid: Some(6),
        size: Some(1 << 40),
        atime: SetTime::ServerNow,
        mtime: SetTime::To(Time(10_000_000_020)),
    };
    assert_eq!(full(20, &[0]), Ok(Op::SetAttr { handle: DIR, set, guard: None }));
    let guard = Some(Time(i64::from(u32::MAX) * 1_000_000_000 + 1));
    assert_eq!(full(20, &[1, u32::MAX, 1]), Ok(Op::SetAttr { handle: DIR, set, guard }));
    assert_eq!(full(1_000_000_000, &[0]), Err(NfsStatus::Invalid));
    assert_eq!(full(20, &[1, 3, 1_000_000_000]), Err(NfsStatus::NotSync));
}

#[test]
fn write() {
    let write = |offset: u64, count: u32, stable: u32, data: &[u8]| {
        plan(Procedure::Write, |out| {
            out.opaque(&handle::encode(DIR)).u64(offset).u32(count).u32(stable).opaque(data);
        })
    };
    let expected = Op::Write { handle: DIR, offset: 8, stability: Stability::FileSync, data: b"abc".to_vec() };
    assert_eq!(write(8, 3, 2, b"abc").unwrap().op, Ok(expected));
    assert_eq!(write(8, 2, 2, b"abc"), Err(XdrError::TooLong));
    assert_eq!(write(8, 3, 3, b"abc"), Err(XdrError::Discriminant));
    assert_eq!(write(u64::MAX, 3, 0, b"abc").unwrap().op, Err(NfsStatus::FileTooBig));
    let large = vec![0; TRANSFER_MAX as usize + 4];
    match write(0, large.len() as u32, 0, &large).unwrap().op {
        Ok(Op::Write { data, .. }) => assert_eq!(data.len(), TRANSFER_MAX as usize, "written in part"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn make_node() {
    let node = |kind, rest: &[u32]| {
        plan(Procedure::MakeNode, |out| {
            dir_name(out, b"n").u32(kind);
            rest.iter().for_each(|word| {
                out.u32(*word);
            });
        })
        .map(|plan| plan.op)
    };
    let expected =
        |kind, rdev| Ok(Ok(Op::MakeNode { dir: DIR, name: b"n".to_vec(), kind, rdev, set: SetAttr::default() }));
    assert_eq!(node(3, &[0, 0, 0, 0, 0, 0, 8, 1]), expected(FileKind::BlockDevice, (8, 1)));
    assert_eq!(node(7, &[0; 6]), expected(FileKind::Fifo, (0, 0)));
    assert_eq!(node(1, &[]), Ok(Err(NfsStatus::BadType)));
    assert_eq!(node(8, &[]), Err(XdrError::Discriminant));
}

#[test]
fn listing_bounds() {
    let list = |cookie: u64, verifier: &'static [u8; 8], dircount: u32, maxcount: u32| {
        plan(Procedure::ReadDirPlus, |out| {
            out.opaque(&handle::encode(DIR)).u64(cookie).raw(verifier).u32(dircount).u32(maxcount);
        })
        .unwrap()
        .op
    };
    assert_eq!(list(5, &[0; 8], 100, 100), Err(NfsStatus::BadCookie));
    assert!(list(5, &COOKIE_VERIFIER, 100, 100).is_ok());
    let Ok(Op::ReadDir { max_entries, max_bytes, plus: true, .. }) = list(0, &[0; 8], u32::MAX, u32::MAX) else {
        panic!()
    };
    assert!(max_bytes <= DIRECTORY_MAX && max_entries <= DIRECTORY_MAX / 100);
}

#[test]
fn the_data_of_a_write_are_found() {
    let mut out = Writer::default();
    out.u32(9).u32(0).u32(2).u32(100_003).u32(3).u32(7);
    out.u32(1).opaque(&[0; 21]).u32(0).u32(0).opaque(&[1; 24]).u64(0).u32(8192).u32(0).u32(8192);
    let offset = out.len();
    out.raw(&[0xdd; 100]);
    let head = out.into_bytes();
    assert_eq!(write_split(&head), Split::At(offset));
    assert_eq!(write_split(&head[..offset]), Split::At(offset));
    assert_eq!(write_split(&head[..offset - 1]), Split::More);
    let mut read = head.clone();
    read[23] = 6;
    assert_eq!(write_split(&read), Split::Never);
}

#[test]
fn only_bulk_costs() {
    let call = |program: u32, procedure: u32, count: u32| {
        let mut out = Writer::default();
        out.u32(9).u32(0).u32(2).u32(program).u32(3).u32(procedure).u64(0).u64(0);
        out.opaque(&handle::encode(DIR)).u64(0).u32(count);
        cost(&out.into_bytes())
    };
    assert_eq!(call(100_003, 0, 0), 0);
    assert_eq!(call(100_003, 1, 0), 0);
    assert_eq!(call(100_003, 6, 100), 0);
    assert_eq!(call(100_003, 6, 5000), 5000);
    assert_eq!(call(100_003, 6, u32::MAX), TRANSFER_MAX as usize);
    assert!(call(100_003, 16, 0) > DIRECTORY_MAX as usize);
    assert_eq!(call(100_005, 1, 0), 0);
    assert!(call(100_005, 2, 0) >= mount::MOUNTS_MAX * mount::PATH_MAX);
    assert_eq!(cost(b"rubbish"), 0);
}

proptest! {
    #[test]
    fn rubbish_never_panics(number in 0u32..22, bytes in proptest::collection::vec(any::<u8>(), 0..300), split: bool) {
        let procedure = Procedure::from_number(number).unwrap();
        let _ = decode(procedure, &mut Reader::new(&bytes), split.then(|| vec![0; 100]));
        let _ = write_split(&bytes);
        let _ = cost(&bytes);
    }
}
