//! Porting as the control interface sees it.
//!
//! Owns the list of this process's ports and, in a process that waits for a VM, the thread that does. Always true: at most one
//! port is under way.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use migration::convergence::{Policy, THROTTLE_STEPS};
use migration::ownership::Epoch;
use migration::ticket::TICKET_MAX;

use super::destination::{self, Arrival, Progress, Shown};
use super::guest;
use super::job::{Job, JobState, JobStatus};
use super::source;
use super::tls::{Asked, Security};
use crate::boot::info::OwnerId;
use crate::config::TlsConfig;
use crate::config::cli::ReceiveConfig;
use crate::control::{Control, MigrationId, MigrationRequest, Porting, Resolution};
use crate::error::{Error, FieldError, Result, host};
use crate::metrics::Exposition;
use crate::sandbox::{self, Kind};
use crate::vcpu::End;
use crate::vm::{Phase, Vm};

/// Most ports remembered.
pub const JOBS_MAX: usize = 64;
/// Most a guest may be slowed down, in percent: the last step there is.
const THROTTLE_MAX: u8 = THROTTLE_STEPS[THROTTLE_STEPS.len() - 1];
/// Stack of the porting threads.
const THREAD_STACK: usize = 256 << 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Engine {
    jobs: Mutex<Vec<Arc<Job>>>,
    arrival: Mutex<Option<Arc<Progress>>>,
    security: Arc<Security>,
}

impl Engine {
    /// No port yet.
    pub fn new() -> Arc<Engine> {
        Arc::new(Engine::default())
    }

    /// Waits for a VM on a thread of its own; it becomes the control's when it runs here. Fails at once if the address
    /// cannot be listened on.
    pub fn receive(self: &Arc<Self>, control: &Arc<Control>, config: ReceiveConfig, owner: OwnerId) -> Result<()> {
        self.security.set(&config.tls, "--tls")?;
        let listener = destination::listen(&config)?;
        let progress = Arc::new(Progress::default());
        *self.arrival.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress.clone());
        let (control, security) = (control.clone(), self.security.clone());
        let body = move || wait_for_vm(&listener, &config, &security, owner, &progress, &control);
        std::thread::Builder::new()
            .name("receive".into())
            .stack_size(THREAD_STACK)
            .spawn(body)
            .map_err(host("thread receive"))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn job(&self, id: MigrationId) -> Result<Arc<Job>> {
        let job = self.lock().iter().find(|j| j.id == id.0).cloned();
        job.ok_or_else(|| Error::Conflict(format!("there is no migration {}", id.0)))
    }
}

impl Porting for Engine {
    fn start(&self, vm: &Arc<Vm>, request: &MigrationRequest) -> Result<MigrationId> {
        let mut jobs = self.lock();
        if let Some(job) = jobs.iter().find(|j| j.is_active()) {
            return Err(Error::Conflict(format!("migration {} to {} is under way", job.id, job.to)));
        }
        if vm.phase() != Phase::Running {
            return Err(Error::Conflict("only a VM that runs can be ported".into()));
        }
        let arbiter = vm.config().arbiter;
        if arbiter.is_some() && vm.config().vm_id == 0 {
            return Err(Error::Conflict("an arbiter is configured, but no vm_id".into()));
        }
        let policy = policy(request)?;
        let ticket = request.ticket.as_deref().map(decode_ticket).transpose()?.unwrap_or_default();
        let (vm_id, epoch) = (vm.config().vm_id, Epoch(guest::epoch(vm)));
        let asked = Asked { name: request.name.as_deref(), ticket: &ticket, vm_id, epoch };
        let route = self.security.route(request.to.ip(), asked)?;
        let claim = vm.claim_copy()?;
        let job = Arc::new(Job::new(jobs.last().map_or(1, |j| j.id + 1), request.to)?);
        let (vm, shared, order) =
            (vm.clone(), job.clone(), source::Order { arbiter, policy, verify: request.verify, route });
        std::thread::Builder::new()
            .name("port".into())
            .stack_size(THREAD_STACK)
            .spawn(move || {
                let _claim = claim;
                source::run(&vm, &shared, &order);
            })
            .map_err(host("thread port"))?;
        if jobs.len() == JOBS_MAX {
            jobs.remove(0);
        }
        let id = MigrationId(job.id);
        jobs.push(job);
        Ok(id)
    }

    fn protect(&self, tls: &TlsConfig, path: &str) -> Result<()> {
        self.security.set(tls, path)
    }

    fn protection(&self) -> Option<TlsConfig> {
        self.security.config()
    }

    fn status(&self, id: MigrationId) -> Option<JobStatus> {
        Some(self.job(id).ok()?.status())
    }

    fn list(&self) -> Vec<MigrationId> {
        self.lock().iter().map(|j| MigrationId(j.id)).collect()
    }

    fn cancel(&self, id: MigrationId) -> Result<()> {
        self.job(id)?.cancel();
        Ok(())
    }

    fn resolve(&self, id: MigrationId, resolution: Resolution) -> Result<()> {
        self.job(id)?.resolve(resolution.here)
    }

    fn arrival(&self) -> Option<Shown> {
        Some(self.arrival.lock().unwrap_or_else(PoisonError::into_inner).clone()?.shown())
    }

    fn is_active(&self) -> bool {
        self.lock().iter().any(|j| j.is_active())
    }

    fn metrics(&self, out: &mut Exposition) {
        let all: Vec<_> = self.lock().iter().map(|j| j.status()).collect();
        for (name, state) in [
            ("running", JobState::Running),
            ("completed", JobState::Completed),
            ("failed", JobState::Failed),
            ("cancelled", JobState::Cancelled),
            ("unknown", JobState::Unknown),
        ] {
            let count = all.iter().filter(|s| s.state == state).count();
            out.gauge("vmm_migrations", "Ports of this process that are remembered.", &[("state", name)], count as f64);
        }
        if let Some(last) = all.last() {
            out.gauge("vmm_migration_sent_bytes", "Bytes the last port has sent.", &[], last.bytes as f64);
            out.gauge("vmm_migration_rounds", "Rounds of the last port.", &[], last.rounds.len() as f64);
            let help = "Pages the last port has not sent as they had no content.";
            for (reason, pages) in [("posted", last.posted_pages), ("free", last.free_pages)] {
                out.gauge("vmm_migration_skipped_pages", help, &[("reason", reason)], pages as f64);
            }
        }
        let arrival = self.arrival.lock().unwrap_or_else(PoisonError::into_inner).clone().map(|p| p.shown());
        let came = arrival.and_then(|a| a.blackout_us);
        for (side, blackout) in [("source", all.last().and_then(|s| s.blackout_us)), ("destination", came)] {
            if let Some(us) = blackout {
                let help = "How long no vCPU ran in the last port that took place.";
                out.gauge("vmm_migration_blackout_seconds", help, &[("side", side)], us as f64 / 1e6);
            }
        }
    }
}

/// What the operator wants, where he says so.
fn policy(request: &MigrationRequest) -> Result<Policy> {
    let ns = |ms: u32| u64::from(ms) * 1_000_000;
    let mut policy = Policy::default();
    let limit = request.limit_ms.map(ns);
    policy.target_ns = request.blackout_ms.map_or(policy.target_ns.min(limit.unwrap_or(u64::MAX)), ns);
    policy.limit_ns = limit.unwrap_or(policy.limit_ns.max(policy.target_ns));
    policy.throttle_max = request.throttle_max.unwrap_or(policy.throttle_max);
    let mut wrong = Vec::new();
    if policy.limit_ns < policy.target_ns {
        let text = format!("{} ms: less than the pause aimed at", policy.limit_ns / 1_000_000);
        wrong.push(FieldError::new("limit_ms", text));
    }
    if policy.throttle_max > THROTTLE_MAX {
        wrong.push(FieldError::new("throttle_max", format!("{}: 0 to {THROTTLE_MAX} percent", policy.throttle_max)));
    }
    if wrong.is_empty() { Ok(policy) } else { Err(Error::Config(wrong)) }
}

/// A ticket as people hand it around.
fn decode_ticket(text: &str) -> Result<Vec<u8>> {
    let wrong = |what: String| Error::Config(vec![FieldError::new("ticket", what)]);
    if text.len() > TICKET_MAX.div_ceil(3) * 4 {
        return Err(wrong(format!("longer than a ticket of {TICKET_MAX} bytes")));
    }
    match BASE64_STANDARD.decode(text.trim()) {
        Ok(bytes) if !bytes.is_empty() => Ok(bytes),
        Ok(_) => Err(wrong("is empty".into())),
        Err(e) => Err(wrong(format!("is not base64: {e}"))),
    }
}

/// What a process does with a VM that comes to it.
struct Place<'a> {
    control: &'a Arc<Control>,
    /// Set when the VM is this process's: only then does its end end the process.
    arrived: Arc<AtomicBool>,
}

impl Arrival for Place<'_> {
    fn prepare(&mut self, vm: &Arc<Vm>) -> Result<()> {
        // A VM that is started paused has its threads waiting when its state comes.
        vm.pause()?;
        self.arrived = Arc::new(AtomicBool::new(false));
        let (arrived, on_end) = (self.arrived.clone(), self.control.on_end());
        sandbox::confine(Kind::Control)?;
        vm.start(move |end| {
            if arrived.load(Ordering::Acquire) {
                on_end(end);
            }
        })
    }

    fn runs(&mut self, vm: &Arc<Vm>) {
        self.control.set_vm(vm.clone());
        self.arrived.store(true, Ordering::Release);
        if let Some(end) = vm.end() {
            self.control.finish(end);
        }
    }
}

fn wait_for_vm(
    listener: &TcpListener,
    config: &ReceiveConfig,
    security: &Security,
    owner: OwnerId,
    progress: &Progress,
    control: &Arc<Control>,
) {
    let mut place = Place { control, arrived: Arc::default() };
    if let Err(e) = destination::receive(listener, config, security, owner, control.stats(), progress, &mut place) {
        control.finish(End::Crash(e.to_string()));
    }
}
