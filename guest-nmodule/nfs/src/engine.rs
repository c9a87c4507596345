//! The engine: one record in, at most one reply out.
//!
//! Owns: the dispatch of programs and procedures, the duplicate-request cache, the mount list, and the roots of the
//! exports once they are known. Always true: no borrow of shared state is held across an await; a call that is
//! dropped while it waits leaves the duplicate-request cache as if it had never come.
use crate::duplicate::{DuplicateCache, Key, Seen};
use crate::export::{self, Access, Export};
use crate::mount::{self, MountList};
use crate::nfs3::{self, NfsStatus, Procedure, arguments, results};
use crate::portmap::{self, Mapping, Transport};
use crate::record::{Record, Reply};
use crate::rpc::{self, AuthStat, Call, Rejection, Xid};
use crate::service::{FileService, Unreachable};
use crate::xdr::Reader;
use alloc::{vec, vec::Vec};
use core::cell::{RefCell, RefMut};
use core::net::{IpAddr, SocketAddr};
use fabric::fs::{Credential, FileHandle, Status, VolumeId};
use fabric::op::{Failure, Op, Outcome, Reply as Primitive};

/// Room a reply's head is given; every reply without a listing fits.
const HEAD: usize = 512;

/// What an engine serves.
#[derive(Clone, Debug)]
pub struct Config {
    /// What may be mounted.
    pub exports: Vec<Export>,
    /// By whom.
    pub access: Access,
    /// What portmap tells; see [`mappings`].
    pub mappings: Vec<Mapping>,
    /// Bounds of the volumes.
    pub capacity: results::Capacity,
}

/// The registrations of a server with portmap on `portmap`, NFS and MOUNT on the given TCP ports.
pub fn mappings(portmap: u16, portmap_udp: bool, nfs: u16, mount: u16) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    for version in portmap::VERSIONS.0..=portmap::VERSIONS.1 {
        let mapping = |transport| Mapping { program: portmap::PROGRAM, version, transport, port: portmap };
        mappings.push(mapping(Transport::Tcp));
        if portmap_udp {
            mappings.push(mapping(Transport::Udp));
        }
    }
    let tcp = |program, version, port| Mapping { program, version, transport: Transport::Tcp, port };
    mappings.push(tcp(nfs3::PROGRAM, nfs3::VERSION, nfs));
    mappings.push(tcp(mount::PROGRAM, mount::VERSION, mount));
    mappings
}

/// The two ends of a connection or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The client.
    pub client: SocketAddr,
    /// The server's address as the client knows it.
    pub local: IpAddr,
}

/// NFS, MOUNT and portmap over a file service.
#[derive(Debug)]
pub struct Engine<S> {
    service: S,
    config: Config,
    duplicates: RefCell<DuplicateCache>,
    mounts: RefCell<MountList>,
    /// Root of each export, once known.
    roots: RefCell<Vec<Option<FileHandle>>>,
}

impl<S: FileService> Engine<S> {
    /// An engine over `service`.
    pub fn new(service: S, config: Config) -> Self {
        let roots = RefCell::new(vec![None; config.exports.len()]);
        Engine { service, config, duplicates: RefCell::default(), mounts: RefCell::default(), roots }
    }

    /// Answers one record of a connection; `None`: there is no reply to it. Calls may be handled at the same time and
    /// finish in any order.
    pub async fn handle(&self, peer: Peer, record: Record) -> Option<Reply> {
        let Record { head, bulk } = record;
        let mut reader = Reader::new(&head);
        let call = match Call::decode(&mut reader) {
            Ok(call) => call,
            Err(bad) => return rpc::refuse(bad),
        };
        let xid = call.xid;
        let answered = match call.program {
            nfs3::PROGRAM => self.nfs(peer, call, &head, reader, bulk).await,
            _ if bulk.is_some() => Err(Rejection::GarbageArguments),
            mount::PROGRAM => self.mount(peer, call, reader).await,
            _ => self.portmap(peer, call, reader).map(Some),
        };
        answered.unwrap_or_else(|rejection| Some(rpc::rejected(xid, rejection)))
    }

    /// Answers one datagram: portmap only.
    pub fn handle_datagram(&self, peer: Peer, datagram: &[u8]) -> Option<Reply> {
        let mut reader = Reader::new(datagram);
        match Call::decode(&mut reader) {
            Ok(call) => {
                let xid = call.xid;
                Some(self.portmap(peer, call, reader).unwrap_or_else(|rejection| rpc::rejected(xid, rejection)))
            }
            Err(bad) => rpc::refuse(bad),
        }
    }

    fn portmap(&self, peer: Peer, call: Call, mut reader: Reader<'_>) -> Result<Reply, Rejection> {
        if call.program != portmap::PROGRAM {
            return Err(Rejection::ProgramUnavailable);
        }
        let mut out = rpc::success(call.xid, HEAD);
        portmap::call(&self.config.mappings, peer.local, call.version, call.procedure, &mut reader, &mut out)?;
        Ok(Reply::new(out.into_bytes(), Vec::new()))
    }

    async fn mount(&self, peer: Peer, call: Call, mut reader: Reader<'_>) -> Result<Option<Reply>, Rejection> {
        let mut out = rpc::success(call.xid, HEAD);
        let done = mount::call(self, peer, call.version, call.procedure, &mut reader, &mut out).await?;
        Ok(done.ok().map(|()| Reply::new(out.into_bytes(), Vec::new())))
    }

    async fn nfs(
        &self,
        peer: Peer,
        call: Call,
        head: &[u8],
        mut reader: Reader<'_>,
        bulk: Option<Vec<u8>>,
    ) -> Result<Option<Reply>, Rejection> {
        if call.version != nfs3::VERSION {
            return Err(Rejection::ProgramMismatch { low: nfs3::VERSION, high: nfs3::VERSION });
        }
        let procedure = Procedure::from_number(call.procedure).ok_or(Rejection::ProcedureUnavailable)?;
        if procedure == Procedure::Null {
            return Ok(Some(Reply::new(rpc::success(call.xid, HEAD).into_bytes(), Vec::new())));
        }
        if !self.config.access.allows_port(peer.client.port()) {
            return Ok(Some(rpc::auth_error(call.xid, AuthStat::TooWeak)));
        }
        let plan = arguments::decode(procedure, &mut reader, bulk)?;
        if !procedure.is_non_idempotent() {
            return Ok(self.execute(call.xid, procedure, plan, self.config.access.credential(call.auth)).await.ok());
        }
        let key = Key::new(peer.client, &call, head);
        let seen = self.duplicates.borrow_mut().begin(key);
        let mut watch = match seen {
            Seen::New => Some(Watch { cache: &self.duplicates, key: Some(key) }),
            Seen::Unwatched => None,
            Seen::InProgress => return Ok(None),
            Seen::Done(reply) => return Ok(Some(Reply::new(reply, Vec::new()))),
        };
        let credential = self.config.access.credential(call.auth);
        let Ok(reply) = self.execute(call.xid, procedure, plan, credential).await else { return Ok(None) };
        if let Some(watch) = &mut watch {
            watch.finish(reply.slices()[0]);
        }
        Ok(Some(reply))
    }

    async fn execute(
        &self,
        xid: Xid,
        procedure: Procedure,
        plan: arguments::Plan,
        credential: Credential,
    ) -> Result<Reply, Unreachable> {
        let outcome = match plan.op {
            Ok(op) if self.is_exported(target(&op)).await? => Ok(self.primitive(credential, op).await?),
            Ok(_) => Err(NfsStatus::Stale),
            Err(status) => Err(status),
        };
        let capacity = match plan.limits {
            arguments::Limits::None => HEAD,
            arguments::Limits::ReadDir { count: max } | arguments::Limits::ReadDirPlus { maxcount: max, .. } => {
                HEAD + max as usize
            }
        };
        let mut out = rpc::success(xid, if matches!(outcome, Ok(Ok(_))) { capacity } else { HEAD });
        let bulk = results::encode(procedure, plan.limits, &self.config.capacity, outcome, &mut out);
        Ok(Reply::new(out.into_bytes(), bulk))
    }

    async fn primitive(&self, credential: Credential, op: Op) -> Result<Outcome, Unreachable> {
        let object = target(&op);
        let outcome = self.service.call(credential, op).await?;
        if let Err(Failure { status: Status::Stale | Status::NoVolume, .. }) = outcome {
            // The volume was made anew: its root is another one now.
            for root in self.roots.borrow_mut().iter_mut().filter(|root| root.is_some_and(|root| Some(root) == object))
            {
                *root = None;
            }
        }
        Ok(outcome)
    }

    /// Whether an object lies in an exported volume.
    async fn is_exported(&self, object: Option<FileHandle>) -> Result<bool, Unreachable> {
        let Some(FileHandle { volume, .. }) = object else { return Ok(false) };
        if self.has_root_of(volume) {
            return Ok(true);
        }
        for export in 0..self.config.exports.len() {
            // A volume that cannot be opened now exports nothing now.
            let _ = self.root(export).await?;
        }
        Ok(self.has_root_of(volume))
    }

    fn has_root_of(&self, volume: VolumeId) -> bool {
        self.roots.borrow().iter().flatten().any(|root| root.volume == volume)
    }

    /// Root of an export.
    pub(crate) async fn root(&self, export: usize) -> Result<Result<FileHandle, Status>, Unreachable> {
        if let Some(root) = self.roots.borrow()[export] {
            return Ok(Ok(root));
        }
        let open = Op::OpenVolume { name: self.config.exports[export].volume.clone() };
        Ok(match self.service.call(Credential::ROOT, open).await? {
            Ok(Primitive::Node { attr, .. }) => {
                self.roots.borrow_mut()[export] = Some(attr.handle);
                Ok(attr.handle)
            }
            Ok(_) => Err(Status::ServerFault),
            Err(failure) => Err(failure.status),
        })
    }

    pub(crate) fn mounts(&self) -> RefMut<'_, MountList> {
        self.mounts.borrow_mut()
    }

    /// What may be mounted.
    pub fn exports(&self) -> &[Export] {
        &self.config.exports
    }

    pub(crate) fn access(&self) -> &export::Access {
        &self.config.access
    }

    /// The file service behind.
    pub fn service(&self) -> &S {
        &self.service
    }
}

/// Keeps a call entered in the duplicate-request cache until its reply is known; dropped before, takes it out again.
struct Watch<'a> {
    cache: &'a RefCell<DuplicateCache>,
    key: Option<Key>,
}

impl Watch<'_> {
    fn finish(&mut self, reply: &[u8]) {
        if let Some(key) = self.key.take() {
            self.cache.borrow_mut().finish(key, Some(reply));
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.cache.borrow_mut().finish(key, None);
        }
    }
}

/// The object or directory an operation is about.
fn target(op: &Op) -> Option<FileHandle> {
    match op {
        Op::OpenVolume { .. } => None,
        Op::GetAttr { handle }
        | Op::SetAttr { handle, .. }
        | Op::Access { handle, .. }
        | Op::ReadLink { handle }
        | Op::Read { handle, .. }
        | Op::Write { handle, .. }
        | Op::Link { handle, .. }
        | Op::VolumeStat { handle }
        | Op::Commit { handle, .. } => Some(*handle),
        Op::Lookup { dir, .. }
        | Op::Create { dir, .. }
        | Op::MakeDir { dir, .. }
        | Op::Symlink { dir, .. }
        | Op::MakeNode { dir, .. }
        | Op::Remove { dir, .. }
        | Op::RemoveDir { dir, .. }
        | Op::Rename { from_dir: dir, .. }
        | Op::ReadDir { dir, .. } => Some(*dir),
    }
}
