//! Image that exercises guest-rt, one thing a boot: `test=NAME` on the command line says which.
#![no_std]
#![no_main]

extern crate alloc;

mod block;
mod faults;
mod memory;
mod network;

use alloc::{format, string::String};
use guest_rt::time::{Duration, Instant, realtime_ns, sleep};
use guest_rt::{Env, println};

guest_rt::entry!(main);

async fn main(env: Env) -> Result<(), String> {
    let name = env.cmdline.get("test").unwrap_or("hello");
    println!("testguest: {} MiB, test {name}", env.memory_size >> 20);
    match name {
        "hello" => hello(&env).await,
        "memory" => memory::run(),
        "block" => block::run(&env).await,
        "block-loop" => block::run_on(&env).await,
        "echo" => network::echo(env).await,
        "disk" => {
            let disk = env.disks.first().ok_or("no disk")?.clone();
            guest_rt::spawn(block::verify_for_ever(disk));
            network::echo(env).await
        }
        "writer" => {
            let pace = env.cmdline.get("pace_us").map_or(Ok(0), str::parse).map_err(|e| format!("pace_us: {e}"))?;
            guest_rt::spawn(memory::write_for_ever(Duration::from_micros(pace)));
            network::echo(env).await
        }
        "heap" => {
            guest_rt::spawn(memory::allocate_for_ever());
            network::echo(env).await
        }
        "client" => network::client(env).await,
        "fail" => Err("asked to fail".into()),
        other => faults::cause(other),
    }
}

async fn hello(env: &Env) -> Result<(), String> {
    let start = Instant::now();
    sleep(Duration::from_millis(20)).await;
    let slept = start.elapsed();
    let identity = guest_rt::identity();
    println!("slept {} us, at least 20000", slept.as_micros());
    println!("realtime {} s, vm_id {}, epoch {}", realtime_ns() / 1_000_000_000, identity.vm_id, identity.epoch);
    guest_rt::store_epoch(identity.epoch + 7);
    if guest_rt::identity().epoch != identity.epoch + 7 {
        return Err("the epoch was not stored".into());
    }
    for (i, disk) in env.disks.iter().enumerate() {
        let serial = disk.serial().await.map_err(|e| format!("serial: {e}"))?;
        println!("disk {i}: {} bytes, read-only {}, serial \"{serial}\"", disk.capacity(), disk.is_read_only());
    }
    for (i, net) in env.nets.iter().enumerate() {
        println!("net {i}: mac {:02x?}, mtu {}, {:?}", net.mac(), net.mtu(), net.offloads());
    }
    log::info!("{:?}", guest_rt::exec::statistics());
    if slept < Duration::from_millis(20) || slept > Duration::from_secs(10) {
        return Err(format!("a sleep of 20 ms took {slept:?}"));
    }
    guest_rt::boot_mark(guest_rt::BOOT_MARK_SERVING);
    println!("all is well");
    Ok(())
}
