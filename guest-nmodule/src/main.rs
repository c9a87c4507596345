//! The N-module image: NFS over TCP in front, a CF client behind.
//!
//! Its command line is described in `guest_nmodule::config`. It serves portmap on port 111, NFS and MOUNT on 2049. NULL calls
//! are answered as soon as it listens; what needs the D-module waits until that can be reached.
//!
//! With the word `template` it makes its buffers and sockets ready and waits; who it is, whom it serves and which D-module
//! it needs it reads when it has been made an instance.
#![no_std]
#![no_main]

extern crate alloc;

mod link;
mod race;
mod server;

use alloc::{format, rc::Rc, string::String};
use core::fmt::Display;
use core::net::IpAddr;
use guest_nmodule::config::Config;
use guest_nmodule::limits::{self, Limits};
use guest_rt::net::{self, Buffers, Stack};
use guest_rt::{BOOT_MARK_PREPARED, BOOT_MARK_SERVING, Env, boot_mark, identity, next_instance, println, spawn};
use link::Link;
use nfs::engine::{Engine, mappings};
use nfs::{nfs3, portmap};
use server::Server;

guest_rt::entry!(main);

async fn main(mut env: Env) -> Result<(), String> {
    let limits = Limits::of(env.memory_size).map_err(text)?;
    if env.nets.is_empty() {
        return Err("there is no network device".into());
    }
    let rx_buffers = guest_rt::virtio::net::RxBuffers::for_memory(env.memory_size);
    let stack = Stack::prepare(env.nets.swap_remove(0), rx_buffers);
    let listen = |port, size| stack.listen(port, Buffers { rx: size, tx: size }, limits::BACKLOG).map_err(text);
    let listeners = [
        (listen(nfs3::PORT, limits::NFS_BUFFER)?, limits.connections),
        (listen(portmap::PORT, limits::PORTMAP_BUFFER)?, limits::PORTMAP_CONNECTIONS),
    ];

    if env.cmdline.has(guest_rt::TEMPLATE_WORD) {
        println!("N-module: a template of {} MiB", env.memory_size >> 20);
        boot_mark(BOOT_MARK_PREPARED);
        env.cmdline = next_instance().await.map_err(text)?;
    }
    let config = Config::parse(env.cmdline.text()).map_err(text)?;
    if identity().vm_id == 0 {
        return Err("this VM has no id (vm_id)".into());
    }
    let address = net::Cidr { address: config.address, prefix: config.prefix };
    stack.begin(net::Config { address, gateway: config.gateway, rx_buffers });

    let link = Rc::new(Link::new());
    let local = IpAddr::V4(config.address);
    let serving = nfs::engine::Config {
        exports: config.exports,
        access: config.access,
        mappings: mappings(portmap::PORT, false, nfs3::PORT, nfs3::PORT),
        capacity: limits::CAPACITY,
    };
    let server = Server::new(Engine::new(link.clone(), serving), local, limits);
    for (listener, connections) in listeners {
        spawn(server.clone().accept(stack.clone(), listener, connections));
    }
    spawn(server.clone().relieve());
    boot_mark(BOOT_MARK_SERVING);
    println!(
        "N-module {:#x}: {} on {local}, D-module {}, at most {} connections",
        identity().vm_id,
        server.exports(),
        config.dmodule,
        limits.connections
    );

    let keeping = link.clone();
    spawn(async move { keeping.run(stack, config.dmodule).await });
    let current = link.fenced().await;
    Err(format!("another instance has taken this VM's ownership (epoch {}): serving ends", current.0))
}

fn text(error: impl Display) -> String {
    format!("{error}")
}
