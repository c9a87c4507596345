//! What the tests share.
#![allow(dead_code, missing_docs)]
use nfs::engine::{Config, mappings};
use nfs::export::{Access, Export};
use nfs::nfs3::results::Capacity;

pub mod memory;
pub mod message;
pub mod serve;

pub fn config() -> Config {
    Config {
        exports: vec![Export { path: "/vol0".into(), volume: "vol0".into() }],
        access: Access { root_squash: false, insecure_ports: true },
        mappings: mappings(111, true, 2049, 2049),
        capacity: Capacity { file_size_max: 1 << 40, links_max: 32000 },
    }
}

/// Runs a future that needs no I/O and no other task to end.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}
