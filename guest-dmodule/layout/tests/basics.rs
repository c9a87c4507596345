//! The main path, and POSIX's rules one by one.
mod rig;
use rig::*;

#[test]
fn create_write_remount_read() {
    let mut volume = Volume::new(4096, SMALL);
    let root = volume.root();
    let dir = volume.make_dir(root, "dir").handle;
    let file = volume.create(dir, "file").handle;
    let data = pattern(1, 300_000);
    volume.write(file, 0, &data);
    assert_eq!(volume.read(file, 0, 300_000), data);
    volume.sync();
    let mut volume = volume.remount();
    let dir = volume.lookup(root, "dir").unwrap().handle;
    let attr = volume.lookup(dir, "file").unwrap();
    assert_eq!((attr.handle, attr.size), (file, 300_000));
    assert_eq!(volume.read(file, 0, 1 << 20), data);
    assert_eq!(volume.read(file, 5000, 10), data[5000..5010]);
    volume.write(file, 4090, b"0123456789");
    volume.sync();
    let mut volume = volume.remount();
    let mut expected = data;
    expected[4090..4100].copy_from_slice(b"0123456789");
    assert_eq!(volume.read(file, 0, 1 << 20), expected);
    volume.remove(dir, "file");
    volume.settle();
    volume.sync();
    assert_eq!(volume.lookup(dir, "file"), Err(fabric::fs::Status::NotFound));
}
