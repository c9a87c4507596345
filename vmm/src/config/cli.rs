//! The command line of `vmm`: flags alone, a file, or a file with flags over it.
#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "the comments are help texts: brackets are parts that can be left out"
)]

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;

use super::{
    BalloonConfig, BootMode, Config, DiskConfig, MemorySize, NetConfig, OnReset, RngConfig, SerialOutput, TlsConfig,
    VsockConfig, field, pairs,
};
use crate::checkpoint::{RestoreMemory, RestoreRequest};
use crate::error::{Error, FieldError, Result};
use crate::spawn::SpawnRequest;

/// KVM virtual machine monitor for storage guests.
#[derive(Debug, Parser, Default, PartialEq)]
#[command(name = "vmm", version, about)]
pub struct Args {
    /// Configuration file (JSON); flags override it, --disk and --net add to it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Unix socket of the REST control interface.
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Start empty and wait at IP:PORT for a VM to be ported here.
    #[arg(long, value_name = "IP:PORT", conflicts_with_all = ["config", "cmdline", "boot", "cpus", "on_reset", "rng", "balloon"])]
    pub receive: Option<SocketAddr>,
    /// Start an instance of the template whose checkpoint is in DIR: with --vm-id, --net id=…,tap=… and --cmdline.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["receive", "restore", "config", "image", "initrd", "memory", "memory_shared", "disk", "boot", "cpus", "on_reset", "rng", "balloon", "vsock"])]
    pub spawn: Option<PathBuf>,
    /// With --spawn: take the vm_id over from whoever has it or had it.
    #[arg(long, requires = "spawn")]
    pub replace: bool,
    /// Go on with the VM of a checkpoint.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["receive", "config", "image", "initrd", "cmdline", "boot", "cpus", "memory", "memory_shared", "on_reset", "rng", "balloon", "vm_id"])]
    pub restore: Option<PathBuf>,
    /// With --restore: map the memory file copy-on-write (map), or read all of it into large pages first (read).
    #[arg(long, value_name = "HOW", requires = "restore")]
    pub restore_memory: Option<RestoreMemory>,
    /// With --restore: do not check a memory file that is mapped before the guest runs.
    #[arg(long, requires = "restore")]
    pub restore_unverified: bool,
    /// ELF image or Linux bzImage; with --receive what a VM that arrives begins again from, and so --initrd.
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Initial RAM disk, for Linux.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Number of vCPUs.
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// What a reset by the guest does: reboot, exit, or auto: exit for our own images, reboot for all others.
    #[arg(long, value_name = "WHAT")]
    pub on_reset: Option<String>,
    /// How to start it: auto, direct, pvh or linux.
    #[arg(long, value_name = "MODE")]
    pub boot: Option<String>,
    /// Guest memory, like 32M; with --receive the most a guest that arrives may have.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Guest memory can be given to other processes (so it is anyway where a vhost-user device needs it).
    #[arg(long)]
    pub memory_shared: bool,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Disk: path=FILE|vhost_user=SOCKET[,readonly=true][,format=raw|qcow2|vmdk][,queues=N][,serial=TEXT][,direct=true]
    /// [,ops=RATE[:BURST]][,bytes=RATE[:BURST]][,id=NAME]; with --receive id=NAME,path=FILE[,direct=true]: where the image of an
    /// incoming disk is here.
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub disk: Vec<String>,
    /// Network device: tap=NAME|fd=N|vhost_user=SOCKET[,mac=…][,mtu=…][,queues=N][,vhost=auto|on|off]
    /// [,rx_bytes=RATE[:BURST]][,rx_ops=…][,tx_bytes=…][,tx_ops=…][,id=NAME].
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub net: Vec<String>,
    /// An entropy source for the guest (virtio-rng): [ops=RATE[:BURST]][,bytes=RATE[:BURST]].
    #[arg(long, value_name = "KEY=VALUE,…", num_args = 0..=1, default_missing_value = "")]
    pub rng: Option<String>,
    /// Memory balloon: [target=SIZE][,deflate_on_oom=BOOL][,reporting=BOOL][,stats_seconds=N].
    #[arg(long, value_name = "KEY=VALUE,…", num_args = 0..=1, default_missing_value = "")]
    pub balloon: Option<String>,
    /// Streams between host and guest (virtio-vsock): path=SOCKET[,cid=N].
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub vsock: Option<String>,
    /// Id of the VM in the ownership record.
    #[arg(long, value_name = "N")]
    pub vm_id: Option<u64>,
    /// Where the ownership record lives.
    #[arg(long, value_name = "IP:PORT")]
    pub arbiter: Option<SocketAddr>,
    /// How ports are protected: cert=FILE,key=FILE,ca=FILE[,issuer=FILE] (PEM, see `vmm keys`), or off.
    #[arg(long, value_name = "KEY=VALUE,…|off")]
    pub tls: Option<String>,
    /// Console: stdout, stdio (with input), pty, socket=PATH, none, or a file.
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<String>,
    /// Name of the VM.
    #[arg(long)]
    pub name: Option<String>,
}

/// What the process is to do.
#[derive(Debug)]
pub enum Order {
    /// Boot this VM.
    Boot(Config),
    /// Wait for one.
    Receive(ReceiveConfig),
    /// Go on with the VM of a checkpoint.
    Restore(RestoreRequest),
    /// Make it an instance of a template.
    Spawn(SpawnRequest),
    /// Wait for a configuration over the control interface.
    Configure,
}

/// What a VMM that waits for a port has of its own.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The taps of this host, to be joined with the incoming VM's network devices by id.
    pub nets: Vec<NetConfig>,
    /// Where images of incoming disks are on this host, by id, if not at the same path: `path` and `direct` count.
    pub disks: Vec<DiskConfig>,
    /// Where the ownership record lives, if not as the incoming configuration says.
    pub arbiter: Option<SocketAddr>,
    /// Console output.
    pub serial: SerialOutput,
    /// Most memory a guest that arrives may have; the host's free memory is another bound.
    pub memory_max: Option<MemorySize>,
    /// Where the socket of an incoming vsock device is to be; without it none is taken in.
    pub vsock: Option<PathBuf>,
    /// How the connection is protected, and those of later ports from here.
    pub tls: TlsConfig,
    /// What a VM that arrives begins again from after a reset; without an image it cannot. Which files of this host are read is not
    /// for the other to say.
    pub image: Option<PathBuf>,
    /// The initial RAM disk that goes with it.
    pub initrd: Option<PathBuf>,
}

impl Args {
    /// Puts file and flags together; reports every mistake of the flags at once.
    pub fn order(self) -> Result<Order> {
        if self == (Args { api_sock: self.api_sock.clone(), ..Args::default() }) && self.api_sock.is_some() {
            return Ok(Order::Configure);
        }
        let mut errors = Vec::new();
        let nets = collect(&self.net, "--net", NetConfig::from_flag, &mut errors);
        let disks = collect(&self.disk, "--disk", DiskConfig::from_flag, &mut errors);
        let memory = self.memory.as_deref().and_then(|m| keep(m.parse::<MemorySize>(), "--memory", &mut errors));
        let boot = self.boot.as_deref().and_then(|b| keep(parse_boot(b), "--boot", &mut errors));
        let rng = single(self.rng.as_deref(), "--rng", parse_rng, &mut errors);
        let balloon = single(self.balloon.as_deref(), "--balloon", parse_balloon, &mut errors);
        let vsock = single(self.vsock.as_deref(), "--vsock", parse_vsock, &mut errors);
        let tls = single(self.tls.as_deref(), "--tls", TlsConfig::from_flag, &mut errors);
        let on_reset = self.on_reset.as_deref().and_then(|r| keep(parse_on_reset(r), "--on-reset", &mut errors));
        let serial = self.serial.as_deref().map(parse_serial);

        if let Some(listen) = self.receive {
            for (i, net) in nets.iter().enumerate() {
                if net.id.is_empty() {
                    errors.push(FieldError::new(format!("--net[{i}]"), "needs the id of the device to be received"));
                }
            }
            for (i, disk) in disks.iter().enumerate() {
                let DiskConfig { id, path, direct, .. } = disk.clone();
                if id.is_empty() {
                    errors.push(FieldError::new(format!("--disk[{i}]"), "needs the id of the disk to be received"));
                }
                if *disk != (DiskConfig { id, path, direct, ..DiskConfig::default() }) {
                    let why = "only id, path and direct: the rest comes with the VM that is received";
                    errors.push(FieldError::new(format!("--disk[{i}]"), why));
                }
            }
            if self.tls.is_none() {
                let needed = "--receive needs cert=FILE,key=FILE,ca=FILE (`vmm keys` makes them), or off for a network \
                    that nobody else can reach";
                errors.push(FieldError::new("--tls", needed));
            }
            if let Some(tls) = &tls {
                errors.extend(tls.mistakes("--tls"));
            }
            let Some(tls) = tls.filter(|_| errors.is_empty()) else { return Err(Error::Config(errors)) };
            let serial = serial.unwrap_or_default();
            return Ok(Order::Receive(ReceiveConfig {
                listen,
                nets,
                disks,
                arbiter: self.arbiter,
                serial,
                memory_max: memory,
                vsock: vsock.map(|v| v.path),
                tls,
                image: self.image,
                initrd: self.initrd,
            }));
        }

        if let Some(path) = self.restore {
            let named = |ids: Vec<&String>, flag: &str, errors: &mut Vec<FieldError>| {
                for (i, _) in ids.iter().enumerate().filter(|(_, id)| id.is_empty()) {
                    errors.push(FieldError::new(format!("{flag}[{i}]"), "needs the id of the checkpoint's device"));
                }
            };
            named(nets.iter().map(|n| &n.id).collect(), "--net", &mut errors);
            named(disks.iter().map(|d| &d.id).collect(), "--disk", &mut errors);
            if !path.is_dir() {
                errors.push(FieldError::new("--restore", format!("{}: not a directory", path.display())));
            }
            if !errors.is_empty() {
                return Err(Error::Config(errors));
            }
            return Ok(Order::Restore(RestoreRequest {
                memory: self.restore_memory.unwrap_or_default(),
                verify: !self.restore_unverified,
                nets,
                disks,
                vsock: vsock.map(|v| v.path),
                serial,
                arbiter: self.arbiter,
                tls,
                name: self.name,
                ..RestoreRequest::new(path)
            }));
        }

        if let Some(template) = self.spawn {
            let Some(vm_id) = self.vm_id else {
                errors.push(FieldError::new("--vm-id", "an instance needs an id of its own"));
                return Err(Error::Config(errors));
            };
            if !errors.is_empty() {
                return Err(Error::Config(errors));
            }
            return Ok(Order::Spawn(SpawnRequest {
                template,
                vm_id,
                name: self.name,
                cmdline: self.cmdline.unwrap_or_default(),
                nets,
                arbiter: self.arbiter,
                serial,
                tls,
                replace: self.replace,
            }));
        }

        let mut config = match (&self.config, &self.image) {
            (Some(path), _) => Some(Config::read(path)?),
            (None, Some(image)) => Some(Config::for_image(image.clone())),
            (None, None) => {
                errors.push(FieldError::new(
                    "--image",
                    "an image is needed: give --image or --config (or only --api-sock, and configure over it)",
                ));
                None
            }
        };
        if let Some(config) = &mut config {
            set(&mut config.image, self.image);
            set(&mut config.memory, memory);
            config.memory_shared |= self.memory_shared;
            set(&mut config.boot, boot);
            set(&mut config.cpus, self.cpus);
            set(&mut config.on_reset, on_reset);
            config.initrd = self.initrd.or(config.initrd.take());
            set(&mut config.cmdline, self.cmdline);
            set(&mut config.vm_id, self.vm_id);
            set(&mut config.serial, serial);
            set(&mut config.name, self.name);
            config.arbiter = self.arbiter.or(config.arbiter);
            config.rng = rng.or(config.rng.take());
            config.balloon = balloon.or(config.balloon.take());
            config.vsock = vsock.or(config.vsock.take());
            config.tls = tls.or(config.tls.take());
            config.disks.extend(disks);
            config.nets.extend(nets);
            if let Err(Error::Config(more)) = config.validate() {
                errors.extend(more);
            }
        }
        match config {
            Some(config) if errors.is_empty() => Ok(Order::Boot(config)),
            _ => Err(Error::Config(errors)),
        }
    }
}

impl Config {
    /// All defaults, for one image.
    pub fn for_image(image: PathBuf) -> Config {
        Config {
            name: String::new(),
            vm_id: 0,
            image,
            boot: BootMode::Auto,
            cmdline: String::new(),
            initrd: None,
            memory: MemorySize::default(),
            memory_shared: false,
            cpus: 1,
            on_reset: OnReset::default(),
            disks: Vec::new(),
            nets: Vec::new(),
            rng: None,
            balloon: None,
            vsock: None,
            serial: SerialOutput::default(),
            arbiter: None,
            tls: None,
        }
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn keep<T>(r: std::result::Result<T, String>, flag: &str, errors: &mut Vec<FieldError>) -> Option<T> {
    r.map_err(|e| errors.push(FieldError::new(flag, e))).ok()
}

fn collect<T>(
    texts: &[String],
    flag: &str,
    parse: fn(&str) -> std::result::Result<T, FieldError>,
    errors: &mut Vec<FieldError>,
) -> Vec<T> {
    let mut out = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        match parse(text) {
            Ok(v) => out.push(v),
            Err(e) if e.field.is_empty() => errors.push(FieldError::new(format!("{flag}[{i}]"), e.message)),
            Err(e) => errors.push(FieldError::new(format!("{flag}[{i}].{}", e.field), e.message)),
        }
    }
    out
}

fn single<T>(
    text: Option<&str>,
    flag: &str,
    parse: fn(&str) -> std::result::Result<T, FieldError>,
    errors: &mut Vec<FieldError>,
) -> Option<T> {
    let result = parse(text?);
    let named = |e: FieldError| match e.field.is_empty() {
        true => FieldError::new(flag, e.message),
        false => FieldError::new(format!("{flag}.{}", e.field), e.message),
    };
    result.map_err(|e| errors.push(named(e))).ok()
}

fn parse_boot(s: &str) -> std::result::Result<BootMode, String> {
    match s {
        "auto" => Ok(BootMode::Auto),
        "direct" => Ok(BootMode::Direct),
        "pvh" => Ok(BootMode::Pvh),
        "linux" => Ok(BootMode::Linux),
        _ => Err(format!("{s:?}: must be auto, direct, pvh or linux")),
    }
}

fn parse_on_reset(s: &str) -> std::result::Result<OnReset, String> {
    match s {
        "auto" => Ok(OnReset::Auto),
        "reboot" => Ok(OnReset::Reboot),
        "exit" => Ok(OnReset::Exit),
        _ => Err(format!("{s:?}: must be auto, reboot or exit")),
    }
}

fn parse_serial(s: &str) -> SerialOutput {
    match s {
        "stdout" => SerialOutput::Stdout,
        "none" => SerialOutput::None,
        "stdio" => SerialOutput::Stdio,
        "pty" => SerialOutput::Pty,
        s if s.starts_with("socket=") => SerialOutput::Socket(s.trim_start_matches("socket=").into()),
        path => SerialOutput::File(path.into()),
    }
}

fn parse_rng(s: &str) -> std::result::Result<RngConfig, FieldError> {
    let mut rng = RngConfig::default();
    for pair in pairs(s).filter(|_| !s.is_empty()) {
        match pair? {
            ("ops", v) => rng.limits.ops = Some(field("ops", v)?),
            ("bytes", v) => rng.limits.bytes = Some(field("bytes", v)?),
            (key, _) => return Err(FieldError::new(key, "unknown; known are ops, bytes")),
        }
    }
    Ok(rng)
}

fn parse_balloon(s: &str) -> std::result::Result<BalloonConfig, FieldError> {
    let mut balloon = BalloonConfig::default();
    for pair in pairs(s).filter(|_| !s.is_empty()) {
        match pair? {
            ("target", v) => balloon.target = field("target", v)?,
            ("deflate_on_oom", v) => balloon.deflate_on_oom = field("deflate_on_oom", v)?,
            ("reporting", v) => balloon.reporting = field("reporting", v)?,
            ("stats_seconds", v) => balloon.stats_seconds = field("stats_seconds", v)?,
            (key, _) => {
                return Err(FieldError::new(
                    key,
                    "unknown; known are target, deflate_on_oom, reporting, stats_seconds",
                ));
            }
        }
    }
    Ok(balloon)
}

fn parse_vsock(s: &str) -> std::result::Result<VsockConfig, FieldError> {
    let mut vsock = VsockConfig { cid: VsockConfig::default_cid(), path: PathBuf::new() };
    for pair in pairs(s) {
        match pair? {
            ("path", v) => vsock.path = v.into(),
            ("cid", v) => vsock.cid = field("cid", v)?,
            (key, _) => return Err(FieldError::new(key, "unknown; known are path, cid")),
        }
    }
    if vsock.path.as_os_str().is_empty() { Err(FieldError::new("path", "is missing")) } else { Ok(vsock) }
}
