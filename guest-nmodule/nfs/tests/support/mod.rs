//! What the tests share.
#![allow(dead_code, missing_docs)]
use nfs::engine::{Config, mappings};
use nfs::export::{Access, Export};
use nfs::nfs3::results::Capacity;

pub mod message;
pub mod serve;
pub mod volume;

pub fn config() -> Config {
    Config {
        exports: vec![Export { path: "/vol0".into(), volume: "vol0".into() }],
        access: Access { root_squash: false, insecure_ports: true },
        mappings: mappings(111, true, 2049, 2049),
        capacity: Capacity { file_size_max: layout::FILE_SIZE_MAX, links_max: layout::LINKS_MAX },
    }
}

/// Runs a future that needs no I/O and no other task to end.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A new file system of 256 MiB.
pub fn service() -> volume::Volume {
    volume::Volume::new(1 << 16)
}
