use super::any;
use crate::fs::IO_MAX;
use crate::id::*;
use crate::wire::*;
use proptest::prelude::*;

fn read(bytes: &[u8]) -> Result<Option<Frame>, WireError> {
    FrameReader::new().push(&mut &bytes[..])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    /// A frame with bytes changed is refused (the checksum finds it), or waits for more; it is never another frame.
    #[test]
    fn damage_is_found(frame in any::frame(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = encode(frame).unwrap().into_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(!matches!(read(&bytes), Ok(Some(_))));
    }

    /// A frame that is wrong, but sealed by its sender: the decoder itself is on its own.
    #[test]
    fn a_lying_peer(frame in any::frame(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<prop::sample::Index>()) {
        let mut sent = encode(frame).unwrap();
        let hash = sent.data_hash();
        for (at, value) in changes {
            let at = HEADER + at.index((sent.head.len() - HEADER).max(1));
            if let Some(byte) = sent.head.get_mut(at) {
                *byte = value;
            }
        }
        let keep = HEADER + cut.index(sent.head.len() - HEADER + 1) / 8 * 8;
        sent.head.truncate(keep);
        let length = (keep + sent.data.len()) as u32;
        sent.head[8..12].copy_from_slice(&length.to_le_bytes());
        super::super::header::seal(&mut sent.head, hash);
        // Whatever it gives is a value within the limits: it can be encoded again.
        if let Ok(Some(frame)) = read(&sent.into_vec()) {
            prop_assert!(encode(frame).is_ok());
        }
    }

    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(!matches!(read(&bytes), Ok(Some(_))));
        let _ = decode_kept(&bytes);
    }
}

/// A header with these lengths.
fn lengths(length: u32, data: u32) -> Vec<u8> {
    let mut bytes = encode(Frame::Ping { token: 1 }).unwrap().head;
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..16].copy_from_slice(&data.to_le_bytes());
    bytes
}

#[test]
fn lengths_are_checked_before_anything_is_allocated() {
    for (length, data, error) in [
        (u32::MAX, 0, WireError::TooLarge),
        (MAX_FRAME as u32 + 8, 0, WireError::TooLarge),
        (MAX_FRAME as u32, IO_MAX as u32 + 8, WireError::TooLarge),
        (0, 0, WireError::Malformed("lengths")),
        (16, 0, WireError::Malformed("lengths")),
        (32, 16, WireError::Malformed("lengths")),
        (33, 0, WireError::Malformed("lengths")),
        (32, 33, WireError::Malformed("lengths")),
    ] {
        assert_eq!(read(&lengths(length, data)), Err(error), "{length} {data}");
    }
}

#[test]
fn other_protocols_and_versions_are_told() {
    assert_eq!(read(b"GET / HTTP/1.1\r\nHost: x\r\n"), Err(WireError::Magic));
    let mut bytes = encode(Frame::Ping { token: 1 }).unwrap().head;
    bytes[4] = 2;
    assert_eq!(read(&bytes), Err(WireError::Version(2)));
}

#[test]
fn a_count_that_lies_allocates_nothing() {
    // A listing that says 4096 entries and has none.
    let mut w = encode(Frame::Goodbye { reason: Farewell::Closing }).unwrap().head;
    w[6] = 5;
    w.truncate(HEADER);
    w.extend_from_slice(&Sequence(1).0.to_le_bytes());
    w.extend_from_slice(&Slot(1).0.to_le_bytes());
    w.extend_from_slice(&11u16.to_le_bytes());
    w.push(0);
    w.extend_from_slice(&[0; 81]);
    w[HEADER + 13 + 16] = 1; // kind of the directory
    w.extend_from_slice(&(ENTRIES_MAX as u32).to_le_bytes());
    w.resize(w.len().next_multiple_of(8), 0);
    let length = (w.len() as u32).to_le_bytes();
    w[8..12].copy_from_slice(&length);
    super::super::header::seal(&mut w, 0);
    assert_eq!(read(&w), Err(WireError::Malformed("count")));
}
