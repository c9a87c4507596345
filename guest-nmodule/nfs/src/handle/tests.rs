use super::*;
use proptest::prelude::*;

#[test]
fn golden() {
    let handle = FileHandle { volume: VolumeId(1), generation: 0x0a0b_0c0d, inode: 0x1122_3344_5566_7788 };
    let bytes = encode(handle);
    let plain = [b'O', b'R', 1, 0, 0, 0, 0, 1, 0x0a, 0x0b, 0x0c, 0x0d, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
    assert_eq!(bytes[..20], plain);
    assert_eq!(bytes[20..], [0x6a, 0xf8, 0x6e, 0xae]);
    assert_eq!(decode(&bytes), Ok(handle));
}

proptest! {
    #[test]
    fn round_trip(volume: u32, generation: u32, inode: u64) {
        let handle = FileHandle { volume: VolumeId(volume), generation, inode };
        prop_assert_eq!(decode(&encode(handle)), Ok(handle));
    }

    #[test]
    fn damage_is_seen(inode: u64, at in 0usize..24, flip in 1u8..=255) {
        let mut bytes = encode(FileHandle { volume: VolumeId(3), generation: 9, inode });
        bytes[at] ^= flip;
        prop_assert_eq!(decode(&bytes), Err(BadHandle));
    }

    #[test]
    fn rubbish_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..65)) {
        prop_assert_eq!(decode(&bytes), Err(BadHandle));
    }
}
