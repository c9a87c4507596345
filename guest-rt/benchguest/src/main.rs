//! Image that measures the devices of the VMM it runs under, whichever that is; driven by `cargo xtask bench vmm`.
//!
//! Each `job=` of the command line ([`block`]) is done in turn, its result printed as one line; with `serve` the image then
//! answers on the network ([`network`]) until it is asked to quit. Times are the guest's own: whoever reads the lines holds
//! them against the host's clock.
#![no_std]
#![no_main]

extern crate alloc;

mod block;
mod network;

use alloc::{format, string::String};
use guest_rt::{Env, println};

guest_rt::entry!(main);

async fn main(env: Env) -> Result<(), String> {
    for text in env.cmdline.get_all("job") {
        let job: block::Job = text.parse().map_err(|e| format!("job={text}: {e}"))?;
        let disk = env.disks.first().ok_or("no disk")?;
        println!("begin {text}");
        let (operations, ns) = block::run(disk, &job).await?;
        println!("result {text} {operations} {ns}");
    }
    if env.cmdline.has("serve") {
        network::serve(env).await?;
    }
    log::debug!("{:?}", guest_rt::exec::statistics());
    Ok(())
}
