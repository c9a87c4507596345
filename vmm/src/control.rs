//! What the control interface can do with this process, whoever does it.
//!
//! Owns the VM (or its absence, while one is configured or awaited), the way to end the process, and the place where porting plugs in:
//! the port engine implements [`Porting`], is handed to [`Control::set_porting`], and is then what
//! `/v1/migrations` speaks to. On a destination it calls [`Control::set_vm`] when the VM has arrived.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::boot::info::OwnerId;
use crate::checkpoint::restore::restore;
use crate::checkpoint::take::take;
use crate::checkpoint::{CheckpointReport, CheckpointRequest, RestoreRequest};
use crate::config::{Config, TlsConfig};
use crate::error::{Error, Result};
use crate::metrics::Exposition;
use crate::notice;
use crate::port::destination::Shown;
use crate::port::job::JobStatus;
use crate::sandbox::{self, Kind};
use crate::spawn::{self, SpawnRequest};
use crate::stats::Stats;
use crate::vcpu::End;
use crate::vm::Vm;

/// Number of a port in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(pub u64);

/// Body of `POST /v1/migrations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// Where a VMM waits (`vmm --receive`).
    #[schemars(schema_with = "crate::config::socket_address_schema")]
    pub to: SocketAddr,
    /// Pause aimed at in milliseconds: pre-copy goes on until the residue fits. Not given: the engine's default.
    #[serde(default)]
    pub blackout_ms: Option<u32>,
    /// Longest pause in milliseconds: rather than exceed it, the port is given up. Not given: 300, or `blackout_ms` if that is more.
    #[serde(default)]
    pub limit_ms: Option<u32>,
    /// Most the guest may be slowed down, in percent of its time, when it writes faster than its memory can be sent: 0
    /// (never) to 98. Not given: 90.
    #[serde(default)]
    #[schemars(range(max = 98))]
    pub throttle_max: Option<u8>,
    /// Compare all of memory on both sides before the VM runs there. For tests: it lengthens the pause.
    #[serde(default)]
    pub verify: bool,
    /// Name in the destination's certificate. Not given: the ticket's destination, or the address in `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Ticket (base64) of the issuer that both sides trust; needed where one is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
}

/// Body of `PUT /v1/tls`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsOrder {
    /// How ports that begin from now on are protected. Files are read now.
    pub tls: TlsConfig,
}

/// Body of `PUT /v1/migrations/{id}/resolve`: the operator's word on who runs a VM in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resolution {
    /// True: the VM runs here, the other side does not have it.
    pub here: bool,
}

/// The port engine, as the control interface sees it. The calls only start or ask; none waits for a port.
pub trait Porting: Send + Sync {
    /// Begins to port `vm`. [`Error::Conflict`] if a port is under way.
    fn start(&self, vm: &Arc<Vm>, request: &MigrationRequest) -> Result<MigrationId>;
    /// Reads keys, or takes note that there are to be none: for ports that begin from now on, of either direction. `path` names
    /// the setting in mistakes.
    fn protect(&self, tls: &TlsConfig, path: &str) -> Result<()>;
    /// What was said last.
    fn protection(&self) -> Option<TlsConfig>;
    /// Everything known about a port.
    fn status(&self, id: MigrationId) -> Option<JobStatus>;
    /// All ports of this process, oldest first.
    fn list(&self) -> Vec<MigrationId>;
    /// Asks for a port to be stopped; it may be too late.
    fn cancel(&self, id: MigrationId) -> Result<()>;
    /// The operator's word on a port in doubt.
    fn resolve(&self, id: MigrationId, resolution: Resolution) -> Result<()>;
    /// Whether a port is under way or in doubt: nobody else may then pause or resume the VM.
    fn is_active(&self) -> bool;
    /// While a VM is awaited: how that stands.
    fn arrival(&self) -> Option<Shown> {
        None
    }
    /// Adds its counters.
    fn metrics(&self, _out: &mut Exposition) {}
}

/// Where the VM of this process comes from.
enum Origin {
    /// From a configuration given over the control interface: what there is of it.
    Configured(Option<Box<Config>>),
    /// From the command line, or from elsewhere: there is nothing to configure.
    Given,
}

/// See the module.
pub struct Control {
    vm: RwLock<Option<Arc<Vm>>>,
    origin: Mutex<Origin>,
    porting: OnceLock<Arc<dyn Porting>>,
    end: watch::Sender<Option<End>>,
    stats: Arc<Stats>,
}

impl Control {
    /// Of a process without a VM yet.
    pub fn new(stats: Arc<Stats>) -> Arc<Control> {
        Arc::new(Control {
            vm: RwLock::new(None),
            origin: Mutex::new(Origin::Given),
            porting: OnceLock::new(),
            end: watch::Sender::new(None),
            stats,
        })
    }

    fn origin(&self) -> MutexGuard<'_, Origin> {
        self.origin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM will be configured over the control interface.
    pub fn await_configuration(&self) {
        *self.origin() = Origin::Configured(None);
    }

    /// Whether there is no VM because nothing has been booted yet, and if so, whether there is a configuration.
    pub fn awaits_boot(&self) -> Option<bool> {
        match &*self.origin() {
            Origin::Configured(config) if self.vm().is_none() => Some(config.is_some()),
            _ => None,
        }
    }

    /// The configuration of the VM, or of the one to be booted.
    pub fn config(&self) -> Result<Config> {
        if let Some(vm) = self.vm() {
            return Ok(vm.config().clone());
        }
        match &*self.origin() {
            Origin::Configured(Some(config)) => Ok(Config::clone(config)),
            _ => Err(Error::Conflict("there is no configuration yet: PUT /v1/vm/config".into())),
        }
    }

    /// The configuration to be booted, if it may be changed.
    fn draft<'a>(&self, origin: &'a mut Origin) -> Result<&'a mut Option<Box<Config>>> {
        if self.vm().is_some() {
            return Err(Error::Conflict("the VM has been started: its configuration is fixed".into()));
        }
        match origin {
            Origin::Configured(config) => Ok(config),
            Origin::Given => Err(Error::Conflict("this process waits for a VM that is ported here".into())),
        }
    }

    /// Sets the configuration to be booted, after it was checked as a whole.
    pub fn configure(&self, mut config: Config) -> Result<Config> {
        let mut origin = self.origin();
        let draft = self.draft(&mut origin)?;
        config.validate()?;
        *draft = Some(Box::new(config.clone()));
        notice::state("configured", None);
        Ok(config)
    }

    /// Sets some fields of the configuration to be booted; null gives a field its default. Only these are checked: the rest is
    /// at boot.
    pub fn configure_parts(&self, parts: Map<String, Value>) -> Result<Config> {
        let mut origin = self.origin();
        let draft = self.draft(&mut origin)?;
        let before = draft.as_deref().cloned().unwrap_or_else(|| Config::for_image(Default::default()));
        let config = before.with_parts(parts)?;
        *draft = Some(Box::new(config.clone()));
        notice::state("configured", None);
        Ok(config)
    }

    /// Checks the configuration, builds the VM and starts it. After a failure it can be configured anew.
    pub fn boot(self: &Arc<Self>) -> Result<()> {
        let mut origin = self.origin();
        let draft = self.draft(&mut origin)?;
        let mut config = draft.as_deref().cloned().ok_or_else(|| {
            Error::Conflict("there is no configuration yet: PUT /v1/vm/config before PUT /v1/vm/boot".into())
        })?;
        config.validate()?;
        self.start(config)
    }

    /// Builds and starts the VM of a configuration that has been checked.
    pub fn start(self: &Arc<Self>, config: Config) -> Result<()> {
        self.read_keys(config.tls.as_ref())?;
        let vm = Arc::new(Vm::boot(config, OwnerId::random()?, self.stats.clone())?);
        // From here on nothing is built; the threads of the VM are started by what is left of this one.
        sandbox::confine(Kind::Control)?;
        vm.start(self.on_end())?;
        self.set_vm(vm);
        notice::state("running", None);
        Ok(())
    }

    /// How ports are protected: now, while there are files and the right to read them.
    fn read_keys(&self, tls: Option<&TlsConfig>) -> Result<()> {
        match (tls, self.porting.get()) {
            (Some(tls), Some(porting)) => porting.protect(tls, "tls"),
            _ => Ok(()),
        }
    }

    /// Restores a VM in a process that has no configuration yet; after a failure it can still be configured.
    pub fn restore(self: &Arc<Self>, request: &RestoreRequest) -> Result<()> {
        let mut origin = self.origin();
        if self.draft(&mut origin)?.is_some() {
            return Err(Error::Conflict("this process has a configuration: a checkpoint has its own".into()));
        }
        self.start_restored(request)
    }

    /// Builds the VM of a checkpoint and lets it go on.
    pub fn start_restored(self: &Arc<Self>, request: &RestoreRequest) -> Result<()> {
        self.read_keys(request.tls.as_ref())?;
        let restored = restore(request, OwnerId::random()?, &self.stats)?;
        let vm = restored.vm.clone();
        // A VM that is started paused has its threads waiting.
        vm.pause()?;
        sandbox::confine(Kind::Control)?;
        vm.start(self.on_end())?;
        restored.run()?;
        self.set_vm(vm);
        notice::state("running", Some(format!("restored from {}", request.path.display())));
        Ok(())
    }

    /// Takes a checkpoint; returns when it is on the disk. To be called on a thread that may wait.
    pub fn checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointReport> {
        let vm = self.need_idle_vm()?;
        notice::checkpoint(&request.path, "running", None);
        let result = take(&vm, request);
        self.stats.checkpoints.count(&result);
        match &result {
            Ok(_) => notice::checkpoint(&request.path, "completed", None),
            Err(e) => notice::checkpoint(&request.path, "failed", Some(e.to_string())),
        }
        result
    }

    /// Makes the VM of this process, which has none yet, an instance of a template.
    pub fn spawn(self: &Arc<Self>, request: &SpawnRequest) -> Result<()> {
        let mut origin = self.origin();
        self.draft(&mut origin)?;
        self.spawn_only(request)
    }

    /// The same for a process that is made for nothing else.
    pub fn spawn_only(self: &Arc<Self>, request: &SpawnRequest) -> Result<()> {
        self.read_keys(request.tls.as_ref())?;
        let vm = Arc::new(spawn::build(request, OwnerId::random()?, &self.stats)?);
        sandbox::confine(Kind::Control)?;
        vm.start(self.on_end())?;
        self.set_vm(vm);
        notice::state("running", None);
        Ok(())
    }

    /// Stops the vCPUs; answers when they have stopped.
    pub fn pause(&self) -> Result<()> {
        self.need_idle_vm()?.pause()?;
        notice::state("paused", None);
        Ok(())
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) -> Result<()> {
        self.need_idle_vm()?.resume()?;
        notice::state("running", None);
        Ok(())
    }

    /// The VM begins again; answers when it has.
    pub fn reset(&self) -> Result<()> {
        self.need_idle_vm()?.reset()
    }

    /// Plugs porting in; the first call counts.
    pub fn set_porting(&self, porting: Arc<dyn Porting>) {
        let _ = self.porting.set(porting);
    }

    /// Porting, or why not.
    pub fn porting(&self) -> Result<&Arc<dyn Porting>> {
        self.porting.get().ok_or_else(|| Error::Conflict("this process cannot port VMs".into()))
    }

    /// This is the VM from now on.
    pub fn set_vm(&self, vm: Arc<Vm>) {
        *self.vm.write().unwrap_or_else(PoisonError::into_inner) = Some(vm);
    }

    /// The VM, if there is one.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        self.vm.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The VM, or the error that there is none.
    pub fn need_vm(&self) -> Result<Arc<Vm>> {
        self.vm().ok_or_else(|| match self.awaits_boot() {
            None => Error::Conflict("there is no VM yet: it is waited for".into()),
            Some(_) => Error::Conflict("there is no VM yet: PUT /v1/vm/boot starts it".into()),
        })
    }

    /// The VM, for those who want to pause or resume it: not while a port or a checkpoint does.
    pub fn need_idle_vm(&self) -> Result<Arc<Vm>> {
        if self.porting.get().is_some_and(|p| p.is_active()) {
            return Err(Error::Conflict("a port of the VM is under way".into()));
        }
        let vm = self.need_vm()?;
        if vm.is_copied() {
            return Err(Error::Conflict("a checkpoint of the VM is being taken".into()));
        }
        Ok(vm)
    }

    /// Counters.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// The process is to end like this; the first call counts. Called by the VM's own end ([`Control::on_end`]), by a shutdown,
    /// and by a port when the VM runs elsewhere.
    pub fn finish(&self, end: End) {
        let reason = end.to_string();
        let first = self.end.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert(end);
            first
        });
        if first {
            notice::state("ended", Some(reason));
        }
    }

    /// For [`Vm::start`]: the process ends with the VM.
    pub fn on_end(self: &Arc<Self>) -> impl FnOnce(&End) + Send + 'static {
        let control = self.clone();
        move |end| control.finish(end.clone())
    }

    /// Whether the process is to end.
    pub fn is_over(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Becomes `Some` when the process is to end.
    pub fn ended(&self) -> watch::Receiver<Option<End>> {
        self.end.subscribe()
    }
}
