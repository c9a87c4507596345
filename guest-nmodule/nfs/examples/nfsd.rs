//! The engines on this machine's TCP: `nfsd [ADDRESS [PORTMAP NFS]]`, default 127.0.0.1 and the well-known ports.
//! Exports `/vol0`; everything is in memory and gone at the end.
use nfs::engine::{Config, Engine, mappings};
use nfs::export::{Access, Export};
use nfs::nfs3::results::Capacity;
use std::{io, rc::Rc};
use tokio::net::TcpListener;

#[path = "../tests/support/serve.rs"]
mod serve;
#[path = "../tests/support/volume.rs"]
#[allow(clippy::expect_used)]
mod volume;

/// Size of the volume: 8 GiB, of which what is written takes memory.
const BLOCKS: u64 = 2 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    env_logger::init();
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1".into());
    let mut port = |default| arguments.next().map_or(Ok(default), |port| port.parse().map_err(io::Error::other));
    let (portmap_port, nfs_port) = (port(nfs::portmap::PORT)?, port(nfs::nfs3::PORT)?);
    let config = Config {
        exports: vec![Export { path: "/vol0".into(), volume: "vol0".into() }],
        access: Access { root_squash: false, insecure_ports: true },
        mappings: mappings(portmap_port, false, nfs_port, nfs_port),
        capacity: Capacity { file_size_max: layout::FILE_SIZE_MAX, links_max: layout::LINKS_MAX },
    };
    let engine = Rc::new(Engine::new(volume::Volume::new(BLOCKS), config));
    let portmap = TcpListener::bind((address.as_str(), portmap_port)).await?;
    let nfs = TcpListener::bind((address.as_str(), nfs_port)).await?;
    println!("serving /vol0 on {address}, ports {portmap_port} and {nfs_port}");
    tokio::task::LocalSet::new()
        .run_until(async {
            tokio::try_join!(serve::serve(engine.clone(), portmap), serve::serve(engine.clone(), nfs)).map(|_| ())
        })
        .await
}
