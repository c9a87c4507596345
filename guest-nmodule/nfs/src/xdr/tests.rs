use super::*;
use proptest::prelude::*;

#[test]
fn golden() {
    let mut writer = Writer::default();
    writer.u32(1).bool(true).u64(0x0102_0304_0506_0708).opaque(b"abcde").opaque(b"");
    let bytes = writer.into_bytes();
    let expected =
        [0, 0, 0, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 5, b'a', b'b', b'c', b'd', b'e', 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes, expected);
    let mut reader = Reader::new(&bytes);
    assert_eq!(reader.u32(), Ok(1));
    assert_eq!(reader.bool(), Ok(true));
    assert_eq!(reader.u64(), Ok(0x0102_0304_0506_0708));
    assert_eq!(reader.opaque(5), Ok(b"abcde".as_slice()));
    assert_eq!(reader.opaque(0), Ok(b"".as_slice()));
    assert_eq!(reader.position(), bytes.len());
    assert_eq!(reader.u32(), Err(XdrError::Truncated));
}

#[test]
fn bounds() {
    assert_eq!(Reader::new(&[0, 0, 0, 6, 0, 0, 0, 0]).opaque(5), Err(XdrError::TooLong));
    assert_eq!(Reader::new(&[255; 8]).opaque(usize::MAX), Err(XdrError::Truncated));
    assert_eq!(Reader::new(&[0, 0, 0, 1, 7]).opaque(8), Err(XdrError::Truncated), "padding missing");
    assert_eq!(Reader::new(&[0, 0, 0, 2]).bool(), Err(XdrError::Discriminant));
}

proptest! {
    #[test]
    fn opaque_round_trip(data in proptest::collection::vec(any::<u8>(), 0..40), tail: u32) {
        let mut writer = Writer::default();
        writer.opaque(&data).u32(tail);
        let bytes = writer.into_bytes();
        prop_assert_eq!(bytes.len() % 4, 0);
        let mut reader = Reader::new(&bytes);
        prop_assert_eq!(reader.opaque(40).unwrap(), &data[..]);
        prop_assert_eq!(reader.u32().unwrap(), tail);
    }
}
