//! The N-module image: the network half of a storage node.
#![no_std]
#![no_main]

extern crate alloc;

use guest_rt::{Env, println};

guest_rt::entry!(main);

async fn main(env: Env) -> Result<(), &'static str> {
    println!("N-module: {} MiB, {} network devices, {} disks", env.memory_size >> 20, env.nets.len(), env.disks.len());
    Err("the N-module is not there yet")
}
