//! Files go in and come out again, with a client nobody here wrote.
use crate::{cluster, one_at_a_time, verify, writer};
use std::path::Path;
use std::process::Command;
use xtask::lab::Lab;
use xtask::{copy, modules};

fn nfs_cp(lab: &Lab, from: &str, to: &str) {
    lab.client1.output(Command::new("nfs-cp").args([from, to])).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_file_survives_the_way_through_both_modules() {
    let _one = one_at_a_time();
    let cluster = cluster();
    let (file, back) = (cluster.lab.data_dir().join("in"), cluster.lab.data_dir().join("out"));
    copy::random_file(&file, (64 << 20) + 4711).unwrap();
    nfs_cp(&cluster.lab, text(&file), &copy::url("file"));
    nfs_cp(&cluster.lab, &copy::url("file"), text(&back));
    assert_eq!(copy::sha256(&file).unwrap(), copy::sha256(&back).unwrap());
    let list = cluster.lab.client1.output(Command::new("nfs-ls").arg(copy::url(""))).unwrap();
    assert!(list.lines().any(|l| l.ends_with(" file") && l.contains(&((64u64 << 20) + 4711).to_string())), "{list}");
}

#[test]
fn the_nmodule_restarts_without_loss() {
    let _one = one_at_a_time();
    let mut cluster = cluster();
    let writer = writer(&cluster, "file", 8 << 20);
    let acknowledged = writer.finish().unwrap();
    cluster.nmodule.daemon.kill().unwrap();
    let (again, _) = modules::start_nmodule(&cluster.lab, &cluster.artifacts, &cluster.lab.node1).unwrap();
    cluster.nmodule = again;
    verify(&cluster.lab, "file", &acknowledged);
}
