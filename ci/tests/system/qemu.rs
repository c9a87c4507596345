//! The images under a monitor that is not ours: QEMU's microvm in software emulation.
use crate::one_at_a_time;
use std::net::SocketAddrV4;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use xtask::artifacts::{Artifacts, data_dir};
use xtask::lab::{Host, Lab};
use xtask::modules::{self, Disk};
use xtask::process::Daemon;
use xtask::{copy, probe};

const LIMIT: Duration = Duration::from_secs(60);

fn qemu(lab: &Lab, host: &Host, image: &Path, name: &str, mac: &str, cmdline: &str, more: &[&str]) -> Daemon {
    host.add_tap(name).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    // Devices on the kernel command line (QEMU leaves them out when it has ACPI), in the form of virtio 1.
    qemu.args(["-M", "microvm,x-option-roms=off,acpi=off", "-global", "virtio-mmio.force-legacy=off"]);
    qemu.args(["-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config"]);
    qemu.args(["-display", "none", "-serial", "stdio", "-no-reboot", "-append", cmdline]).arg("-kernel").arg(image);
    qemu.args(["-netdev", &format!("tap,id=net0,ifname={name},script=no,downscript=no")]);
    qemu.args(["-device", &format!("virtio-net-device,netdev=net0,mac={mac}")]).args(more);
    host.daemon(&format!("QEMU with {name}"), &mut qemu, &lab.state_dir().join(format!("{name}.log"))).unwrap()
}

#[test]
fn both_images_serve_files_under_qemu_microvm() {
    let _one = one_at_a_time();
    let images = Artifacts::find().unwrap().images;
    let lab = Lab::create(&data_dir().unwrap()).unwrap();
    let disk = lab.data_dir().join("disk0.img");
    modules::create_disk(&disk, 256 << 20).unwrap();
    let drive = format!("file={},format=raw,if=none,id=disk0", disk.display());
    let more = ["-drive", drive.as_str(), "-device", "virtio-blk-device,drive=disk0"];
    let never = AtomicBool::new(false);
    let node = &lab.node1;
    let dmodule =
        qemu(&lab, node, &images.dmodule, "dm", modules::DMODULE_MAC, &modules::dmodule_cmdline(Disk::New), &more);
    let answer = probe::first_fabric_answer(node, modules::FABRIC, LIMIT, &never);
    assert!(answer.is_ok(), "{answer:?}{}", dmodule.quote_log());
    let nmodule_cmdline = format!("{} vm_id={}", modules::nmodule_cmdline(), modules::NMODULE_VM_ID);
    let nmodule = qemu(&lab, node, &images.nmodule, "nm", modules::NMODULE_MAC, &nmodule_cmdline, &[]);
    let nfs: SocketAddrV4 = modules::NFS;
    let answer = probe::first_reply(&lab.client1, nfs, LIMIT, &never);
    assert!(answer.is_ok(), "{answer:?}{}", nmodule.quote_log());

    let (file, back) = (lab.data_dir().join("in"), lab.data_dir().join("out"));
    copy::random_file(&file, 2 << 20).unwrap();
    let path = |p: &Path| p.display().to_string();
    for (from, to) in [(path(&file), copy::url("file")), (copy::url("file"), path(&back))] {
        lab.client1.output(Command::new("nfs-cp").args([from, to])).unwrap();
    }
    assert_eq!(copy::sha256(&file).unwrap(), copy::sha256(&back).unwrap());
}
