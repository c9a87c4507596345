//! The modules as virtual machines in the lab: starting them, waiting until they serve, porting the N-module.
//!
//! Always true: every `vmm` is a process of its own on a tap of its own on the bridge of its host, with its control socket, console
//! and log in the lab's state directory; all of it goes with the value.
use crate::api::Api;
use crate::artifacts::Artifacts;
use crate::lab::{DMODULE_IP, Host, Lab, NMODULE_IP, PREFIX};
use crate::probe;
use crate::process::{Daemon, succeed};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// NFS address of the N-module.
pub const NFS: SocketAddrV4 = SocketAddrV4::new(NMODULE_IP, 2049);
/// Cluster fabric address of the D-module.
pub const FABRIC: SocketAddrV4 = SocketAddrV4::new(DMODULE_IP, 7100);
/// Port on which a receiving `vmm` listens.
pub const RECEIVE_PORT: u16 = 7000;
/// Name of the volume, and of the export.
pub const VOLUME: &str = "vol0";
/// MAC address of the N-module.
pub const NMODULE_MAC: &str = "02:4f:52:00:00:10";
/// MAC address of the D-module.
pub const DMODULE_MAC: &str = "02:4f:52:00:00:20";
/// Key of the N-module's ownership record.
pub const NMODULE_VM_ID: u64 = 1;
/// Memory of the N-module.
pub const NMODULE_MEMORY: &str = "32M";

/// A module that does not serve by then will not.
const START_LIMIT: Duration = Duration::from_secs(20);
/// A port that has not ended by then has failed.
const PORT_LIMIT: Duration = Duration::from_secs(60);
/// How often the state of a port is asked for.
const PORT_POLL: Duration = Duration::from_millis(5);

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A `vmm` process.
pub struct Module {
    /// The process.
    pub daemon: Daemon,
    /// Its control socket.
    pub api: Api,
    /// When it was started.
    pub started: Instant,
    /// Its console.
    pub console: PathBuf,
}

/// Both modules on `node1`, serving. Fields are dropped in order: VMs before the lab.
pub struct Cluster {
    /// The N-module.
    pub nmodule: Module,
    /// The D-module.
    pub dmodule: Module,
    /// From the start of their processes until they served: D-module, N-module.
    pub boot: [Duration; 2],
    /// The D-module's disk.
    pub disk: PathBuf,
    /// What runs.
    pub artifacts: Artifacts,
    /// Where.
    pub lab: Lab,
}

impl Cluster {
    /// A new lab below `data` with both modules on a new disk.
    pub fn start(data: &Path, artifacts: Artifacts, disk_bytes: u64, dmodule_memory: &str) -> Result<Self> {
        let lab = Lab::create(data)?;
        let disk = lab.data_dir().join("disk0.img");
        create_disk(&disk, disk_bytes)?;
        let (dmodule, dboot) = start_dmodule(&lab, &artifacts, &disk, Disk::New, dmodule_memory)?;
        let (nmodule, nboot) = start_nmodule(&lab, &artifacts, &lab.node1)?;
        Ok(Cluster { nmodule, dmodule, boot: [dboot, nboot], disk, artifacts, lab })
    }
}

/// Makes a raw disk image of `bytes`, all of it allocated.
pub fn create_disk(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
    let length = i64::try_from(bytes).context("a disk that large")?;
    nix::fcntl::posix_fallocate(&file, 0, length).with_context(|| format!("cannot allocate {}", path.display()))
}

/// Whether the disk is to get a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// A new one: it gets a file system.
    New,
    /// One that must have a file system: without it the D-module refuses.
    Existing,
}

/// Command line of the D-module.
pub fn dmodule_cmdline(disk: Disk) -> String {
    let format = if disk == Disk::New { "if-blank" } else { "never" };
    format!("ip={DMODULE_IP}/{PREFIX} port={} volume={VOLUME} format={format}", FABRIC.port())
}

/// Command line of the N-module.
pub fn nmodule_cmdline() -> String {
    format!("ip={NMODULE_IP}/{PREFIX} dmodule={FABRIC} volume={VOLUME} no_root_squash")
}

/// What every `vmm` gets: a tap on the host's bridge, a control socket, a console file.
fn prepare(
    lab: &Lab,
    artifacts: &Artifacts,
    host: &Host,
    kind: &str,
    mac: Option<&str>,
) -> Result<(Command, Api, String)> {
    let name = format!("{kind}{}", COUNT.fetch_add(1, Ordering::Relaxed));
    // One tap a kind and host: its last user has ended before the next starts.
    host.ip(&format!("link show {kind}\n")).or_else(|_| host.add_tap(kind))?;
    let api = Api::new(lab.state_dir().join(format!("{name}.sock")));
    let tls = keys(lab, artifacts, host)?;
    let tls: Vec<String> = tls.iter().map(|(field, path)| format!("{field}={}", path.display())).collect();
    let mac = mac.map(|m| format!(",mac={m}")).unwrap_or_default();
    let mut command = Command::new(&artifacts.vmm);
    command.arg("--api-sock").arg(api.socket()).args(["--net", &format!("id=net0,tap={kind}{mac}")]);
    command.args(["--tls", &tls.join(",")]);
    command.arg("--serial").arg(lab.state_dir().join(format!("{name}.console")));
    Ok((command, api, name))
}

/// What `--tls` needs on `host`, by field: from the lab's own authority, made when they are first asked for.
fn keys(lab: &Lab, artifacts: &Artifacts, host: &Host) -> Result<[(&'static str, PathBuf); 3]> {
    let dir = lab.state_dir().join("keys");
    let file = |name: &str| dir.join(name);
    let (cert, key, ca) = (file(&format!("{}.pem", host.name)), file(&format!("{}.key", host.name)), file("ca.pem"));
    if !ca.exists() {
        succeed(Command::new(&artifacts.vmm).args(["keys", "new"]).arg(&dir))?;
    }
    if !cert.exists() {
        let names = [host.name.to_owned(), host.ip.to_string()];
        succeed(Command::new(&artifacts.vmm).args(["keys", "host"]).arg(&dir).args(names))?;
    }
    Ok([("cert", cert), ("key", key), ("ca", ca)])
}

/// Whether ports are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// As always in the lab.
    On,
    /// For comparison.
    Off,
}

/// Says how a module's next port, or the next one to it, is protected; `host` is where it runs.
pub fn protect(lab: &Lab, artifacts: &Artifacts, host: &Host, module: &Module, tls: Tls) -> Result<()> {
    let tls = match tls {
        Tls::On => {
            Value::from_iter(keys(lab, artifacts, host)?.map(|(field, path)| (field, path.display().to_string())))
        }
        Tls::Off => "off".into(),
    };
    module.api.put("/v1/tls", &json!({ "tls": tls }))?;
    Ok(())
}

pub(crate) fn start(lab: &Lab, host: &Host, name: &str, api: Api, command: &mut Command) -> Result<Module> {
    // Where checkpoints go: they are as large as disks.
    command.arg("--allow-path").arg(lab.data_dir());
    let daemon = host.daemon(&format!("vmm {name}"), command, &lab.state_dir().join(format!("{name}.log")))?;
    let started = daemon.started();
    Ok(Module { daemon, api, started, console: lab.state_dir().join(format!("{name}.console")) })
}

/// Starts the D-module on `node1` and waits for its first answer on the fabric; returns how long that took from the start of
/// the process.
pub fn start_dmodule(
    lab: &Lab,
    artifacts: &Artifacts,
    path: &Path,
    disk: Disk,
    memory: &str,
) -> Result<(Module, Duration)> {
    let host = &lab.node1;
    let (mut command, api, name) = prepare(lab, artifacts, host, "dmodule", Some(DMODULE_MAC))?;
    command.arg("--image").arg(&artifacts.images.dmodule).args(["--name", "dmodule", "--memory", memory]);
    command.args(["--cmdline", &dmodule_cmdline(disk)]).args(["--disk", &format!("id=disk0,path={}", path.display())]);
    host.permanent_neighbour(DMODULE_IP, DMODULE_MAC)?;
    serve(
        || start(lab, host, &name, api, &mut command),
        |stop| probe::first_fabric_answer(host, FABRIC, START_LIMIT, stop),
    )
}

/// Starts the N-module on `host` and waits for its first reply to NFS NULL; returns how long that took from the start of the
/// process.
pub fn start_nmodule(lab: &Lab, artifacts: &Artifacts, host: &Host) -> Result<(Module, Duration)> {
    start_nmodule_with(lab, artifacts, host, NMODULE_MEMORY)
}

/// The same with so much memory.
pub fn start_nmodule_with(lab: &Lab, artifacts: &Artifacts, host: &Host, memory: &str) -> Result<(Module, Duration)> {
    let (mut command, api, name) = prepare(lab, artifacts, host, "nmodule", Some(NMODULE_MAC))?;
    command.arg("--image").arg(&artifacts.images.nmodule).args(["--name", "nmodule", "--memory", memory]);
    command.args(["--cmdline", &nmodule_cmdline(), "--vm-id", &NMODULE_VM_ID.to_string()]);
    command.args(["--arbiter", &FABRIC.to_string()]);
    lab.client1.permanent_neighbour(NMODULE_IP, NMODULE_MAC)?;
    serve(
        || start(lab, host, &name, api, &mut command),
        |stop| probe::first_reply(&lab.client1, NFS, START_LIMIT, stop),
    )
}

/// Starts the N-module on `host` from a checkpoint, its memory mapped or read, and waits as [`start_nmodule`] does.
pub fn restore_nmodule(
    lab: &Lab,
    artifacts: &Artifacts,
    host: &Host,
    saved: &Path,
    memory: &str,
) -> Result<(Module, Duration)> {
    let (mut command, api, name) = prepare(lab, artifacts, host, "nmodule", None)?;
    command.arg("--restore").arg(saved).args(["--restore-memory", memory]);
    lab.client1.permanent_neighbour(NMODULE_IP, NMODULE_MAC)?;
    serve(
        || start(lab, host, &name, api, &mut command),
        |stop| probe::first_reply(&lab.client1, NFS, START_LIMIT, stop),
    )
}

/// Starts a module with its prober already at work, and waits for the first answer or the end of the process.
pub(crate) fn serve(
    start: impl FnOnce() -> Result<Module>,
    answer: impl FnOnce(&AtomicBool) -> Result<Instant> + Send,
) -> Result<(Module, Duration)> {
    let give_up = AtomicBool::new(false);
    let (mut module, answered) = std::thread::scope(|scope| {
        let prober = scope.spawn(|| answer(&give_up));
        let mut module = start().inspect_err(|_| give_up.store(true, Ordering::Relaxed))?;
        while !prober.is_finished() {
            if module.daemon.ended()?.is_some() {
                give_up.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let answered = prober.join().unwrap_or_else(|_| bail!("a prober panicked"));
        anyhow::Ok((module, answered))
    })?;
    match answered {
        Ok(at) => {
            let took = at - module.started;
            Ok((module, took))
        }
        Err(e) => {
            let ended = module.daemon.ended()?.map(|s| format!("; it has ended with {s}")).unwrap_or_default();
            bail!("{} does not serve{ended}: {e:#}{}", module.daemon.name(), module.quote())
        }
    }
}

impl Module {
    /// Ends of its log and console, for messages.
    pub fn quote(&self) -> String {
        let console = crate::process::log_tail(&self.console);
        let console = if console.trim().is_empty() { "nothing" } else { console.trim_end() };
        format!("{}\nits console ends:\n{console}", self.daemon.quote_log())
    }

    /// Ends the VM by its control socket and waits for the process.
    pub fn shut_down(mut self) -> Result<()> {
        self.api.put("/v1/vm/shutdown", &json!({}))?;
        self.daemon.wait(Duration::from_secs(10))?;
        Ok(())
    }
}

/// Starts a `vmm` on `host` that waits for the N-module.
pub fn receive(lab: &Lab, artifacts: &Artifacts, host: &Host) -> Result<Module> {
    receive_with(lab, artifacts, host, &[])
}

/// The same for tests: pages that do not come are poisoned.
pub fn receive_poisoned(lab: &Lab, artifacts: &Artifacts, host: &Host) -> Result<Module> {
    receive_with(lab, artifacts, host, &["--poison-skipped"])
}

fn receive_with(lab: &Lab, artifacts: &Artifacts, host: &Host, extra: &[&str]) -> Result<Module> {
    let (mut command, api, name) = prepare(lab, artifacts, host, "nmodule", None)?;
    command.args(["--receive", &receive_address(host).to_string()]).args(extra);
    let mut module = start(lab, host, &name, api, &mut command)?;
    let (api, pid) = (module.api.clone(), module.daemon.pid());
    module.daemon.wait_until("listening", START_LIMIT, || listens(pid, RECEIVE_PORT) && api.is_up())?;
    Ok(module)
}

/// Whether anybody listens on a TCP port in the network of a process. (A connection to try it would be taken for a source.)
fn listens(pid: u32, port: u16) -> bool {
    let sockets = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next().unwrap_or("");
        // State 0A: TCP_LISTEN.
        local.ends_with(&format!(":{port:04X}")) && words.nth(1) == Some("0A")
    })
}

/// Where a `vmm` on `host` receives.
pub fn receive_address(host: &Host) -> SocketAddrV4 {
    SocketAddrV4::new(host.ip, RECEIVE_PORT)
}

/// The body of the request that ports a VM to `host`.
pub fn port_request(host: &Host) -> Value {
    json!({"to": receive_address(host).to_string()})
}

/// The REST resource of ports.
pub const MIGRATIONS: &str = "/v1/migrations";

/// A port that has ended.
#[derive(Clone, Debug)]
pub struct Ported {
    /// When it was asked for.
    pub asked: Instant,
    /// When its end was seen.
    pub ended: Instant,
    /// The job as the VMM describes it.
    pub job: Value,
}

impl Ported {
    /// The blackout as the VMMs measured it.
    pub fn blackout(&self) -> Result<Duration> {
        let us =
            self.job["blackout_us"].as_f64().with_context(|| format!("the job has no blackout_us: {}", self.job))?;
        Ok(Duration::from_secs_f64(us / 1e6))
    }
}

/// Asks `from` to port its VM and waits for the end, whatever it is; returns the state's name with it.
pub fn try_port(from: &mut Module, body: &Value) -> Result<(String, Ported)> {
    let asked = Instant::now();
    let job = from.api.post(MIGRATIONS, body)?;
    let id = match &job["id"] {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        _ => bail!("the answer to a port has no id: {job}"),
    };
    loop {
        let job = from.api.get(&format!("{MIGRATIONS}/{id}"))?;
        let state = job["state"].as_str().unwrap_or("").to_owned();
        if matches!(state.as_str(), "completed" | "failed" | "cancelled") {
            return Ok((state, Ported { asked, ended: Instant::now(), job }));
        }
        if asked.elapsed() > PORT_LIMIT {
            bail!("the port has not ended after {PORT_LIMIT:?}: {job}{}", from.quote());
        }
        std::thread::sleep(PORT_POLL);
    }
}

/// Ports `from`'s VM to the `vmm` that waits on `to`; an error unless it completed.
pub fn port(from: &mut Module, to: &Host) -> Result<Ported> {
    port_as(from, to, false)
}

/// The same, with a digest of all memory compared before the VM runs, if that is wanted.
pub fn port_as(from: &mut Module, to: &Host, verify: bool) -> Result<Ported> {
    let mut request = port_request(to);
    request["verify"] = verify.into();
    let (state, ported) = try_port(from, &request)?;
    if state != "completed" {
        bail!("the port to {} {state}: {}{}", to.name, ported.job, from.quote());
    }
    Ok(ported)
}
