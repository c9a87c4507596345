//! `vmm ctl spawn`: starts instances of a template, each a `vmm` of its own that outlives this one.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::http::{Client, Failure};
use super::show;

/// Most instances at once.
const COUNT_MAX: u32 = 1000;
/// An instance that does not serve by then is reported as such.
const SERVING_MAX: Duration = Duration::from_secs(30);
/// How often an instance is asked whether it serves.
const POLL: Duration = Duration::from_millis(2);

/// Start instances of a template.
#[derive(Debug, Args)]
pub struct Spawn {
    /// Directory of the template's checkpoint.
    template: PathBuf,
    /// How many.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    count: u32,
    /// vm_id of the first; the others have those that follow.
    #[arg(long, value_name = "N")]
    vm_id: u64,
    /// Address of the first, like 10.77.0.100/24; the others have those that follow.
    #[arg(long, value_name = "IP/PREFIX")]
    ip: Option<String>,
    /// Taps: {} is the number of the instance, from 0 on.
    #[arg(long, value_name = "NAME", default_value = "tap{}")]
    tap: String,
    /// Id of the template's network device.
    #[arg(long, value_name = "ID", default_value = "net0")]
    net: String,
    /// Words of the command line of all of them.
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// Where the ownership records live, if not as the template says.
    #[arg(long, value_name = "IP:PORT")]
    arbiter: Option<SocketAddr>,
    /// Take the vm_ids over from whoever has them or had them.
    #[arg(long)]
    replace: bool,
    /// Where their control sockets, consoles and logs are to be: spawn-N.sock, spawn-N.console, spawn-N.log.
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

/// Starts them all, then waits until each serves.
pub fn run(order: &Spawn, raw: bool) -> Result<(), Failure> {
    let first = order.ip.as_deref().map(address).transpose()?;
    let template = std::path::absolute(&order.template).unwrap_or_else(|_| order.template.clone());
    let mut instances = Vec::new();
    for i in 0..order.count {
        instances.push(Instance::start(order, &template, first, i)?);
    }
    let mut lost = 0;
    for instance in &mut instances {
        match instance.wait() {
            Ok(report) if raw => show::print(&format!("{report}\n"))?,
            Ok(report) => show::print(&format!(
                "{}: vm_id {}, serves after {} ms\n",
                instance.sock.display(),
                report["vm_id"],
                report["serving_ms"]
            ))?,
            Err(why) => {
                eprintln!("vmm ctl: {}: {why}", instance.sock.display());
                lost += 1;
            }
        }
    }
    match lost {
        0 => Ok(()),
        lost => Err(Failure::Failed(format!("{lost} of {} instances do not serve", order.count))),
    }
}

fn address(text: &str) -> Result<(Ipv4Addr, u8), Failure> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        Some((address.parse().ok()?, prefix.parse().ok().filter(|p| *p <= 32)?))
    };
    parse().ok_or_else(|| Failure::Failed(format!("--ip {text:?} is not IP/PREFIX")))
}

struct Instance {
    vm_id: u64,
    sock: PathBuf,
    log: PathBuf,
    child: Child,
    began: Instant,
}

impl Instance {
    fn start(order: &Spawn, template: &Path, first: Option<(Ipv4Addr, u8)>, i: u32) -> Result<Instance, Failure> {
        let failed = |what: &Path, e: std::io::Error| Failure::Failed(format!("{}: {e}", what.display()));
        let file = |kind: &str| order.dir.join(format!("spawn-{i}.{kind}"));
        let vm_id = order.vm_id.checked_add(i.into()).ok_or_else(|| Failure::Failed("--vm-id is too large".into()))?;
        let mut cmdline = order.cmdline.clone();
        if let Some((ip, prefix)) = first {
            let ip = u32::from(ip).checked_add(i).ok_or_else(|| Failure::Failed("--ip is too large".into()))?;
            cmdline += &format!(" ip={}/{prefix}", Ipv4Addr::from(ip));
        }
        let (sock, log) = (file("sock"), file("log"));
        let output = File::create(&log).map_err(|e| failed(&log, e))?;
        let program = std::env::current_exe().map_err(|e| failed(Path::new("vmm"), e))?;
        let mut command = Command::new(&program);
        command.arg("--spawn").arg(template).arg("--api-sock").arg(&sock).arg("--serial").arg(file("console"));
        command.args(["--vm-id", &vm_id.to_string(), "--cmdline", cmdline.trim()]);
        command.args(["--net", &format!("id={},tap={}", order.net, order.tap.replace("{}", &i.to_string()))]);
        if let Some(arbiter) = order.arbiter {
            command.args(["--arbiter", &arbiter.to_string()]);
        }
        if order.replace {
            command.arg("--replace");
        }
        // A process group of its own: Ctrl-C here is not for it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output).process_group(0);
        let began = Instant::now();
        let child = command.spawn().map_err(|e| failed(&program, e))?;
        Ok(Instance { vm_id, sock, log, child, began })
    }

    /// Waits until it serves, or says why it does not.
    fn wait(&mut self) -> Result<Value, String> {
        let client = Client::new(&self.sock);
        while self.began.elapsed() < SERVING_MAX {
            // Another process may have the socket from before.
            if let Ok(vm) = client.json("GET", "/v1/vm", None)
                && vm["pid"] == self.child.id()
                && let Some(ms) = vm["boot_ms"]["serving"].as_f64()
            {
                return Ok(json!({ "sock": self.sock, "vm_id": self.vm_id, "pid": vm["pid"], "serving_ms": ms }));
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                return Err(format!("{status}: {}", log.lines().next_back().unwrap_or("it said nothing")));
            }
            std::thread::sleep(POLL);
        }
        Err(format!("does not serve after {SERVING_MAX:?}"))
    }
}
