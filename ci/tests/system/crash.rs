//! `kill -9` at any time: what a client was told is stable is there.
use crate::{cluster, one_at_a_time, verify, writer};
use xtask::modules::{self, Disk};

const FILE: u64 = 64 << 20;

#[test]
fn a_copy_goes_on_over_the_death_of_the_dmodule() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    for pieces in [100, 300] {
        writer.wait_for(pieces).unwrap();
        cluster.dmodule.daemon.kill().unwrap();
        let (again, _) =
            modules::start_dmodule(&cluster.lab, &cluster.artifacts, &cluster.disk, Disk::Existing, "256M").unwrap();
        cluster.dmodule = again;
    }
    let acknowledged = writer.finish().unwrap();
    verify(&cluster.lab, "file", &acknowledged);
}

#[test]
fn what_was_stable_is_there_after_both_modules_died() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let mut writer = writer(&cluster, "file", FILE);
    writer.wait_for(200).unwrap();
    cluster.dmodule.daemon.kill().unwrap();
    cluster.nmodule.daemon.kill().unwrap();
    let acknowledged = writer.abandon().unwrap();
    assert!(acknowledged.len() >= 200);
    let (dmodule, _) =
        modules::start_dmodule(&cluster.lab, &cluster.artifacts, &cluster.disk, Disk::Existing, "256M").unwrap();
    cluster.dmodule = dmodule;
    let (nmodule, _) = modules::start_nmodule(&cluster.lab, &cluster.artifacts, &cluster.lab.node1).unwrap();
    cluster.nmodule = nmodule;
    verify(&cluster.lab, "file", &acknowledged);
}

#[test]
fn a_second_vmm_on_the_same_disk_is_refused() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let mut second = std::process::Command::new(&cluster.artifacts.vmm);
    second.arg("--image").arg(&cluster.artifacts.images.dmodule).args(["--memory", "64M"]);
    let out = second.arg("--disk").arg(format!("path={}", cluster.disk.display())).output().unwrap();
    assert!(!out.status.success());
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(message.contains("disk0.img"), "{message}");
}
