use super::*;

#[test]
fn of_the_smallest_and_usual_sizes() {
    assert_eq!(Limits::of(16 << 20), Err(TooLittleMemory(16)));
    assert!(Limits::of(24 << 20).is_ok());
    assert_eq!(
        Limits::of(32 << 20),
        Ok(Limits { connections: 14, sockets: 29, call_bytes: 6868172, small_bytes: 1622016 })
    );
    assert_eq!(
        Limits::of(1 << 40),
        Ok(Limits { connections: 253, sockets: 268, call_bytes: 256 << 20, small_bytes: 261 * 32 * 2304 })
    );
}

#[test]
fn all_together_fit() {
    for mib in 24..2048 {
        let memory = mib << 20;
        let limits = Limits::of(memory).unwrap();
        let taken = (limits.connections + BACKLOG + 1) * 2 * NFS_BUFFER
            + limits.call_bytes
            + limits.small_bytes
            + 2 * LINK_BUFFER;
        assert!(taken as u64 + IMAGE + RESERVE <= memory);
    }
}

#[test]
fn capacity_is_the_layouts() {
    assert_eq!((CAPACITY.file_size_max, CAPACITY.links_max), (layout::FILE_SIZE_MAX, layout::LINKS_MAX));
}
