//! Not tests: figures of porting, for whoever works on it. `cargo xtask bench port` is what is published.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::process::{Command, Stdio};
use std::time::Duration;

use port_support::{GUEST, Lab, MAC, Vmm, eventually};

const DMODULE: &str = "10.77.0.3";
const CF_PORT: u16 = 7100;
const NFS_PORT: u16 = 2049;

/// What the client's TCP counts when something got lost or came out of order, or seemed to.
const COUNTERS: [&str; 11] = [
    "RetransSegs",
    "TCPFastRetrans",
    "TCPSackRecovery",
    "TCPTimeouts",
    "TCPLossProbes",
    "TCPLossProbeRecovery",
    "TCPDSACKRecv",
    "TCPDSACKUndo",
    "TCPSACKReorder",
    "TCPOFOQueue",
    "TCPDSACKOldSent",
];

/// The counters of this thread's network namespace.
fn counters() -> Vec<u64> {
    let mut found = std::collections::HashMap::new();
    for file in ["snmp", "netstat"] {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.chunks_exact(2) {
            let names = pair[0].split(' ').skip(1).map(str::to_owned);
            found.extend(names.zip(pair[1].split(' ').skip(1).map(|n| n.parse::<i64>().unwrap_or(0) as u64)));
        }
    }
    COUNTERS.iter().map(|name| found.get(*name).copied().unwrap_or(0)).collect()
}

/// Ports the N-module (of `MEMORY`) while a client writes (`MODE=randread`: reads) `PORTS` times; `VMM`: with another build. Needs the images and the load generator:
/// `NMODULE=… DMODULE=… NFS_LOAD=… cargo test -p vmm --test port_measure -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn modules_under_load() {
    let ports: u16 = std::env::var("PORTS").map_or(30, |n| n.parse().unwrap());
    let mode = std::env::var("MODE").unwrap_or("write".into());
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
    let memory = std::env::var("MEMORY").unwrap_or("64M".into());
    let mut args = vec!["--image", &nmodule, "--memory", &memory, "--cmdline", &cmdline, "--net", &net];
    args.extend(["--vm-id", "1", "--arbiter", &arbiter]);
    let mut here = lab.spawn("nmodule", &args);
    lab.connect_to(GUEST, NFS_PORT);
    let file = format!("nfs://{GUEST}/vol0/load");
    if mode != "write" {
        let filled = Command::new(&load).args([&file, "fill", "32768", "8", "600", "67108864"]).output().unwrap();
        assert!(filled.status.success());
    }
    let mut client = Command::new(&load)
        .args([&file, &mode, "32768", "8", "600", "67108864"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let (mut blackouts, mut ports_us, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    let mut around = vec![0; COUNTERS.len()];
    let first = counters();
    for turn in 0..ports {
        let consoles = || ["nmodule", "dmodule"].map(|n| lab.console(n)).join("\n");
        assert!(client.try_wait().unwrap().is_none(), "the load goes on: {}", consoles());
        let there: Vmm = lab.receive_as_shipped(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        std::thread::sleep(Duration::from_millis(200));
        let before = counters();
        let id = here.port_unverified(4000 + turn);
        let mut status = here.wait_port(id);
        assert_eq!(status["state"], "completed", "{status}");
        // The figures of the time after the hand-over come later.
        while let Some((200, later)) = here.try_api("GET", &format!("/v1/migrations/{id}"), None) {
            status = later;
            std::thread::sleep(Duration::from_millis(20));
        }
        println!(
            "blackout {}, port {}, {} bytes, {} posted and {} free pages, {} rounds, residue {} pages, {}",
            status["blackout_us"],
            status["total_us"],
            status["bytes"],
            status["posted_pages"],
            status["free_pages"],
            status["rounds"].as_array().map_or(0, Vec::len),
            status["residue_pages"],
            status["breakdown"]
        );
        let late = &status["stragglers"];
        println!(
            "    {}; forwarded {}, stragglers {late}, order {}",
            status["rounds"], status["forwarded_frames"], status["order"]
        );
        blackouts.push(status["blackout_us"].as_u64().unwrap());
        ports_us.push(status["total_us"].as_u64().unwrap());
        bytes.push(status["bytes"].as_u64().unwrap());
        assert!(eventually("the source ends", || (!here.is_alive()).then_some(true)));
        here = there;
        for (sum, (before, after)) in around.iter_mut().zip(before.iter().zip(counters())) {
            *sum += after - before;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let all: Vec<u64> = first.iter().zip(counters()).map(|(before, after)| after - before).collect();
    for (name, (around, all)) in COUNTERS.iter().zip(around.iter().zip(all)) {
        println!("{name}: {around} in {ports} ports, {all} in all");
    }
    println!("{}", std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    client.kill().unwrap();
    client.wait().unwrap();
    for (what, mut values) in [("blackout us", blackouts), ("port us", ports_us), ("bytes", bytes)] {
        values.sort_unstable();
        println!(
            "{what}: least {}, median {}, p90 {}, most {}",
            values[0],
            values[values.len() / 2],
            values[values.len() * 9 / 10],
            values[values.len() - 1]
        );
    }
}
