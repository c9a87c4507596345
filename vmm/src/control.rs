//! What the control interface can do with this process, whoever does it.
//!
//! Owns the VM (or its absence, while one is awaited), the way to end the process, and the place where porting plugs in:
//! the port engine implements [`Porting`], is handed to [`Control::set_porting`], and is then what
//! `/v1/migrations` speaks to. On a destination it calls [`Control::set_vm`] when the VM has arrived.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::metrics::Exposition;
use crate::stats::Stats;
use crate::vcpu::End;
use crate::vm::Vm;

/// Number of a port in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(pub u64);

/// Body of `POST /v1/migrations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// Where a VMM waits (`vmm --receive`).
    pub to: SocketAddr,
    /// Pause aimed at in milliseconds: pre-copy goes on until the residue fits. Not given: the engine's default.
    #[serde(default)]
    pub blackout_ms: Option<u32>,
    /// Compare all of memory on both sides before the VM runs there. For tests: it lengthens the pause.
    #[serde(default)]
    pub verify: bool,
}

/// Body of `PUT /v1/migrations/{id}/resolve`: the operator's word on who runs a VM in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resolution {
    /// True: the VM runs here, the other side does not have it.
    pub here: bool,
}

/// The port engine, as the control interface sees it. The calls only start or ask; none waits for a port.
pub trait Porting: Send + Sync {
    /// Begins to port `vm`. [`Error::Conflict`] if a port is under way.
    fn start(&self, vm: &Arc<Vm>, request: &MigrationRequest) -> Result<MigrationId>;
    /// Everything known about a port as JSON: at least `id`, `to`, `state`, `phase`, `rounds`, `bytes`, `blackout_us`.
    fn status(&self, id: MigrationId) -> Option<serde_json::Value>;
    /// All ports of this process, oldest first.
    fn list(&self) -> Vec<MigrationId>;
    /// Asks for a port to be stopped; it may be too late.
    fn cancel(&self, id: MigrationId) -> Result<()>;
    /// The operator's word on a port in doubt.
    fn resolve(&self, id: MigrationId, resolution: Resolution) -> Result<()>;
    /// Whether a port is under way or in doubt: nobody else may then pause or resume the VM.
    fn is_active(&self) -> bool;
    /// While a VM is awaited: how that stands.
    fn arrival(&self) -> Option<serde_json::Value> {
        None
    }
    /// Adds its counters.
    fn metrics(&self, _out: &mut Exposition) {}
}

/// See the module.
pub struct Control {
    vm: RwLock<Option<Arc<Vm>>>,
    porting: OnceLock<Arc<dyn Porting>>,
    end: watch::Sender<Option<End>>,
    stats: Arc<Stats>,
}

impl Control {
    /// Of a process without a VM yet.
    pub fn new(stats: Arc<Stats>) -> Arc<Control> {
        Arc::new(Control { vm: RwLock::new(None), porting: OnceLock::new(), end: watch::Sender::new(None), stats })
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
        self.vm().ok_or_else(|| Error::Conflict("there is no VM yet: it is waited for".into()))
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
        self.end.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert(end);
            first
        });
    }

    /// For [`Vm::start`]: the process ends with the VM.
    pub fn on_end(self: &Arc<Self>) -> impl FnOnce(&End) + Send + 'static {
        let control = self.clone();
        move |end| control.finish(end.clone())
    }

    /// Becomes `Some` when the process is to end.
    pub fn ended(&self) -> watch::Receiver<Option<End>> {
        self.end.subscribe()
    }
}
