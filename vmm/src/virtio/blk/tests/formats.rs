//! Images with a format, made, read and checked by QEMU.

use super::*;

pub(super) fn qemu_img(args: &[&str]) -> String {
    let out = std::process::Command::new("qemu-img").args(args).output().expect("qemu-img (Debian: qemu-utils)");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A qcow2 image over a backing file: what QEMU makes we read, what we write QEMU reads.
#[test]
fn qcow2_goes_to_qemu_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let raw = image(&dir, 2 << 20);
    let base_bytes = std::fs::read(&raw).unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), &at("base")]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &at("top")]);
    let base_before = std::fs::read(at("base")).unwrap();
    let config = DiskConfig { format: DiskFormat::Qcow2, ..disk(Path::new(&at("top")), false) };
    let mut d = Disk::with(&config, ALL, 1);
    assert_eq!(d.0.reg(0x100), 4096);
    assert_eq!(d.request(0, 8, &[(BUFFER, 4096), (BUFFER + 0x4000, 512)]), (0, 4609));
    assert_eq!(d.0.read(BUFFER, 4096), base_bytes[4096..8192]);
    d.0.write(BUFFER, &[0xab; 1024]);
    assert_eq!(d.request(1, 101, &[(BUFFER, 1024)]), (0, 1));
    assert_eq!(d.range(13, 2048, 256, 1), 0);
    assert_eq!(d.range(13, 200, 3, 0), 0);
    assert_eq!(d.range(11, 3072, 128, 0), 0);
    assert_eq!(d.request(4, 0, &[]), (0, 1));
    // one writer, and the backing file stays as it is, whoever asks
    assert!(Blk::open(&config).is_err());
    assert!(Blk::open(&disk(Path::new(&at("base")), false)).is_err());
    assert_eq!(d.blk().resize(Some(3 << 20)).unwrap(), 3 << 20);
    d.0.transport.process();
    assert_eq!(d.request(1, 6143, &[(BUFFER, 512)]).0, 0);
    for (kind, sector, status) in [(0, 6144, 1), (1, u64::MAX, 1)] {
        assert_eq!(d.request(kind, sector, &[(BUFFER, 512)]).0, status);
    }
    drop(d);
    assert!(std::fs::read(at("base")).unwrap() == base_before);
    qemu_img(&["check", "-q", "-f", "qcow2", &at("top")]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &at("top"), &at("back")]);
    let mut expected = base_bytes;
    expected.resize(3 << 20, 0);
    expected[101 * 512..103 * 512].fill(0xab);
    expected[200 * 512..203 * 512].fill(0);
    expected[2048 * 512..2304 * 512].fill(0);
    expected[6143 * 512..].fill(0xab);
    let mut back = std::fs::read(at("back")).unwrap();
    // what was discarded may read as anything
    let discarded = 3072 * 512..3200 * 512;
    back[discarded.clone()].fill(0);
    expected[discarded].fill(0);
    assert!(back == expected);
}

#[test]
fn formats_are_never_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let raw = image(&dir, 1 << 20);
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let open = |name: &str, format| {
        let config = DiskConfig { format, readonly: true, ..disk(Path::new(&at(name)), true) };
        Blk::open(&config).map(|b| b.size()).map_err(|e| e.to_string())
    };
    // raw is raw, even if it looks like something else
    qemu_img(&["create", "-q", "-f", "qcow2", &at("image.qcow2"), "1M"]);
    let len = std::fs::metadata(at("image.qcow2")).unwrap().len();
    assert_eq!(open("image.qcow2", DiskFormat::Raw).unwrap(), len / 512 * 512);
    assert_eq!(open("image.qcow2", DiskFormat::Qcow2).unwrap(), 1 << 20);
    // what is no qcow2 image is refused
    assert!(open("image", DiskFormat::Qcow2).is_err());
    // nor is the format of a backing file guessed: version 2 header without the extension that says it
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", raw.to_str().unwrap(), "-F", "raw", &at("top")]);
    assert_eq!(open("top", DiskFormat::Qcow2).unwrap(), 1 << 20);
    let mut bytes = std::fs::read(at("top")).unwrap();
    let extension = bytes.windows(4).position(|w| w == 0xe279_2acau32.to_be_bytes()).unwrap();
    bytes[extension..extension + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    std::fs::write(at("top"), bytes).unwrap();
    let e = open("top", DiskFormat::Qcow2).unwrap_err();
    assert!(e.contains("does not say which format"), "{e}");
    // damaged in any way: an error or an image, never a panic
    let good = std::fs::read(at("image.qcow2")).unwrap();
    let mut random = Random(11);
    for _ in 0..100 {
        let mut bytes = good.clone();
        for _ in 0..3 {
            let i = (random.next() % 120) as usize;
            bytes[i] = random.next() as u8;
        }
        std::fs::write(at("bad"), bytes).unwrap();
        let _ = open("bad", DiskFormat::Qcow2);
    }
}

#[test]
fn a_full_disk_below_qcow2_is_an_error() {
    let mount = Tmpfs::new("1m");
    let path = mount.0.path().join("image");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "8M"]);
    let config = DiskConfig { format: DiskFormat::Qcow2, ..disk(&path, false) };
    let mut d = Disk::with(&config, ALL, 1);
    d.0.write(BUFFER, &[0x77; 64 << 10]);
    let statuses: Vec<u8> = (0..32).map(|i| d.request(1, i * 128, &[(BUFFER, 64 << 10)]).0).collect();
    assert!(statuses.contains(&1) && statuses[0] == 0, "{statuses:?}");
    assert_eq!(d.request(0, 0, &[(BUFFER, 512)]).0, 0);
    assert_eq!(d.0.read(BUFFER, 512), [0x77; 512]);
}
