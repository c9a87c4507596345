use super::any;
use crate::fs::*;
use crate::id::*;
use crate::op::{Op, Reply, Request};
use crate::wire::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_frame(frame in any::frame()) {
        let sent = encode(frame.clone()).unwrap();
        prop_assert_eq!(sent.head.len() % 8, 0, "data is 8-byte aligned in the frame");
        let bytes = sent.into_vec();
        let mut rest = &bytes[..];
        prop_assert_eq!(FrameReader::new().push(&mut rest).unwrap(), Some(frame));
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn any_cut_of_a_stream(frames in prop::collection::vec(any::frame(), 1..5), cuts in prop::collection::vec(1usize..2000, 1..20)) {
        let stream: Vec<u8> = frames.iter().flat_map(|f| encode(f.clone()).unwrap().into_vec()).collect();
        let (mut reader, mut got, mut rest) = (FrameReader::new(), Vec::new(), &stream[..]);
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (mut piece, tail) = rest.split_at((*cut).min(rest.len()));
            rest = tail;
            while !piece.is_empty() {
                prop_assert!(reader.missing() > 0);
                got.extend(reader.push(&mut piece).unwrap());
            }
        }
        prop_assert_eq!(got, frames);
        prop_assert_eq!(reader.missing(), HEADER);
    }

    #[test]
    fn another_epoch_in_a_sent_request(frame in any::frame(), epoch in 0u64..) {
        let Frame::Request { slot, sequence, request, .. } = frame.clone() else { return Ok(()) };
        let mut sent = encode(frame).unwrap();
        let hash = sent.data_hash();
        reseal_request(&mut sent.head, Epoch(epoch), hash);
        let wanted = Frame::Request { epoch: Epoch(epoch), slot, sequence, request };
        prop_assert_eq!(FrameReader::new().push(&mut &sent.into_vec()[..]).unwrap(), Some(wanted));
    }

    #[test]
    fn kept_replies_fit(outcome in any::kept_outcome(), session in 0u64.., sequence in 0u64..) {
        let mut bytes = encode_kept(Epoch(session), Sequence(sequence), &outcome).unwrap();
        bytes.resize(KEPT_MAX, 0);
        prop_assert_eq!(decode_kept(&bytes).unwrap(), (Epoch(session), Sequence(sequence), outcome));
    }
}

fn handle() -> FileHandle {
    FileHandle { volume: VolumeId(1), generation: 2, inode: 3 }
}

fn request(op: Op) -> Frame {
    Frame::Request {
        epoch: Epoch(1),
        slot: Slot(1),
        sequence: Sequence(1),
        request: Request { credential: Credential::ROOT, op },
    }
}

#[test]
fn data_is_moved() {
    let data = vec![7; IO_MAX];
    let at = data.as_ptr();
    let write = Op::Write { handle: handle(), offset: 0, stability: Stability::Unstable, data };
    let sent = encode(request(write)).unwrap();
    assert_eq!(sent.data.as_ptr(), at);
}

#[test]
fn values_over_a_limit_are_not_encoded() {
    let write = Op::Write { handle: handle(), offset: 0, stability: Stability::Unstable, data: vec![0; IO_MAX + 1] };
    let long = vec![b'x'; NAME_MAX + 1];
    let groups = Credential { uid: 0, gid: 0, groups: vec![0; GROUPS_MAX + 1] };
    for frame in [
        request(write),
        request(Op::Lookup { dir: handle(), name: long.clone() }),
        request(Op::OpenVolume { name: "v".repeat(VOLUME_NAME_MAX + 1) }),
        Frame::Request {
            epoch: Epoch(1),
            slot: Slot(1),
            sequence: Sequence(1),
            request: Request { credential: groups, op: Op::GetAttr { handle: handle() } },
        },
    ] {
        assert_eq!(encode(frame), Err(WireError::TooLarge));
    }
}

#[test]
fn the_largest_listing_fits() {
    let attr = Attr {
        handle: handle(),
        kind: FileKind::Directory,
        mode: 0,
        links: 1,
        uid: 0,
        gid: 0,
        size: 0,
        used: 0,
        rdev: (0, 0),
        atime: Time(0),
        mtime: Time(0),
        ctime: Time(0),
    };
    let name = vec![b'x'; ENTRY_BYTES_MAX / ENTRIES_MAX];
    let entries = vec![DirEntry { cookie: 1, inode: 1, name, attr: Some(attr) }; ENTRIES_MAX];
    let outcome = Ok(Reply::Entries { entries, eof: false, dir: attr });
    let sent = encode(Frame::Response { slot: Slot(0), sequence: Sequence(1), outcome }).unwrap();
    assert!(sent.head.len() < MAX_FRAME);
}
