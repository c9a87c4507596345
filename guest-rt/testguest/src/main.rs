//! Image that exercises guest-rt, one thing a boot: `test=NAME` on the command line says which.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::{format, string::String};
use guest_rt::{Env, println};

guest_rt::entry!(main);

async fn main(env: Env) -> Result<(), String> {
    println!("testguest: {} MiB, command line \"{}\"", env.memory_size >> 20, env.cmdline.text());
    match env.cmdline.get("test").unwrap_or("hello") {
        "hello" => {
            guest_rt::time::sleep(guest_rt::time::Duration::from_millis(20)).await;
            log::info!("hello after a sleep of 20 ms");
            Ok(())
        }
        "fail" => Err("asked to fail".into()),
        "panic" => panic!("asked to panic"),
        other => Err(format!("no test {other:?}")),
    }
}
