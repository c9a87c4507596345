//! The D-module image: the data half of a storage node. Serves one volume of one disk to N-modules over the cluster
//! fabric, and ownership of VMs to their monitors.
//!
//! Command line: `ip=ADDRESS/PREFIX`, `gw=ADDRESS`, `port=` (7100), `volume=` (vol0), `format=if-blank|never` (never),
//! `owners=keep|forget` (keep).
//!
//! The logic is in `dserver`, `layout` and `fabric`; here it is given a disk, a network, a clock and random numbers.
#![no_std]
#![no_main]
#![forbid(unsafe_op_in_unsafe_fn)]

extern crate alloc;

mod config;
mod connection;
mod disk;
mod node;

use alloc::string::String;
use config::Config;
use disk::VirtioDisk;
use dserver::{Mounted, Options, mount};
use fabric::fs::Time;
use fabric::id::BootId;
use guest_rt::net::Stack;
use guest_rt::time::{Instant, realtime_ns};
use guest_rt::{BOOT_MARK_SERVING, Env, boot_mark, println, rng};
use node::Node;

guest_rt::entry!(main);

/// Why the D-module ended.
#[derive(Debug, thiserror::Error)]
enum DModuleError {
    #[error("command line: {0}")]
    Config(#[from] config::ConfigError),
    #[error("{0} is missing: the D-module needs one network device and one disk")]
    Missing(&'static str),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("volume {0:?}: {1}")]
    Mount(String, dserver::StartError),
    #[error("port {0}: {1}")]
    Listen(u16, guest_rt::net::ListenError),
}

async fn main(mut env: Env) -> Result<(), DModuleError> {
    let config = Config::parse(&env.cmdline, env.memory_size)?;
    let device = env.disks.pop().ok_or(DModuleError::Missing("the disk"))?;
    let net = env.nets.pop().ok_or(DModuleError::Missing("the network device"))?;
    if device.is_read_only() {
        return Err(DModuleError::ReadOnly);
    }
    let disk = VirtioDisk::new(device);
    let options = Options {
        volume: config.volume.clone(),
        format: config.format,
        owners: config.owners,
        boot_id: BootId(rng::random_u64()),
        random: [rng::random_u64(), rng::random_u64(), rng::random_u64()],
        now: Time(realtime_ns() as i64),
        cache_blocks: config.memory.cache_blocks,
        dirty_blocks: config.memory.dirty_blocks,
        held_bytes: config.memory.held_bytes,
        sessions: config.memory.sessions,
    };
    let start = Instant::now();
    let Mounted { server, formatted, vms } =
        mount(&disk, &options).await.map_err(|e| DModuleError::Mount(config.volume.clone(), e))?;
    println!(
        "D-module: volume {} {} in {} us; {vms} VMs known; {} MiB of cache",
        config.volume,
        if formatted { "made and mounted" } else { "mounted" },
        start.elapsed().as_micros(),
        config.memory.cache_blocks >> 8,
    );
    let stack = Stack::new(net, config.net);
    let listener = stack
        .listen(config.port, config.memory.buffers, connection::BACKLOG)
        .map_err(|e| DModuleError::Listen(config.port, e))?;
    let node = Node::new(server, disk, config.memory.frame_bytes);
    println!("D-module: serving on {}:{}", config.net.address.address, config.port);
    boot_mark(BOOT_MARK_SERVING);
    connection::accept(&node, &listener, &config.memory).await;
    Ok(())
}
