//! System tests: real processes in the lab. `cargo xtask test` runs them.
#![allow(clippy::unwrap_used, reason = "all of this crate is tests; clippy.toml only knows functions marked as such")]

mod command;
mod crash;
mod hostile;
mod lab;
mod port;
mod probe;
mod qemu;
mod serve;
mod spawn;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use xtask::artifacts::{Artifacts, data_dir, workspace_root};
use xtask::lab::Lab;
use xtask::load::SyncFill;
use xtask::modules::Cluster;
use xtask::{copy, setup};

/// One system test at a time: they share two cores.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Both modules on a fresh 1 GiB disk.
fn cluster() -> Cluster {
    Cluster::start(&data_dir().unwrap(), Artifacts::find().unwrap(), 1 << 30, "256M").unwrap()
}

fn load_generator() -> PathBuf {
    setup::load_generator(&workspace_root(), &data_dir().unwrap()).unwrap()
}

/// A writer of stable pieces on the client.
fn writer(cluster: &Cluster, file: &str, bytes: u64) -> SyncFill {
    let lab = &cluster.lab;
    SyncFill::start(&load_generator(), &lab.client1, &copy::url(file), bytes, 0, lab.state_dir()).unwrap()
}

/// Every acknowledged piece is there.
fn verify(lab: &Lab, file: &str, acknowledged: &[u64]) {
    assert!(!acknowledged.is_empty());
    SyncFill::verify(&load_generator(), &lab.client1, &copy::url(file), 0, acknowledged, lab.state_dir()).unwrap();
}
