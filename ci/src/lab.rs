//! The lab: hosts as network namespaces on one machine, a bridge in a namespace of its own as their switch.
//!
//! ```text
//!   node1 (10.77.0.1)             switch                client1 (10.77.0.2)
//!   br0 -- cable ---------- node1 -- br0 -- client1 ---------- cable -- br0
//!    `- taps of VMs                                       taps of VMs -'
//! ```
//!
//! Always true: names are unique to the run (`or<pid>n<count>-…`), nothing is created outside these namespaces, and all of
//! it goes with the value, on an interrupt, or by [`clean`] when the run was killed. A run holds a lock on its
//! state directory for its life, so `clean` never touches a live one. Offloads stay on everywhere. A cable keeps the order
//! of its frames.
use crate::cleanup::{self, Namespace, Temporary};
use crate::process::{self, Daemon};
use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Address of the storage node.
pub const NODE1_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Address of the compute host.
pub const CLIENT1_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Address of the N-module.
pub const NMODULE_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// Address of the D-module.
pub const DMODULE_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 20);
/// Prefix length of the lab's network.
pub const PREFIX: u8 = 24;
/// Bridge in each namespace.
pub const BRIDGE: &str = "br0";
/// A host's end of its cable.
pub const CABLE: &str = "cable";

/// First letters of everything a lab creates that has a name outside it.
const NAME_PREFIX: &str = "or";
/// The processors (a mask) that take frames off a cable: one.
const CABLE_CPUS: &str = "1";
/// How long a bridge may take until its ports forward.
const PORTS_PATIENCE: Duration = Duration::from_secs(10);
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A host: a network namespace with an address on its bridge.
pub struct Host {
    namespace: Namespace,
    /// Its name in messages and reports.
    pub name: &'static str,
    /// Its address.
    pub ip: Ipv4Addr,
}

/// The whole network. Fields are dropped in order: hosts before the switch before the directories.
pub struct Lab {
    /// The storage node.
    pub node1: Host,
    /// The compute host, which is also the client.
    pub client1: Host,
    switch: Namespace,
    /// Small files with short names: sockets, logs, configurations.
    state: Temporary,
    /// Large files, on a real disk.
    data: Temporary,
    _lock: File,
}

impl Lab {
    /// Builds it. `data_parent` is where large files go (a directory on a real disk).
    pub fn create(data_parent: &Path) -> Result<Self> {
        let id = format!("{NAME_PREFIX}{}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // Unix socket paths are at most 107 bytes: not below the clone, which may lie deep.
        let state = Temporary::directory(state_root().join(&id))?;
        let lock = File::create(state.path().join("lock"))?;
        lock.try_lock().map_err(|e| anyhow!("cannot lock the state directory: {e}"))?;
        let data = Temporary::directory(data_parent.join(&id))?;
        std::fs::write(state.path().join("data"), data.path().as_os_str().as_encoded_bytes())?;

        let switch = Namespace::create(format!("{id}-switch"))?;
        configure(switch.name(), &bridge_lines())?;
        let node1 = host(&id, "node1", NODE1_IP, switch.name())?;
        let client1 = host(&id, "client1", CLIENT1_IP, switch.name())?;
        for namespace in [switch.name(), node1.namespace(), client1.namespace()] {
            until_ports_forward(namespace)?;
        }
        Ok(Lab { node1, client1, switch, state, data, _lock: lock })
    }

    /// Directory for sockets, logs and configurations.
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// Directory for disk images.
    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// The namespaces' names.
    pub fn namespaces(&self) -> [&str; 3] {
        [self.node1.namespace(), self.client1.namespace(), self.switch.name()]
    }
}

/// Parent of the state directories.
fn state_root() -> PathBuf {
    std::env::temp_dir().join("outrigger-lab")
}

fn bridge_lines() -> String {
    // No spanning tree and no multicast snooping: a port forwards as soon as it is up. Loopback for RPC tools.
    format!(
        "link set lo up\n\
         link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         link set {BRIDGE} addrgenmode none up\n"
    )
}

fn host(id: &str, name: &'static str, ip: Ipv4Addr, switch: &str) -> Result<Host> {
    let namespace = Namespace::create(format!("{id}-{name}"))?;
    let ns = namespace.name();
    configure(
        ns,
        &format!(
            "{}addr add {ip}/{PREFIX} dev {BRIDGE}\n\
             link add {CABLE} type veth peer name {name} netns {switch}\n\
             link set {CABLE} master {BRIDGE} addrgenmode none up\n",
            bridge_lines()
        ),
    )?;
    configure(switch, &format!("link set {name} master {BRIDGE} addrgenmode none up\n"))?;
    keep_order(ns, CABLE)?;
    keep_order(switch, name)?;
    Ok(Host { namespace, name, ip })
}

/// Makes one end of a cable deliver frames in the order they were sent, as a real cable and network card do. A veth pair by
/// itself puts a frame on the backlog of whatever processor its sender runs on, so that the frames of a sender that moves
/// to another processor overtake each other, and TCP sends again what was not lost.
fn keep_order(namespace: &str, device: &str) -> Result<()> {
    let mask = format!("/sys/class/net/{device}/queues/rx-0/rps_cpus");
    // The namespace's own /sys is there only for what `ip netns exec` starts.
    let mut ip = Command::new("ip");
    ip.args(["netns", "exec", namespace, "sh", "-c", &format!("echo {CABLE_CPUS} > {mask}")]);
    process::succeed(&mut ip)
        .map(drop)
        .with_context(|| format!("cannot give {device} in {namespace} a processor of its own"))
}

/// Waits until all ports of a namespace's bridge forward. The kernel looks at a new port's carrier up to a second after it came
/// up, and drops frames until then: who measures a boot must not begin earlier.
fn until_ports_forward(namespace: &str) -> Result<()> {
    let begin = Instant::now();
    loop {
        let ports = process::output(Command::new("bridge").args(["-n", namespace, "link"]))?;
        if ports.lines().all(|port| port.contains("state forwarding")) {
            return Ok(());
        }
        if begin.elapsed() > PORTS_PATIENCE {
            bail!("the bridge in {namespace} does not forward on all ports:\n{ports}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs `ip` commands, one a line, in a namespace.
fn configure(namespace: &str, lines: &str) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(["-n", namespace, "-batch", "-"]);
    ip.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = ip.spawn().context("cannot run ip (package iproute2)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.as_bytes())?;
    }
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!("setting up namespace {namespace}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

impl Host {
    /// Name of its network namespace.
    pub fn namespace(&self) -> &str {
        self.namespace.name()
    }

    /// Runs `ip` commands, one a line, on this host.
    pub fn ip(&self, lines: &str) -> Result<()> {
        configure(self.namespace(), lines)
    }

    /// Adds a tap for a VM to the host's bridge.
    pub fn add_tap(&self, tap: &str) -> Result<()> {
        self.ip(&format!(
            "tuntap add dev {tap} mode tap vnet_hdr\n\
             link set {tap} master {BRIDGE} addrgenmode none up\n"
        ))
    }

    /// Pulls the host's cable out, or puts it back.
    pub fn cable(&self, plugged: bool) -> Result<()> {
        self.ip(&format!("link set {CABLE} {}\n", if plugged { "up" } else { "down" }))
    }

    /// Gives a neighbour's MAC address for good, so that the first packet waits for no ARP.
    pub fn permanent_neighbour(&self, ip: Ipv4Addr, mac: &str) -> Result<()> {
        self.ip(&format!("neigh replace {ip} lladdr {mac} dev {BRIDGE} nud permanent\n"))
    }

    /// Runs `f` on a thread inside this host's network: sockets it opens and children it starts are there.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.namespace().to_owned();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                join_namespace(&namespace)?;
                f()
            });
            thread.join().map_err(|_| anyhow!("a thread in the lab panicked"))?
        })
    }

    /// Starts a thread inside this host's network.
    pub fn thread<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> std::thread::JoinHandle<Result<T>> {
        let namespace = self.namespace().to_owned();
        std::thread::spawn(move || {
            join_namespace(&namespace)?;
            f()
        })
    }

    /// Starts a background process on this host.
    pub fn daemon(&self, name: &str, command: &mut Command, log: &Path) -> Result<Daemon> {
        self.enter(|| Daemon::start(name, command, log))
    }

    /// Runs a tool on this host and returns its output.
    pub fn output(&self, command: &mut Command) -> Result<String> {
        self.enter(|| process::output(command))
    }
}

fn join_namespace(name: &str) -> Result<()> {
    let path = format!("/run/netns/{name}");
    let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter namespace {name}"))
}

/// Removes what runs that were killed have left; says what. Live runs are not touched.
pub fn clean() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let namespaces = namespace_names()?;
    let Ok(runs) = std::fs::read_dir(state_root()) else { return Ok(removed) };
    for run in runs {
        let run = run?;
        let Ok(lock) = File::options().write(true).create(true).truncate(false).open(run.path().join("lock")) else {
            continue;
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(e)) => return Err(e).context("cannot lock a state directory"),
        }
        let id = run.file_name().to_string_lossy().into_owned();
        for name in namespaces.iter().filter(|n| n.starts_with(&format!("{id}-"))) {
            cleanup::delete_namespace(name);
            removed.push(format!("network namespace {name}"));
        }
        if let Ok(data) = std::fs::read_to_string(run.path().join("data")) {
            // Only a directory named like the run is ours to remove.
            if Path::new(&data).file_name().is_some_and(|n| n == id.as_str()) && Path::new(&data).is_dir() {
                std::fs::remove_dir_all(&data)?;
                removed.push(data);
            }
        }
        std::fs::remove_dir_all(run.path())?;
        removed.push(run.path().display().to_string());
    }
    Ok(removed)
}

/// All network namespaces with a name.
pub fn namespace_names() -> Result<Vec<String>> {
    let list = process::succeed(Command::new("ip").args(["netns", "list"]))?;
    Ok(list.lines().filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect())
}
