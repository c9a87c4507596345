//! Not tests: figures of porting, for whoever works on it. `cargo xtask bench port` is what is published.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::process::{Command, Stdio};
use std::time::Duration;

use port_support::{GUEST, Lab, MAC, Vmm, eventually};

const DMODULE: &str = "10.77.0.3";
const CF_PORT: u16 = 7100;
const NFS_PORT: u16 = 2049;

/// Ports the N-module while a client writes. Needs the images and the load generator:
/// `NMODULE=… DMODULE=… NFS_LOAD=… cargo test -p vmm --test port_measure -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn modules_under_load() {
    let path = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name}=PATH is needed"));
    let (nmodule, dmodule, load) = (path("NMODULE"), path("DMODULE"), path("NFS_LOAD"));
    let lab = Lab::new(3);
    let disk = lab.dir.path().join("disk");
    let status = Command::new("fallocate").args(["-l", "1G"]).arg(&disk).status().unwrap();
    assert!(status.success());
    let cmdline = format!("ip={DMODULE}/24 port={CF_PORT} volume=vol0 format=if-blank");
    let disk = format!("id=disk0,path={}", disk.display());
    let net = "tap=tap2,mac=02:00:00:00:77:03,id=net0";
    let args = ["--image", &dmodule, "--memory", "256M", "--cmdline", &cmdline, "--disk", &disk, "--net", net];
    let _dmodule = lab.spawn("dmodule", &args);
    lab.connect_to(DMODULE, CF_PORT);
    let cmdline = format!("ip={GUEST}/24 dmodule={DMODULE}:{CF_PORT} volume=vol0 no_root_squash");
    let (net, arbiter) = (format!("tap=tap0,mac={MAC},id=lan"), format!("{DMODULE}:{CF_PORT}"));
    let mut args = vec!["--image", &nmodule, "--memory", "32M", "--cmdline", &cmdline, "--net", &net];
    args.extend(["--vm-id", "1", "--arbiter", &arbiter]);
    let mut here = lab.spawn("nmodule", &args);
    lab.connect_to(GUEST, NFS_PORT);
    let mut client = Command::new(&load)
        .arg(format!("nfs://{GUEST}/vol0/load"))
        .args(["write", "32768", "8", "600", "67108864"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let mut blackouts = Vec::new();
    for turn in 0..30u16 {
        let consoles = || ["nmodule", "dmodule"].map(|n| lab.console(n)).join("\n");
        assert!(client.try_wait().unwrap().is_none(), "the load goes on: {}", consoles());
        let there: Vmm = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        std::thread::sleep(Duration::from_millis(200));
        let status = here.wait_port(here.port_unverified(4000 + turn));
        assert_eq!(status["state"], "completed", "{status}");
        println!(
            "blackout {}, port {}, {} rounds, residue {} pages, {}",
            status["blackout_us"],
            status["total_us"],
            status["rounds"].as_array().map_or(0, Vec::len),
            status["residue_pages"],
            status["breakdown"]
        );
        println!("    {}", status["rounds"]);
        blackouts.push(status["blackout_us"].as_u64().unwrap());
        assert!(eventually("the source ends", || (!here.is_alive()).then_some(true)));
        here = there;
        std::thread::sleep(Duration::from_millis(200));
    }
    client.kill().unwrap();
    client.wait().unwrap();
    blackouts.sort_unstable();
    println!(
        "blackout us: least {}, median {}, p90 {}, most {}",
        blackouts[0], blackouts[15], blackouts[27], blackouts[29]
    );
}
