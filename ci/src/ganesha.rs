//! nfs-ganesha, the server the benchmarks compare with: NFSv3 over TCP on a directory (VFS FSAL), in the storage node's
//! network, with a portmapper of its own.
//!
//! Always true: it sees a private `/run`, so it neither finds nor disturbs a portmapper of the machine; it and all it started end with the value.
use crate::lab::{Lab, NODE1_IP};
use crate::probe;
use crate::process::{self, Daemon};
use anyhow::{Context, Result};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const NFS_PORT: u16 = 2049;
/// It takes some seconds to start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A running server.
pub struct Ganesha {
    _daemon: Daemon,
    server_pid: u32,
    export: PathBuf,
}

impl Ganesha {
    /// Starts it on `node1` with an empty directory of the lab's disk, and waits until it answers.
    pub fn start(lab: &Lab) -> Result<Self> {
        let export = lab.data_dir().join("ganesha");
        let recovery = lab.state_dir().join("ganesha-recovery");
        for dir in [&export, &recovery] {
            std::fs::create_dir_all(dir)?;
        }
        let config = lab.state_dir().join("ganesha.conf");
        std::fs::write(&config, configuration(&export, &recovery))?;
        let log = lab.state_dir().join("ganesha.log");
        let script = format!(
            "mount -t tmpfs tmpfs /run && rpcbind && exec ganesha.nfsd -F -f {} -L {} -p /run/ganesha.pid",
            config.display(),
            log.display()
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", &script]);
        let mut daemon = lab.node1.daemon("nfs-ganesha", &mut command, &lab.state_dir().join("ganesha.out"))?;
        probe::first_reply(&lab.client1, SocketAddrV4::new(NODE1_IP, NFS_PORT), START_LIMIT, &AtomicBool::new(false))
            .with_context(|| format!("nfs-ganesha does not start; its log ends:\n{}", process::log_tail(&log)))?;
        daemon.wait_until("a server process", START_LIMIT, || find(lab).is_some())?;
        let server_pid = find(lab).context("nfs-ganesha has ended")?;
        Ok(Ganesha { _daemon: daemon, server_pid, export })
    }

    /// NFS URL of a file it serves.
    pub fn url(&self, file: &str) -> String {
        format!("nfs://{NODE1_IP}{}/{file}", self.export.display())
    }

    /// User and system time of the server so far, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        process::cpu_seconds(self.server_pid)
    }
}

/// The server's process: it runs behind `unshare` and a shell.
fn find(lab: &Lab) -> Option<u32> {
    let pids = process::succeed(Command::new("ip").args(["netns", "pids", lab.node1.namespace()])).ok()?;
    let name = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.split_whitespace().filter_map(|p| p.parse().ok()).find(|pid| name(*pid).starts_with("ganesha"))
}

fn configuration(export: &Path, recovery: &Path) -> String {
    format!(
        "NFS_CORE_PARAM {{ Protocols = 3; NFS_Port = {NFS_PORT}; Enable_NLM = false; Enable_RQUOTA = false;\n\
         \x20   Enable_UDP = false; Bind_addr = {NODE1_IP}; }}\n\
         NFSv4 {{ RecoveryBackend = fs; RecoveryRoot = {recovery}; Graceless = true; }}\n\
         EXPORT {{ Export_Id = 1; Path = {export}; Pseudo = /data; Protocols = 3; Transports = TCP; Access_Type = RW;\n\
         \x20   Squash = No_Root_Squash; SecType = sys; MaxRead = 1048576; MaxWrite = 1048576; PrefRead = 1048576;\n\
         \x20   PrefWrite = 1048576; FSAL {{ Name = VFS; }} }}\n\
         LOG {{ Default_Log_Level = WARN; }}\n",
        recovery = recovery.display(),
        export = export.display()
    )
}
