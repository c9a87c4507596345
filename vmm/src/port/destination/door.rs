//! The listening socket: who connects, who is let in, and one attempt after the other.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migration::message::{Message, Reason, ReasonCode};

use super::{Driver, TICK};
use crate::boot::info::OwnerId as VmmId;
use crate::config::cli::ReceiveConfig;
use crate::error::{Result, host};
use crate::port::connection::Connection;
use crate::port::tls::{Credentials, Protection, Security, UNSET};
use crate::port::wait::{Interest, wait};
use crate::stats::Stats;
use crate::vm::Vm;

/// Stack of the thread of an arrival.
const THREAD_STACK: usize = 256 << 10;

/// What the process shows about a VM that is on its way.
#[derive(Debug, Default)]
pub struct Progress {
    pub(super) stop: AtomicBool,
    state: std::sync::Mutex<Shown>,
}

/// See [`Progress::shown`].
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Shown {
    /// Phase of the protocol; empty while nobody is connected.
    pub phase: String,
    /// Who ports.
    pub from: String,
    /// Bytes received.
    pub bytes: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Why the last of them did.
    pub last_error: Option<String>,
    /// Last exit of the last vCPU at the source to first entry here, in microseconds, once the VM runs here.
    pub blackout_us: Option<u64>,
}

impl Progress {
    /// Ends the waiting, unless the VM already runs here.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// How it stands.
    pub fn shown(&self) -> Shown {
        self.lock().clone()
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What is to happen with a VM that has arrived.
pub trait Arrival {
    /// Called when everything is made, before READY: to start its threads, paused.
    fn prepare(&mut self, vm: &Arc<Vm>) -> Result<()>;
    /// Called when it runs here.
    fn runs(&mut self, vm: &Arc<Vm>);
}

/// Opens the socket a source connects to.
pub fn listen(config: &ReceiveConfig) -> Result<TcpListener> {
    let what = || format!("--receive {}", config.listen);
    let listener = TcpListener::bind(config.listen).map_err(host(what()))?;
    listener.set_nonblocking(true).map_err(host(what()))?;
    Ok(listener)
}

/// Waits for a VM and takes it over; returns when it runs here and the source has gone, or after [`Progress::stop`].
/// Attempts that fail are logged, and the next one is waited for.
pub fn receive(
    listener: &TcpListener,
    config: &ReceiveConfig,
    security: &Security,
    owner: VmmId,
    stats: &Arc<Stats>,
    progress: &Progress,
    arrival: &mut (dyn Arrival + Send),
) -> Result<Option<Arc<Vm>>> {
    log::info!("waiting at {} for a VM", config.listen);
    while !progress.stop.load(Ordering::Acquire) {
        let _ = wait(&[(listener.as_raw_fd(), Interest::Read)], Some(TICK));
        let Ok((socket, peer)) = listener.accept() else { continue };
        log::info!("{peer} ports a VM here");
        // On a thread of its own, which gives its rights up before the guest runs; the next attempt needs them again.
        let attempt = std::thread::scope(|scope| {
            let body = || {
                let protection = security.protection().ok_or(Reason::new(ReasonCode::Permission, UNSET))?;
                let stop = || progress.stop.load(Ordering::Acquire);
                let connection = Connection::accept(socket, peer, &protection, &stop)
                    .map_err(|e| Reason::new(ReasonCode::Permission, e.to_string()))?;
                let door = Door { listener, security, protection };
                Driver::new(config, owner, stats, progress, arrival, door, connection).run()
            };
            let thread = std::thread::Builder::new().name("arrival".into()).stack_size(THREAD_STACK);
            let thread = thread.spawn_scoped(scope, body).map_err(host("thread arrival"))?;
            let panicked = |_| Err(Reason::new(ReasonCode::Internal, "the thread of the arrival had panicked"));
            Ok(thread.join().unwrap_or_else(panicked))
        });
        match attempt? {
            Ok(vm) => return Ok(Some(vm)),
            Err(reason) => {
                log::warn!("the VM did not come: {}", reason.text);
                let mut shown = progress.lock();
                shown.failed += 1;
                shown.last_error = Some(reason.text);
                shown.phase.clear();
            }
        }
    }
    Ok(None)
}

/// The source's connection says that this host is taken: in the clear, as for a session there is no time.
pub(super) fn accept(listener: &TcpListener) -> Option<Connection> {
    let (socket, peer): (TcpStream, _) = listener.accept().ok()?;
    Connection::new(socket, peer).map_err(|e| log::warn!("{e}")).ok()
}

/// Who is let in.
pub(super) struct Door<'a> {
    pub listener: &'a TcpListener,
    security: &'a Security,
    protection: Protection,
}

impl Door<'_> {
    /// Looks at the ticket and the names before the machine sees HELLO.
    pub fn admit(&self, message: &Message, connection: &Connection) -> std::result::Result<(), Reason> {
        let (Message::Hello(hello), Protection::Tls(credentials)) = (message, &self.protection) else {
            let carries = matches!(message, Message::Hello(hello) if !hello.ticket.is_empty());
            let text = "a ticket can only be checked with TLS, which is off here";
            return if carries { Err(Reason::new(ReasonCode::Permission, text)) } else { Ok(()) };
        };
        let credentials: &Credentials = credentials;
        let peer = connection.certificate().ok_or(Reason::new(ReasonCode::Permission, "no certificate"))?;
        self.security.admit(credentials, hello, peer)
    }
}
