//! Asking the arbiter who owns the VM: a client of the D-module's ownership messages.
//!
//! Owns the connection to it. Always true: a compare-and-swap is repeated until it is answered; repeating is harmless, the
//! record knows its owner. Nothing here waits except for a connection ([`CONNECT_MAX`]) and for
//! what says that it waits for its answer; within the pause the connection is already there.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fabric::id::{Epoch as CfEpoch, Owner, VmId};
use fabric::wire::{
    CasStatus, Farewell, OwnerAnswer, OwnerAnswers, owner_cas, owner_get, owner_release, owner_reserve,
};
use migration::ownership::{Epoch, OwnerId, Record, Verdict};

use super::faults;
use super::wait::{Interest, wait};

/// Longest time for a connection.
const CONNECT_MAX: Duration = Duration::from_millis(500);
/// Longest time for an answer before the question is asked anew on another connection.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// Pause before another attempt.
const RETRY: Duration = Duration::from_millis(100);
/// Attempts of [`Arbiter::record`].
const RECORD_ATTEMPTS: u32 = 3;

/// Compare-and-swaps from epoch 0 that this process has asked for and was not answered: one of them may take a record that was
/// released meanwhile, and looks like a claim of the guest's then.
static UNHEARD: AtomicU32 = AtomicU32::new(0);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The socket.
    #[error("arbiter {0}: {1}")]
    Io(SocketAddr, std::io::Error),
    /// It does not speak the protocol.
    #[error("arbiter {0}: {1}")]
    Wire(SocketAddr, fabric::wire::WireError),
    /// It cannot make the change durable, or has been restarted and may have given the VM away before.
    #[error(
        "arbiter {0}: it cannot change the ownership record: its disk does not take it (full?), or it was restarted while the VM was \
         handed over"
    )]
    Undecided(SocketAddr),
    /// It knows as many heirs as it can.
    #[error(
        "arbiter {0}: it has no room for another heir: ports of as many other VMs as it can know heirs for are under way"
    )]
    Full(SocketAddr),
    /// It is older than heirs: it took the naming of one for a mistake.
    #[error("arbiter {0}: it does not know heirs")]
    NoHeirs(SocketAddr),
    /// An answer to another question, or a refusal.
    #[error("arbiter {0}: {1}")]
    Answer(SocketAddr, String),
}

/// See the module.
#[derive(Debug)]
pub struct Arbiter {
    address: SocketAddr,
    vm_id: VmId,
    owner: OwnerId,
    link: Option<(TcpStream, OwnerAnswers)>,
    /// What is competed with, and since when the question has been out (`None`: not asked on this connection).
    competing: Option<(Epoch, Option<Instant>)>,
    not_before: Option<Instant>,
    /// Why there is no verdict yet, since it was last taken.
    trouble: Option<String>,
}

impl Arbiter {
    /// Nothing is asked or connected yet.
    pub fn new(address: SocketAddr, vm_id: u64, owner: OwnerId) -> Arbiter {
        Arbiter { address, vm_id: VmId(vm_id), owner, link: None, competing: None, not_before: None, trouble: None }
    }

    /// Whose record it is.
    pub(super) fn vm_id(&self) -> u64 {
        self.vm_id.0
    }

    /// Reads the record; waits for the answer. The connection stays for the compare-and-swap.
    pub fn record(&mut self) -> Result<Record, ArbiterError> {
        let mut last = ArbiterError::Io(self.address, ErrorKind::NotConnected.into());
        for _ in 0..RECORD_ATTEMPTS {
            match self.look() {
                Ok(record) => return Ok(record),
                Err(e) => {
                    last = e;
                    std::thread::sleep(RETRY);
                }
            }
        }
        Err(last)
    }

    /// The same, asked once.
    pub(super) fn look(&mut self) -> Result<Record, ArbiterError> {
        let question = owner_get(self.vm_id).map_err(|e| ArbiterError::Wire(self.address, e))?;
        match self.heard(&question)? {
            OwnerAnswer::Record(r) => Ok(Record { epoch: Epoch(r.epoch.0), owner: OwnerId(r.owner.0) }),
            other => Err(ArbiterError::Answer(self.address, format!("unexpected {other:?}"))),
        }
    }

    /// Sees to it that the VM, whose guest holds no epoch, has a record of this process's; waits for the answer. Gives the epoch.
    ///
    /// A compare-and-swap from epoch 0 must not be what decides about a port: after a release a late one wins as if it were the first.
    /// This one says nothing about who runs the VM but that it is this process, which does.
    pub fn take(&mut self) -> Result<Epoch, ArbiterError> {
        let question = owner_cas(self.vm_id, CfEpoch::UNCLAIMED, Owner(self.owner.0))
            .map_err(|e| ArbiterError::Wire(self.address, e))?;
        UNHEARD.fetch_add(1, Ordering::Relaxed);
        let answer = self.answered(&question);
        match &answer {
            Ok(_) => _ = UNHEARD.fetch_sub(1, Ordering::Relaxed),
            Err(_) => self.link = None,
        }
        match answer? {
            OwnerAnswer::Cas(CasStatus::Won, r) => Ok(Epoch(r.epoch.0)),
            // Won with a port, and the guest has no place to keep it in.
            OwnerAnswer::Cas(CasStatus::Lost, r) if r.owner.0 == self.owner.0 => Ok(Epoch(r.epoch.0)),
            OwnerAnswer::Cas(CasStatus::Lost, r) => {
                let text = format!("the VM is another process's, at epoch {}", r.epoch.0);
                Err(ArbiterError::Answer(self.address, text))
            }
            OwnerAnswer::Cas(CasStatus::Unknown, _) => Err(ArbiterError::Undecided(self.address)),
            other => Err(ArbiterError::Answer(self.address, format!("unexpected {other:?}"))),
        }
    }

    /// Names the heir at this epoch (`None`: this process, being the heir, renounces); waits for the answer. The
    /// compare-and-swap of a named heir does not wait for the arbiter's disk. False if the arbiter will not have it.
    pub fn name(&mut self, epoch: Epoch, heir: Option<OwnerId>) -> Result<bool, ArbiterError> {
        let heir = Owner(heir.unwrap_or_default().0);
        let question = owner_reserve(self.vm_id, CfEpoch(epoch.0), Owner(self.owner.0), heir)
            .map_err(|e| ArbiterError::Wire(self.address, e))?;
        match self.heard(&question)? {
            OwnerAnswer::Cas(CasStatus::Unknown, _) => Err(ArbiterError::Undecided(self.address)),
            OwnerAnswer::Cas(CasStatus::Refused, _) => Err(ArbiterError::Full(self.address)),
            OwnerAnswer::Goodbye(Farewell::Protocol) => Err(ArbiterError::NoHeirs(self.address)),
            OwnerAnswer::Goodbye(reason) => Err(ArbiterError::Answer(self.address, format!("goodbye: {reason:?}"))),
            answer => Ok(matches!(answer, OwnerAnswer::Cas(CasStatus::Won, _))),
        }
    }

    /// Asks for the epoch behind this one, which this process has won and will not run with, in the name of its former owner; waits for the
    /// answer. False if it is not to be had: the record has gone on.
    pub(super) fn give_back(&mut self, epoch: Epoch, owner: OwnerId) -> Result<bool, ArbiterError> {
        let question =
            owner_cas(self.vm_id, CfEpoch(epoch.0), Owner(owner.0)).map_err(|e| ArbiterError::Wire(self.address, e))?;
        match self.heard(&question)? {
            OwnerAnswer::Cas(CasStatus::Unknown, _) => Err(ArbiterError::Undecided(self.address)),
            OwnerAnswer::Cas(status, _) => Ok(status == CasStatus::Won),
            other => Err(ArbiterError::Answer(self.address, format!("unexpected {other:?}"))),
        }
    }

    /// Says at this epoch, as its owner, that the VM has ended for good; waits for the answer. False if the arbiter will not have
    /// it: somebody else has the VM, or may have it.
    pub fn release(&mut self, epoch: Epoch) -> Result<bool, ArbiterError> {
        let question = owner_release(self.vm_id, CfEpoch(epoch.0), Owner(self.owner.0))
            .map_err(|e| ArbiterError::Wire(self.address, e))?;
        let answer = self.answered(&question);
        self.link = None;
        Ok(matches!(answer?, OwnerAnswer::Cas(CasStatus::Won, _)))
    }

    /// As [`Self::answered`]; behind a question without an answer the next one has a connection of its own.
    fn heard(&mut self, question: &[u8]) -> Result<OwnerAnswer, ArbiterError> {
        let answer = self.answered(question);
        if matches!(answer, Err(_) | Ok(OwnerAnswer::Goodbye(_))) {
            self.link = None;
        }
        answer
    }

    /// Asks once and waits for the answer.
    fn answered(&mut self, question: &[u8]) -> Result<OwnerAnswer, ArbiterError> {
        self.connect()?;
        self.put(question)?;
        let deadline = Instant::now() + faults::limit(ANSWER_MAX);
        loop {
            if let Some(answer) = self.answer()? {
                return Ok(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ArbiterError::Io(self.address, ErrorKind::TimedOut.into()));
            }
            if let Some(fd) = self.descriptor() {
                let _ = wait(&[(fd, Interest::Read)], Some(left));
            }
        }
    }

    /// Competes with this expected epoch from now on, in place of an earlier one.
    pub fn compete(&mut self, expected: Epoch) {
        if self.competing.is_some_and(|(_, asked)| asked.is_some()) {
            // The answer to the former question may still come: not on a new connection.
            self.link = None;
        }
        self.competing = Some((expected, None));
        self.not_before = None;
        let _ = self.ask();
    }

    /// Competes no more.
    pub fn withdraw(&mut self) {
        self.competing = None;
        self.link = None;
    }

    /// What is competed with at present.
    pub fn competing(&self) -> Option<Epoch> {
        self.competing.map(|(expected, _)| expected)
    }

    /// The verdict, if it is there. Asks again where that is due; does not wait, but for a new connection.
    pub fn poll(&mut self) -> Option<(Epoch, Verdict)> {
        let (expected, asked) = self.competing?;
        let result = match asked {
            Some(since) if since.elapsed() < faults::limit(ANSWER_MAX) => self.answer(),
            Some(_) => Err(ArbiterError::Io(self.address, ErrorKind::TimedOut.into())),
            None if self.not_before.is_none_or(|t| Instant::now() >= t) => self.ask().map(|()| None),
            None => Ok(None),
        };
        if expected == Epoch(0) && matches!(result, Ok(Some(_))) {
            UNHEARD.fetch_sub(1, Ordering::Relaxed);
        }
        let verdict = match result {
            Ok(None) => return None,
            Ok(Some(OwnerAnswer::Cas(CasStatus::Won, r))) => Verdict::Won(Epoch(r.epoch.0)),
            Ok(Some(OwnerAnswer::Cas(CasStatus::Lost, r))) => {
                Verdict::Lost(Record { epoch: Epoch(r.epoch.0), owner: OwnerId(r.owner.0) })
            }
            Ok(Some(OwnerAnswer::Cas(CasStatus::Behind, r))) if UNHEARD.load(Ordering::Relaxed) == 0 => {
                Verdict::Behind(Epoch(r.epoch.0))
            }
            Ok(Some(OwnerAnswer::Cas(CasStatus::Behind, r))) => {
                Verdict::Lost(Record { epoch: Epoch(r.epoch.0), owner: OwnerId(r.owner.0) })
            }
            Ok(Some(OwnerAnswer::Cas(CasStatus::Unknown, _))) => {
                self.retry(&ArbiterError::Undecided(self.address));
                return None;
            }
            Ok(Some(other)) => {
                self.retry(&ArbiterError::Answer(self.address, format!("unexpected {other:?}")));
                return None;
            }
            Err(e) => {
                self.retry(&e);
                return None;
            }
        };
        self.competing = None;
        Some((expected, verdict))
    }

    /// Why there is no verdict yet, if that is known and was not told before.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    fn retry(&mut self, why: &ArbiterError) {
        log::warn!("{why}; asking again");
        self.trouble = Some(why.to_string());
        self.link = None;
        self.not_before = Some(Instant::now() + RETRY);
        if let Some((_, asked)) = &mut self.competing {
            *asked = None;
        }
    }

    /// The descriptor to wait for, if there is a connection.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.link.as_ref().map(|(s, _)| s.as_raw_fd())
    }

    fn ask(&mut self) -> Result<(), ArbiterError> {
        let Some((expected, _)) = self.competing else { return Ok(()) };
        let question = owner_cas(self.vm_id, CfEpoch(expected.0), Owner(self.owner.0))
            .map_err(|e| ArbiterError::Wire(self.address, e))?;
        self.connect()?;
        if expected == Epoch(0) {
            UNHEARD.fetch_add(1, Ordering::Relaxed);
        }
        self.put(&question)?;
        self.competing = Some((expected, Some(Instant::now())));
        Ok(())
    }

    fn connect(&mut self) -> Result<(), ArbiterError> {
        if self.link.is_none() {
            let io = |e| ArbiterError::Io(self.address, e);
            let socket = TcpStream::connect_timeout(&self.address, faults::limit(CONNECT_MAX)).map_err(io)?;
            socket.set_nodelay(true).map_err(io)?;
            socket.set_nonblocking(true).map_err(io)?;
            self.link = Some((socket, OwnerAnswers::new()));
        }
        Ok(())
    }

    /// A question is far smaller than an empty socket buffer.
    fn put(&mut self, question: &[u8]) -> Result<(), ArbiterError> {
        let Some((socket, _)) = &mut self.link else { return Ok(()) };
        socket.write_all(question).map_err(|e| ArbiterError::Io(self.address, e))
    }

    fn answer(&mut self) -> Result<Option<OwnerAnswer>, ArbiterError> {
        let Some((socket, answers)) = &mut self.link else { return Ok(None) };
        let mut buffer = [0; 512];
        match socket.read(&mut buffer) {
            Ok(0) => Err(ArbiterError::Io(self.address, ErrorKind::UnexpectedEof.into())),
            // One question is out at a time, so nothing follows its answer.
            Ok(n) => answers.push(&mut &buffer[..n]).map_err(|e| ArbiterError::Wire(self.address, e)),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(ArbiterError::Io(self.address, e)),
        }
    }
}
