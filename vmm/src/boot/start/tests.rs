use std::path::Path;

use super::*;

fn file(len: usize) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0x5a; len]).unwrap();
    file
}

fn open(path: &Path) -> BootFile {
    BootFile::open("initrd", path).unwrap()
}

#[test]
fn an_initrd_lies_as_high_as_it_may() {
    const MIB: u64 = 1 << 20;
    let memory = Memory::new(64 << 20).unwrap();
    let disk = file(5000);
    assert_eq!(
        load_initrd(&open(disk.path()), &memory, MIB, u64::MAX).unwrap(),
        64 * MIB - 8192..64 * MIB - 8192 + 5000
    );
    assert_eq!(load_initrd(&open(disk.path()), &memory, MIB, 32 * MIB).unwrap().start, 32 * MIB - 8192);
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(32 * MIB - 8192 + 4999)).unwrap(), 0x5a);
    for (floor, ceiling) in [(64 * MIB - 4096, u64::MAX), (MIB, 4096), (MIB, MIB + 4999)] {
        let e = load_initrd(&open(disk.path()), &memory, floor, ceiling).unwrap_err();
        assert!(matches!(&e, Error::Config(e) if e[0].field == "initrd"), "{e}");
    }
    assert!(load_initrd(&open(file(0).path()), &memory, MIB, u64::MAX).is_err());
    assert!(BootFile::open("initrd", Path::new("/nonexistent")).is_err());
}

#[test]
fn a_command_line_is_as_long_as_the_image_takes() {
    let memory = Memory::new(2 << 20).unwrap();
    let line = "x".repeat(2047);
    write_cmdline(&memory, &line, 2047).unwrap();
    let mut read = vec![1u8; 2048];
    memory.ram().read_slice(&mut read, GuestAddress(CMDLINE)).unwrap();
    assert_eq!(read, [line.as_bytes(), &[0]].concat());
    let e = write_cmdline(&memory, &line, 2046).unwrap_err();
    assert!(matches!(&e, Error::Config(e) if e[0].field == "cmdline"), "{e}");
}
