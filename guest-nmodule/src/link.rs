//! The way to the D-module: one CF session over whatever connections it takes.
//!
//! Owns: the session, the connection it has at the time, who waits for which reply. Always true: a call that was accepted
//! waits until the D-module has answered it, however often the connection breaks or the VM is ported; the epoch requests are sent
//! under is the boot-info page's. Survives: D-modules that are not there yet, go away, start anew or go silent.
//! Does not survive: another instance taking this VM's ownership ([`Link::fenced`]).
use crate::race::race;
use alloc::collections::BTreeMap;
use core::cell::{Cell, RefCell};
use fabric::client::{ClientError, ClientSession, Event, Rejected, Ticket};
use fabric::fs::{Credential, Status};
use fabric::id::{Epoch, Owner, SLOTS, VmId};
use fabric::op::{Op, Outcome, Request};
use guest_nmodule::budget::Budget;
use guest_nmodule::limits::LINK_BUFFER;
use guest_rt::net::{Buffers, ConnectError, ReadHalf, SocketAddrV4, Stack, TcpError, TcpStream, WriteHalf};
use guest_rt::sync::{Notify, oneshot};
use guest_rt::time::{Duration, Instant, sleep, timeout};
use guest_rt::{generation_changed, identity, store_epoch};
use nfs::service::{FileService, Unreachable};

/// First and longest pause between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));
/// How often the connection and the boot-info page are looked after.
const CARE: Duration = Duration::from_millis(500);
/// A D-module that says nothing for so long is asked for a sign of life.
const QUIET: Duration = Duration::from_secs(2);
/// One that says nothing for so long may have been started anew, with another MAC address: it is looked for again. Then
/// it resets the connection it does not know.
const LOST: Duration = Duration::from_secs(3);
/// One that says nothing for so long is taken for gone: a new connection is made.
const DEAD: Duration = Duration::from_secs(8);
/// How long a connection may take to come up.
const CONNECT: Duration = Duration::from_secs(2);
/// After being fenced: how long to wait for the VMM to say that this instance has won after all.
const FENCE_GRACE: Duration = Duration::from_secs(5);
/// A D-module that cannot be reached is reported this often.
const REPORT: Duration = Duration::from_secs(10);

/// Why a connection to the D-module ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Tcp(#[from] TcpError),
    #[error("{0}")]
    Session(#[from] ClientError),
    #[error("the D-module closed the connection")]
    Closed,
    #[error("the D-module has been silent for {} s", DEAD.as_secs())]
    Silent,
    #[error("another instance has the ownership (epoch {})", .0.0)]
    Fenced(Epoch),
}

/// The session with the D-module.
pub struct Link {
    session: RefCell<ClientSession>,
    waiting: RefCell<BTreeMap<Ticket, oneshot::Sender<Outcome>>>,
    slots: Budget,
    /// There may be something to transmit.
    transmit: Notify,
    heard: Cell<Instant>,
    fenced: Cell<Option<Epoch>>,
    fence: Notify,
}

impl Link {
    /// A session of this VM, not connected.
    pub fn new() -> Link {
        let identity = identity();
        let session = ClientSession::new(VmId(identity.vm_id), Epoch(identity.epoch), Owner(identity.owner));
        Link {
            session: RefCell::new(session),
            waiting: RefCell::default(),
            slots: Budget::new(SLOTS),
            transmit: Notify::new(),
            heard: Cell::new(Instant::now()),
            fenced: Cell::new(None),
            fence: Notify::new(),
        }
    }

    /// Waits until this instance has lost its ownership for good; the epoch that holds.
    pub async fn fenced(&self) -> Epoch {
        self.fence.wait_until(|| self.fenced.get().is_some()).await;
        self.fenced.get().unwrap_or(Epoch::UNCLAIMED)
    }

    /// Keeps the session connected, until it is fenced.
    pub async fn run(&self, stack: Stack, dmodule: SocketAddrV4) {
        let mut backoff = BACKOFF.0;
        let mut reported: Option<Instant> = None;
        loop {
            self.refresh();
            let buffers = Buffers { rx: LINK_BUFFER, tx: LINK_BUFFER };
            let connected = timeout(CONNECT, stack.connect(dmodule, buffers)).await;
            match connected.unwrap_or(Err(ConnectError::TimedOut)) {
                Ok(stream) => {
                    let broken = self.converse(&stack, stream).await;
                    // Only a connection that was of use is followed by another at once.
                    if self.session.borrow().is_open() {
                        backoff = BACKOFF.0;
                    }
                    self.session.borrow_mut().disconnected();
                    if let Broken::Fenced(current) = broken {
                        self.fenced.set(Some(current));
                        self.waiting.borrow_mut().clear();
                        self.fence.notify();
                        return;
                    }
                    log::warn!("D-module {dmodule}: {broken}; connecting anew");
                    reported = Some(Instant::now());
                }
                Err(error) => {
                    stack.forget_neighbours();
                    if reported.is_none_or(|at| at.elapsed() >= REPORT) {
                        log::warn!("D-module {dmodule}: {error}; trying on");
                        reported = Some(Instant::now());
                    }
                }
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    /// One connection, to its end.
    async fn converse(&self, stack: &Stack, stream: TcpStream) -> Broken {
        let (input, output) = stream.into_split();
        self.session.borrow_mut().connected();
        self.heard.set(Instant::now());
        race(race(self.receive(input), self.send(output)), self.care(stack)).await
    }

    async fn receive(&self, mut input: ReadHalf) -> Broken {
        loop {
            let taken = input.read_with(|bytes| {
                // Before refusals of the epoch before are looked at.
                self.refresh();
                let result = match bytes {
                    [] => Err(Broken::Closed),
                    bytes => self.session.borrow_mut().receive(bytes).map_err(Broken::from),
                };
                (bytes.len(), result)
            });
            match taken.await {
                Ok(Ok(())) => {}
                Ok(Err(broken)) => return broken,
                Err(error) => return error.into(),
            }
            self.heard.set(Instant::now());
            if let Some(current) = self.take_events()
                && !self.won_after_all().await
            {
                return Broken::Fenced(current);
            }
            self.transmit.notify();
        }
    }

    async fn send(&self, mut output: WriteHalf) -> Broken {
        loop {
            let chunk = self.session.borrow_mut().poll_transmit();
            match chunk {
                Some(chunk) => {
                    if let Err(error) = output.write_all(chunk.as_ref()).await {
                        return error.into();
                    }
                }
                None => self.transmit.notified().await,
            }
        }
    }

    /// Looks after the epoch and the D-module's life.
    async fn care(&self, stack: &Stack) -> Broken {
        loop {
            let ported = async {
                generation_changed().await;
            };
            race(ported, sleep(CARE)).await;
            self.refresh();
            let quiet = self.heard.get().elapsed();
            if quiet >= DEAD {
                return Broken::Silent;
            }
            if quiet >= LOST {
                stack.forget_neighbours();
            }
            if quiet >= QUIET {
                self.session.borrow_mut().ping(Instant::now().as_nanos());
                self.transmit.notify();
            }
        }
    }

    /// Hands out what the session has to say; the epoch that holds, if it is not ours.
    fn take_events(&self) -> Option<Epoch> {
        let mut fenced = None;
        loop {
            let event = self.session.borrow_mut().poll_event();
            match event {
                Some(Event::Completed(ticket, outcome)) => {
                    if let Some(waiting) = self.waiting.borrow_mut().remove(&ticket) {
                        waiting.send(outcome);
                    }
                }
                Some(Event::Opened { epoch, restarted, .. }) => {
                    if identity().epoch == Epoch::UNCLAIMED.0 {
                        store_epoch(epoch.0);
                    }
                    log::info!(
                        "D-module: session open, epoch {}{}",
                        epoch.0,
                        if restarted { ", it was restarted" } else { "" }
                    );
                }
                Some(Event::Fenced { current }) => fenced = Some(current),
                Some(Event::Pong(_)) => {}
                None => return fenced,
            }
        }
    }

    /// Another epoch than ours holds. A port may be under way that the boot-info page tells of in a moment; if it does
    /// not, this instance has lost.
    async fn won_after_all(&self) -> bool {
        let before = self.session.borrow().epoch();
        let began = Instant::now();
        while began.elapsed() < FENCE_GRACE {
            self.refresh();
            if self.session.borrow().epoch() != before {
                return true;
            }
            sleep(Duration::from_millis(5)).await;
        }
        false
    }

    /// Takes the epoch over from the boot-info page, where a port changes it.
    pub fn refresh(&self) {
        let identity = identity();
        let mut session = self.session.borrow_mut();
        if identity.epoch != Epoch::UNCLAIMED.0 && identity.epoch != session.epoch().0 {
            guest_rt::log_later(alloc::format!("ownership epoch is now {}", identity.epoch));
            session.set_epoch(Epoch(identity.epoch), Owner(identity.owner));
            drop(session);
            self.transmit.notify();
        }
    }
}

impl FileService for Link {
    async fn call(&self, credential: Credential, op: Op) -> Result<Outcome, Unreachable> {
        let slot = self.slots.acquire(1).await;
        if self.fenced.get().is_some() {
            return Err(Unreachable);
        }
        self.refresh();
        let submitted = self.session.borrow_mut().submit(Request { credential, op });
        let ticket = match submitted {
            Ok(ticket) => ticket,
            // The engines keep to the limits, and a slot was free: should it happen, the client may try again.
            Err(Rejected::Full(_)) => return Ok(Err(Status::Delay.into())),
            Err(Rejected::Invalid(error)) => {
                log::error!("request that cannot be sent: {error}");
                return Ok(Err(Status::Invalid.into()));
            }
        };
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().insert(ticket, sender);
        self.transmit.notify();
        let outcome = receiver.await.map_err(|_| Unreachable);
        drop(slot);
        outcome
    }
}
