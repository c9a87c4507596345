use super::*;

/// The bytes of one frame, fixed for good: a change here is a new [`LAYOUT`].
#[test]
fn golden_frame() {
    let mut out = Vec::new();
    let mut sender = Sender::new();
    sender.frame(FrameType::Pausing, &[], &mut Vec::new());
    sender.frame(FrameType::RoundDone, &[7, 0, 0, 0, 0, 0, 0, 0], &mut out);
    let mut expected = vec![
        b'O', b'R', b'P', b'T', 1, 0, 8, 0, // magic, layout, type
        1, 0, 0, 0, 0, 0, 0, 0, // sequence
        8, 0, 0, 0, 0, 0, 0, 0, // length, reserved
    ];
    let sum = xxhash_rust::xxh3::xxh3_64(&[&expected[..], &[7, 0, 0, 0, 0, 0, 0, 0]].concat());
    assert_eq!(sum, GOLDEN_SUM);
    expected.extend_from_slice(&sum.to_le_bytes());
    expected.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(out, expected);
}

const GOLDEN_SUM: u64 = 8_081_285_012_378_240_240;

fn one() -> ([u8; HEADER_LEN], Vec<u8>) {
    let payload = vec![1, 2, 3];
    (Sender::new().seal(FrameType::Frames, &[&payload[..1], &payload[1..]]), payload)
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (header, payload) = one();
    assert!(Header::parse(&header).unwrap().verify(&payload).is_ok());
    for bit in 0..(HEADER_LEN + payload.len()) * 8 {
        let (mut header, mut payload) = one();
        match bit / 8 {
            i if i < HEADER_LEN => header[i] ^= 1 << (bit % 8),
            i => payload[i - HEADER_LEN] ^= 1 << (bit % 8),
        }
        let noticed = Receiver::new().header(&header).and_then(|h| h.verify(&payload));
        assert!(noticed.is_err(), "bit {bit} flipped and not noticed");
    }
}

#[test]
fn lengths_are_refused_in_the_header() {
    for frame_type in FrameType::ALL {
        let mut header = Sender::new().seal(frame_type, &[]);
        header[16..20].copy_from_slice(&(frame_type.max_length() as u32 + 1).to_le_bytes());
        assert!(matches!(Header::parse(&header), Err(Error::Bound { .. })), "{}", frame_type.name());
    }
}

#[test]
fn gaps_and_repetitions_are_refused() {
    let mut sender = Sender::new();
    let first = sender.seal(FrameType::Pausing, &[]);
    let second = sender.seal(FrameType::Pausing, &[]);
    let mut receiver = Receiver::new();
    assert_eq!(receiver.header(&second), Err(Error::Sequence { expected: 0, got: 1 }));
    assert!(receiver.header(&first).is_ok());
    assert_eq!(receiver.header(&first), Err(Error::Sequence { expected: 1, got: 0 }));
    assert!(receiver.header(&second).is_ok());
}

#[test]
fn types_have_their_numbers() {
    for (index, frame_type) in FrameType::ALL.into_iter().enumerate() {
        assert_eq!(frame_type as usize, index + 1);
        assert_eq!(FrameType::from_number(frame_type as u16), Ok(frame_type));
    }
    assert_eq!(FrameType::from_number(0), Err(Error::Type(0)));
    assert_eq!(FrameType::from_number(20), Err(Error::Type(20)));
}
