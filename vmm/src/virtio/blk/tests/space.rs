//! Space of the host: given back, taken, and none left.

use super::*;

fn blocks(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap())
}

/// What discards and zeroes must do wherever the image is. `frees`: that space comes back can be seen.
fn discard_and_zero(path: &Path, frees: bool) {
    let before = std::fs::read(path).unwrap();
    let mut d = Disk::with(&disk(path, false), ALL, 1);
    assert_ne!(d.0.reg(0x100 + 36), 0, "max_discard_sectors");
    let full = blocks(path);
    assert_eq!(d.range(13, 8, 16, 0), 0);
    assert_eq!(d.range(13, 100, 3, 1), 0);
    assert_eq!(d.range(11, 1024, 512, 0), 0);
    assert_eq!(d.request(4, 0, &[]).0, 0);
    if frees {
        assert!(blocks(path) + 500 <= full, "{} of {full} blocks", blocks(path));
    }
    for (kind, sector, sectors, flags, status) in [
        (11, 0, 8, 1, 2),    // unmap is for write-zeroes
        (13, 0, 8, 2, 2),    // a flag there is not
        (11, 4090, 8, 0, 1), // across the end
        (11, u64::MAX, 8, 0, 1),
        (13, 0, WRITE_ZEROES_MAX + 1, 0, 1), // more than announced
        (13, 4088, 8, 0, 0),
        (11, 0, 0, 0, 0),
    ] {
        assert_eq!(d.range(kind, sector, sectors, flags), status, "{kind} {sector} {sectors} {flags}");
    }
    // what the guest reads, past any cache of this process
    for (sector, zero) in
        [(7, false), (8, true), (23, true), (24, false), (99, false), (100, true), (102, true), (4088, true)]
    {
        assert_eq!(d.request(0, sector, &[(BUFFER, 512)]).0, 0);
        let at = sector as usize * 512;
        let expected = if zero { vec![0; 512] } else { before[at..at + 512].to_vec() };
        assert_eq!(d.0.read(BUFFER, 512), expected, "sector {sector}");
    }
    assert_eq!(d.range(13, 0, 4096, 0), 0);
    drop(d);
    assert!(std::fs::read(path).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn discards_and_zeroes_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    discard_and_zero(&image(&dir, 2 << 20), true);
}

/// tmpfs has neither O_DIRECT here nor ZERO_RANGE: zeroes are written.
#[test]
fn discards_and_zeroes_on_tmpfs() {
    let mount = Tmpfs::new("4m");
    let path = mount.0.path().join("image");
    std::fs::write(&path, (0..2usize << 20).map(|i| i as u8 | 1).collect::<Vec<_>>()).unwrap();
    discard_and_zero(&path, true);
    let config = DiskConfig { direct: Some(true), ..disk(&path, false) };
    let e = Blk::open(&config).err().unwrap().to_string();
    assert!(e.contains("direct") && e.contains("page cache"), "{e}");
}

/// A file as a block device.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Loop {
        let out = std::process::Command::new("losetup").args(["--find", "--show"]).arg(path).output().unwrap();
        assert!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
        Loop(String::from_utf8(out.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn discards_and_zeroes_on_a_block_device() {
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(&image(&dir, 2 << 20));
    discard_and_zero(Path::new(&device.0), false);
    // one writer a device, too
    let _first = Blk::open(&disk(Path::new(&device.0), false)).unwrap();
    assert!(Blk::open(&disk(Path::new(&device.0), false)).is_err());
}

#[test]
fn a_full_disk_is_an_error_and_gets_over_it() {
    let mount = Tmpfs::new("1m");
    let path = mount.0.path().join("image");
    // larger than the file system, as sparse images are
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let mut d = Disk::with(&disk(&path, false), ALL, 1);
    d.0.write(BUFFER, &[0x77; 64 << 10]);
    let statuses: Vec<u8> = (0..32).map(|i| d.request(1, i * 128, &[(BUFFER, 64 << 10)]).0).collect();
    let written = statuses.iter().filter(|s| **s == 0).count();
    assert!(statuses.contains(&1) && (10..=16).contains(&written), "{statuses:?}");
    assert!(d.metrics().contains(&format!("vmm_blk_errors_total{{device=\"disk7\"}} {}", 32 - written)));
    // what was written is there; room makes writes work again
    assert_eq!(d.request(0, 0, &[(BUFFER, 512)]).0, 0);
    assert_eq!(d.0.read(BUFFER, 512), [0x77; 512]);
    assert_eq!(d.range(11, 0, 512, 0), 0);
    assert_eq!(d.request(1, 8000, &[(BUFFER, 4096)]).0, 0);
}
