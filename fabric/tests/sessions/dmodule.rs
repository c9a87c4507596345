//! The D-module of the simulation: its volume, what is pending, the connections as it has them.

use super::Random;
use fabric::fs::*;
use fabric::id::*;
use fabric::op::*;
use fabric::owner::{OwnerChange, OwnerRecord, OwnerTable};
use fabric::server::{ConnectionId, KeepKey, KeptRead, Sessions, Token};
use fabric::wire::FrameReader;
use std::collections::{BTreeMap, VecDeque};

/// What a consistency point makes durable.
#[derive(Clone, Default)]
pub struct Volume {
    /// Name of each directory made, and the inode it got.
    pub made: Vec<(Vec<u8>, u64)>,
    pub registers: BTreeMap<u64, Vec<u8>>,
    pub kept: BTreeMap<(VmId, Slot), Vec<u8>>,
}

pub struct Pending {
    pub token: Token,
    pub request: Request,
    pub keep: Option<KeepKey>,
}

/// A connection as the D-module has it.
pub struct Inbox {
    pub bytes: VecDeque<u8>,
    pub reader: FrameReader,
    /// No more bytes will come.
    pub cut: bool,
}

pub struct DModule {
    pub sessions: Sessions,
    pub volume: Volume,
    pub durable: Volume,
    pub owners: OwnerTable,
    pub pending: Vec<Pending>,
    /// Executed, and answered after the next consistency point.
    pub waiting: Vec<(Token, Outcome)>,
    pub writing: Option<OwnerChange>,
    pub inboxes: BTreeMap<ConnectionId, Inbox>,
    pub boots: u64,
}

pub fn attr(inode: u64) -> Attr {
    Attr {
        handle: FileHandle { volume: VolumeId(0), generation: 0, inode },
        kind: FileKind::Directory,
        mode: 0o755,
        links: 2,
        uid: 0,
        gid: 0,
        size: 0,
        used: 0,
        rdev: (0, 0),
        atime: Time(0),
        mtime: Time(0),
        ctime: Time(0),
    }
}

pub fn root() -> FileHandle {
    attr(1).handle
}

/// A VM that comes and goes, and takes the only room there is for a session.
pub const STRANGER: VmId = VmId(0x99);

pub fn owners() -> OwnerTable {
    let record = OwnerRecord { vm_id: STRANGER, epoch: Epoch(1), session: Epoch(1), owner: Owner([9, 9]) };
    let mut owners = OwnerTable::default();
    owners.apply(&OwnerChange::Set(record, None));
    owners
}

impl DModule {
    pub fn new() -> Self {
        DModule {
            sessions: Sessions::new(BootId(1), owners(), 1),
            volume: Volume::default(),
            durable: Volume::default(),
            owners: owners(),
            pending: Vec::new(),
            waiting: Vec::new(),
            writing: None,
            inboxes: BTreeMap::new(),
            boots: 1,
        }
    }

    pub fn restart(&mut self, random: &mut Random) {
        if let Some(change) = self.writing.take_if(|_| random.one_in(2)) {
            self.owners.apply(&change); // it had reached the disk
        }
        self.boots += 1;
        self.volume = self.durable.clone();
        self.sessions = Sessions::new(BootId(self.boots), self.owners.clone(), 1);
        self.pending.clear();
        self.waiting.clear();
        self.writing = None;
        self.inboxes.clear();
    }

    pub fn read_kept(&mut self, read: KeptRead) {
        let of_vm = self.volume.kept.iter().filter(|((vm, _), _)| *vm == read.vm_id);
        let kept = of_vm.map(|((_, slot), bytes)| (*slot, bytes.clone())).collect();
        self.sessions.kept_read(read, Some(kept));
    }

    /// Executes one of the pending requests; whatever the sessions asked for is in effect at once or not at all.
    pub fn execute(&mut self, random: &mut Random) {
        if self.pending.is_empty() {
            return;
        }
        let Pending { token, request, keep } = self.pending.swap_remove(random.below(self.pending.len()));
        if !self.sessions.is_wanted(token) {
            return self.sessions.complete(token, Err(Status::Delay.into()));
        }
        let stable = request.op.is_stable();
        let outcome = match request.op {
            Op::MakeDir { name, .. } => {
                assert!(!name.starts_with(b"stale"), "a request of a stale epoch was executed");
                let inode = 100 + self.volume.made.len() as u64 + 1000 * self.boots;
                self.volume.made.push((name, inode));
                Ok(Reply::Created { attr: attr(inode), dir: Wcc::default() })
            }
            Op::Write { offset, data, stability, .. } => {
                let count = data.len() as u32;
                self.volume.registers.insert(offset, data);
                Ok(Reply::Written { count, stability, verifier: self.boots, wcc: Wcc::default() })
            }
            Op::Read { offset, .. } => {
                let data = self.volume.registers.get(&offset).cloned().unwrap_or_default();
                Ok(Reply::Data { data, eof: true, attr: attr(2) })
            }
            _ => Err(Status::NotSupported.into()),
        };
        if let Some(keep) = keep {
            self.volume.kept.insert((keep.vm_id, keep.slot), keep.encode(&outcome));
        }
        if stable {
            self.waiting.push((token, outcome));
        } else {
            self.sessions.complete(token, outcome);
        }
    }

    pub fn consistency_point(&mut self) {
        self.durable = self.volume.clone();
        for (token, outcome) in self.waiting.drain(..) {
            self.sessions.complete(token, outcome);
        }
    }

    /// Reads some of what has arrived on some connection.
    pub fn read(&mut self, random: &mut Random) {
        if self.inboxes.is_empty() {
            return;
        }
        let at = random.below(self.inboxes.len());
        let Some((id, inbox)) = self.inboxes.iter_mut().nth(at) else { return };
        let id = *id;
        let n = inbox.bytes.len().min(1 + random.below(2000));
        let piece: Vec<u8> = inbox.bytes.drain(..n).collect();
        let mut rest = &piece[..];
        while let Some(inbox) = self.inboxes.get_mut(&id)
            && let Some(frame) = inbox.reader.push(&mut rest).unwrap()
        {
            self.sessions.frame(id, frame);
        }
        if n == 0 && self.inboxes.get(&id).is_some_and(|i| i.cut) {
            self.inboxes.remove(&id);
            self.sessions.closed(id);
        }
    }
}
