//! A D-module as a process on the host: `dmodule DISK [ADDRESS:PORT [VOLUME]]`. To test N-modules against; the
//! disk is a file, made with 1 GiB if it is not there, and formatted if it is blank.
#[path = "../tests/host/mod.rs"]
mod host;

use std::time::{Duration, SystemTime};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let disk = args.next().ok_or("usage: dmodule DISK [ADDRESS:PORT [VOLUME]]")?;
    let listen = args.next().unwrap_or_else(|| "127.0.0.1:7100".into()).parse()?;
    let volume = args.next().unwrap_or_else(|| "vol0".into());
    let path = std::path::Path::new(&disk);
    if !path.exists() {
        std::fs::File::create_new(path)?.set_len(1 << 30)?;
    }
    let boot = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64;
    let host = host::Host::start(path, listen, &host::options(&volume, boot))?;
    println!("volume {volume} of {disk} on {}", host.address);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
