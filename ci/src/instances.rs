//! A template of the N-module, and instances of it in the lab.
//!
//! Always true: every instance has a tap, a MAC, an address and a vm_id of its own, made from its number.
use crate::api::Api;
use crate::artifacts::Artifacts;
use crate::copy;
use crate::lab::{Host, Lab, PREFIX};
use crate::modules::{self, Module, NMODULE_MEMORY, VOLUME};
use crate::probe;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// A template that is not prepared by then, or an instance that does not serve, never will.
const LIMIT: Duration = Duration::from_secs(60);
/// vm_id of instance 0.
const FIRST_VM_ID: u64 = 1000;
/// Bytes of the file that every instance reads, and how many are read from at a time.
const READ_BYTES: u64 = 256 << 10;
const READERS: usize = 4;
/// Most instances: their addresses are 10.77.0.100 and those that follow.
pub const COUNT_MAX: u8 = 150;

/// Makes a template, takes its checkpoint into the lab's data directory and ends it.
pub fn template(lab: &Lab, artifacts: &Artifacts) -> Result<PathBuf> {
    lab.node1.ip("link show template\n").or_else(|_| lab.node1.add_tap("template"))?;
    let api = Api::new(lab.state_dir().join("template.sock"));
    let mut command = Command::new(&artifacts.vmm);
    command.arg("--api-sock").arg(api.socket()).args(["--net", "id=net0,tap=template"]);
    command.arg("--image").arg(&artifacts.images.nmodule).args(["--memory", NMODULE_MEMORY]);
    command.args(["--cmdline", &format!("template volume={VOLUME} no_root_squash"), "--serial"]);
    command.arg(lab.state_dir().join("template.console"));
    let mut template = modules::start(lab, &lab.node1, "template", api, &mut command)?;
    let api = template.api.clone();
    let prepared = || api.get("/v1/vm").is_ok_and(|vm| vm["boot_ms"]["prepared"].is_number());
    template.daemon.wait_until("prepared", LIMIT, prepared)?;
    let path = lab.data_dir().join("template");
    let taken = template.api.post("/v1/vm/checkpoint", &json!({ "path": path }))?;
    if taken["at_rest"] != true {
        bail!("the template was not at rest: {taken}");
    }
    template.shut_down()?;
    Ok(path)
}

/// An instance by its number.
#[derive(Clone, Copy, Debug)]
pub struct Instance(pub u8);

impl Instance {
    /// Its address.
    pub fn ip(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 100 + self.0)
    }

    /// Its NFS service.
    pub fn nfs(self) -> SocketAddrV4 {
        SocketAddrV4::new(self.ip(), 2049)
    }

    /// NFS URL of a file.
    pub fn url(self, file: &str) -> String {
        format!("nfs://{}/{VOLUME}/{file}", self.ip())
    }

    fn vm_id(self) -> u64 {
        FIRST_VM_ID + u64::from(self.0)
    }

    fn tap(self) -> String {
        format!("spawn{}", self.0)
    }

    fn mac(self) -> String {
        format!("02:4f:52:00:01:{:02x}", self.0)
    }

    fn cmdline(self) -> String {
        format!("ip={}/{PREFIX} dmodule={}", self.ip(), modules::FABRIC)
    }

    /// Its tap, and its MAC at the client, so that no figure has ARP in it.
    pub fn prepare(self, lab: &Lab, host: &Host) -> Result<()> {
        host.ip(&format!("link show {}\n", self.tap())).or_else(|_| host.add_tap(&self.tap()))?;
        lab.client1.permanent_neighbour(self.ip(), &self.mac())
    }

    /// Starts a `vmm` that makes itself an instance.
    pub fn start(self, lab: &Lab, artifacts: &Artifacts, host: &Host, template: &Path) -> Result<Module> {
        let (mut command, api, name) = self.command(lab, artifacts);
        command.arg("--spawn").arg(template).args(["--vm-id", &self.vm_id().to_string(), "--replace"]);
        command.args(["--cmdline", &self.cmdline(), "--arbiter", &modules::FABRIC.to_string()]);
        command.args(["--net", &format!("id=net0,tap={},mac={}", self.tap(), self.mac())]);
        command.arg("--serial").arg(lab.state_dir().join(format!("{name}.console")));
        modules::start(lab, host, &name, api, &mut command)
    }

    /// The same, to its first reply to NFS NULL; how long that took from the start of the process.
    pub fn serve(self, lab: &Lab, artifacts: &Artifacts, host: &Host, template: &Path) -> Result<(Module, Duration)> {
        modules::serve(
            || self.start(lab, artifacts, host, template),
            |stop| probe::first_reply(&lab.client1, self.nfs(), LIMIT, stop),
        )
    }

    /// Starts a `vmm` that waits to be told what it is: a prepared shell.
    pub fn shell(self, lab: &Lab, artifacts: &Artifacts, host: &Host) -> Result<Module> {
        let (mut command, api, name) = self.command(lab, artifacts);
        let mut module = modules::start(lab, host, &name, api, &mut command)?;
        let api = module.api.clone();
        module.daemon.wait_until("waiting", LIMIT, || api.is_up())?;
        Ok(module)
    }

    /// Makes a prepared shell an instance; how long that took from the request to its first reply to NFS NULL.
    pub fn fill(self, lab: &Lab, shell: Module, template: &Path) -> Result<(Module, Duration)> {
        let request = json!({
            "template": template, "vm_id": self.vm_id(), "replace": true, "cmdline": self.cmdline(),
            "arbiter": modules::FABRIC.to_string(), "serial": "none",
            "nets": [{ "id": "net0", "tap": self.tap(), "mac": self.mac() }],
        });
        modules::serve(
            || {
                let started = Instant::now();
                shell.api.put("/v1/vm/spawn", &request)?;
                Ok(Module { started, ..shell })
            },
            |stop| probe::first_reply(&lab.client1, self.nfs(), LIMIT, stop),
        )
    }

    fn command(self, lab: &Lab, artifacts: &Artifacts) -> (Command, Api, String) {
        let name = format!("spawn{}", self.0);
        let api = Api::new(lab.state_dir().join(format!("{name}.sock")));
        let mut command = Command::new(&artifacts.vmm);
        command.arg("--api-sock").arg(api.socket());
        (command, api, name)
    }
}

/// Writes a new file through the first of many instances and reads it through each, by an NFS client each: every one of them needs a
/// session of its own with the D-module. Fails unless each gives what was written.
pub fn all_read(lab: &Lab, many: u8, file: &str) -> Result<()> {
    let written = lab.data_dir().join(file);
    copy::random_file(&written, READ_BYTES)?;
    let cp = |from: &str, to: &str| lab.client1.output(Command::new("nfs-cp").args([from, to]));
    cp(&written.display().to_string(), &Instance(0).url(file))?;
    let wanted = copy::sha256(&written)?;
    let next = AtomicU8::new(0);
    let work = || -> Result<()> {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= many {
                return Ok(());
            }
            let read = lab.data_dir().join(format!("{file}{i}"));
            cp(&Instance(i).url(file), &read.display().to_string()).with_context(|| format!("instance {i}"))?;
            if copy::sha256(&read)? != wanted {
                bail!("instance {i} reads other bytes than were written");
            }
            std::fs::remove_file(&read)?;
        }
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(work)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| bail!("a reader panicked")))
    })
}

/// Milliseconds from the request for an instance to its first instruction, as its `vmm` says.
pub fn to_first_instruction(module: &Module) -> Result<f64> {
    let vm: Value = module.api.get("/v1/vm")?;
    let at = |milestone: &str| vm["boot_ms"][milestone].as_f64().with_context(|| format!("no {milestone}: {vm}"));
    Ok(at("run")? - at("asked")?)
}
