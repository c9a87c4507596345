//! Restored VMs and their disks, between real `vmm` processes: a checkpoint holds no disk, so the image must be what it was, and
//! whoever restores has its lock.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::path::{Path, PathBuf};
use std::process::Command;

use port_support::disks::{MIB, lock, run, sparse, works};
use port_support::{Echo, Lab, Vmm, eventually};

/// Boots the guest that verifies its disk without end, and ends it with a checkpoint.
fn saved(lab: &Lab, disk: &str, image: &str) -> PathBuf {
    let mut vmm = lab.boot("disk", &["--disk", disk]);
    works(&mut vmm, &mut Echo::new(lab), image);
    let path = lab.dir.path().join("saved");
    vmm.api("POST", "/v1/vm/checkpoint", Some(&format!("{{\"path\":{path:?},\"stop\":true}}")));
    assert!(vmm.wait().success());
    assert!(lock(image).is_some(), "the lock ends with the process");
    path
}

fn restore(lab: &Lab, name: &str, dir: &Path, more: &[&str]) -> Vmm {
    let mut args = vec!["--restore", dir.to_str().unwrap(), "--net", "id=lan,tap=tap1"];
    args.extend(more);
    lab.spawn(name, &args)
}

/// What `vmm --restore` ends with, and says, when it refuses.
fn refusal(dir: &Path, disk: &str) -> (i32, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["--restore", dir.to_str().unwrap(), "--net", "id=lan,tap=tap1", "--serial", "none", "--disk", disk])
        .output()
        .unwrap();
    (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn the_guest_goes_on_with_its_disk_and_a_copy_with_a_copy() {
    let lab = Lab::new(2);
    let at = |name: &str| lab.dir.path().join(name).to_str().unwrap().to_owned();
    let image = sparse(at("disk").into(), 4 * MIB);
    let dir = saved(&lab, &format!("path={image}"), &image);
    let copy = at("copy");
    std::fs::copy(&image, &copy).unwrap();
    let mut vmm = restore(&lab, "restored", &dir, &[]);
    works(&mut vmm, &mut Echo::new(&lab), &image);
    drop(vmm);
    // By now that image is further than the checkpoint.
    let mut vmm = restore(&lab, "copy", &dir, &["--disk", &format!("id=disk0,path={copy}")]);
    works(&mut vmm, &mut Echo::new(&lab), &copy);
    assert!(lock(&image).is_some(), "the other one is free");
}

#[test]
fn formats_are_written_out_before_the_end() {
    let lab = Lab::new(2);
    let image = lab.dir.path().join("disk").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "4M"]);
    let dir = saved(&lab, &format!("path={image},format=qcow2"), &image);
    run("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
    let mut vmm = restore(&lab, "restored", &dir, &[]);
    works(&mut vmm, &mut Echo::new(&lab), &image);
}

#[test]
fn an_image_that_does_not_do_is_refused_and_the_checkpoint_is_as_it_was() {
    let lab = Lab::new(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let dir = saved(&lab, &format!("path={image}"), &image);
    let held = eventually("the image is free", || lock(&image));
    let (status, said) = refusal(&dir, &format!("id=disk0,path={image}"));
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("in use by another process"), "{said}");
    drop(held);
    let small = sparse(lab.dir.path().join("small"), MIB);
    let (status, said) = refusal(&dir, &format!("id=disk0,path={small}"));
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("disk0"), "{said}");
    assert!(refusal(&dir, "id=disk0,path=/nonexistent/disk").1.contains("/nonexistent/disk"));
    let mut vmm = restore(&lab, "restored", &dir, &[]);
    works(&mut vmm, &mut Echo::new(&lab), &image);
}
