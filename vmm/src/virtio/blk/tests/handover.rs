//! An image that goes from one process to another.

use super::*;

/// Two processes' disks on one image: whoever has not the lock neither reads nor writes, and what the other wrote is found.
#[test]
fn an_image_is_handed_over_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = dir.path().join("qcow2");
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("1M");
    assert!(create.status().unwrap().success());
    let raw = DiskConfig { direct: Some(false), ..disk(&image(&dir, 1 << 20), false) };
    let qcow2 = DiskConfig { format: DiskFormat::Qcow2, path: qcow2, ..raw.clone() };
    for config in [raw, qcow2] {
        let mut here = Disk::with(&config, ALL, 1);
        here.0.write(BUFFER, &[0x5a; 512]);
        assert_eq!(here.request(1, 3, &[(BUFFER, 512)]).0, 0);
        let identity = here.blk().identity().unwrap();
        let mut there = Blk::open_for_port(&config, &identity).unwrap();
        assert!(there.take_image().unwrap_err().to_string().contains("in use by another process"));
        assert!(there.resize(None).is_err(), "it is not its own");
        here.0.transport.quiesce();
        if let Some(flusher) = here.blk().flusher().unwrap() {
            flusher.flush().unwrap();
        }
        here.blk().give_image().unwrap();
        assert!(here.blk().resize(None).is_err());
        there.take_image().unwrap();
        there.take_image().unwrap();
        assert_eq!(there.size(), 1 << 20);
        assert!(here.blk().take_image().unwrap_err().to_string().contains("in use by another process"));
        let mut bench = Bench::new(Box::new(there));
        bench.start(ALL, 1);
        let mut there = Disk(bench);
        assert_eq!(there.request(0, 3, &[(BUFFER, 512)]).0, 0);
        assert_eq!(there.0.read(BUFFER, 512), [0x5a; 512]);
        there.0.write(BUFFER, &[0xa5; 1024]);
        assert_eq!(there.request(1, 4, &[(BUFFER, 1024)]).0, 0);
        there.0.transport.quiesce();
        there.blk().give_image().unwrap();
        drop(there);
        // what it knew of the image before is forgotten
        here.blk().take_image().unwrap();
        here.0.transport.resume();
        assert_eq!(here.request(0, 5, &[(BUFFER + 4096, 512)]).0, 0);
        assert_eq!(here.0.read(BUFFER + 4096, 512), [0xa5; 512]);
        // and another file is not it
        let other = dir.path().join("other");
        std::fs::copy(&config.path, &other).unwrap();
        let other = DiskConfig { path: other, ..config.clone() };
        let error = Blk::open_for_port(&other, &identity).err().unwrap().to_string();
        assert!(error.contains("another image"), "{error}");
    }
}
