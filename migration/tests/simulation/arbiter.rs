//! The D-module: the real sessions and ownership records of the `fabric` crate, on a disk that is written late.

use std::collections::{BTreeMap, BTreeSet};

use fabric::fs::{Attr, FileHandle, FileKind, Time, VolumeId, Wcc};
use fabric::id::{BootId, Epoch, Slot, VmId};
use fabric::op::{Op, Reply};
use fabric::owner::{OwnerChange, OwnerTable};
use fabric::server::{Action, ConnectionId, Sessions};
use fabric::wire::{CasStatus, Frame, FrameReader};

pub const VM: VmId = VmId(7);

/// See the module.
pub struct Dmodule {
    sessions: Sessions,
    durable: OwnerTable,
    kept: BTreeMap<Slot, Vec<u8>>,
    /// On its way to the disk.
    pub writing: Option<OwnerChange>,
    boots: u64,
    /// Sequence of each request executed.
    pub executed: BTreeSet<u64>,
    /// Newest epoch anybody was told that it has.
    given: Epoch,
}

impl Dmodule {
    pub fn new() -> Dmodule {
        Dmodule {
            sessions: Sessions::new(BootId(1), OwnerTable::default(), 4),
            durable: OwnerTable::default(),
            kept: BTreeMap::new(),
            writing: None,
            boots: 1,
            executed: BTreeSet::new(),
            given: Epoch(0),
        }
    }

    /// A frame has come; what goes back, and where to.
    pub fn frame(&mut self, connection: u64, frame: Frame) -> Vec<(u64, Frame)> {
        self.sessions.frame(ConnectionId(connection), frame);
        self.work()
    }

    /// The disk has what was on its way.
    pub fn written(&mut self) -> Vec<(u64, Frame)> {
        let Some(change) = self.writing.take() else { return Vec::new() };
        self.durable.apply(&change);
        self.sessions.owners_written(true);
        self.work()
    }

    /// A crash and a new start; connections end. `reached`: what was on its way had reached the disk.
    pub fn restart(&mut self, reached: bool) {
        if let Some(change) = self.writing.take().filter(|_| reached) {
            self.durable.apply(&change);
        }
        self.boots += 1;
        self.sessions = Sessions::new(BootId(self.boots), self.durable.clone(), 4);
    }

    fn work(&mut self) -> Vec<(u64, Frame)> {
        let mut out = Vec::new();
        while let Some(action) = self.sessions.poll_action() {
            match action {
                Action::Send(connection, encoded) => {
                    let bytes = encoded.into_vec();
                    let frame = FrameReader::default().push(&mut &bytes[..]).unwrap().unwrap();
                    if let Frame::OwnerCasResult { status: CasStatus::Won, record } = &frame {
                        self.given = self.given.max(record.epoch);
                    }
                    out.push((connection.0, frame));
                }
                Action::Execute { token, request, keep } => {
                    let Op::MakeDir { name, .. } = &request.op else { panic!("{request:?}") };
                    let text = String::from_utf8(name.clone()).unwrap();
                    let (epoch, sequence) = text.split_once('.').unwrap();
                    let (epoch, sequence): (u64, u64) = (epoch.parse().unwrap(), sequence.parse().unwrap());
                    assert!(epoch >= self.given.0, "a request of epoch {epoch} after {} was given", self.given.0);
                    assert!(self.executed.insert(sequence), "request {sequence} is executed again");
                    let outcome = Ok(Reply::Created { attr: attr(sequence), dir: Wcc::default() });
                    let keep = keep.unwrap();
                    self.kept.insert(keep.slot, keep.encode(&outcome));
                    self.sessions.complete(token, outcome);
                }
                Action::WriteOwners(change) => self.writing = Some(change),
                Action::ReadKept(read) => {
                    let kept = self.kept.iter().map(|(slot, bytes)| (*slot, bytes.clone())).collect();
                    self.sessions.kept_read(read, Some(kept));
                }
                Action::Close(_) => {}
            }
        }
        out
    }
}

fn attr(inode: u64) -> Attr {
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
