//! MOUNT version 3 (RFC 1813, appendix I): from a path to the handle of a directory.
//!
//! The mount list is for showmount only: nothing depends on it, it is bounded ([`MOUNTS_MAX`], the oldest entry goes)
//! and does not survive a restart.
use crate::engine::{Engine, Peer};
use crate::export;
use crate::handle;
use crate::rpc::{Rejection, flavor};
use crate::service::{FileService, Unreachable};
use crate::xdr::{Reader, Writer};
use alloc::{collections::VecDeque, string::ToString, vec::Vec};
use core::net::IpAddr;
use fabric::fs::{Credential, FileHandle, FileKind, NAME_MAX, Status};
use fabric::op::{Op, Reply as Primitive};

/// Program number.
pub const PROGRAM: u32 = 100_005;
/// Version.
pub const VERSION: u32 = 3;
/// Longest path to mount (RFC 1813, MNTPATHLEN).
pub const PATH_MAX: usize = 1024;
/// Most entries of the mount list.
pub const MOUNTS_MAX: usize = 128;

/// Procedure that lists mounts; EXPORT, after it, lists exports.
pub(crate) const DUMP: u32 = 2;
/// Most bytes of such a list.
pub(crate) const LIST_MAX: usize = MOUNTS_MAX * (PATH_MAX + 64);

/// Why a mount failed (mountstat3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum MountStatus {
    NoEntry = 2,
    Io = 5,
    Access = 13,
    NotDirectory = 20,
    Invalid = 22,
    NameTooLong = 63,
    ServerFault = 10006,
}

impl From<Status> for MountStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::NotFound | Status::Stale | Status::NoVolume => MountStatus::NoEntry,
            Status::Io => MountStatus::Io,
            Status::Access | Status::NotPermitted => MountStatus::Access,
            Status::NotDirectory => MountStatus::NotDirectory,
            Status::Invalid => MountStatus::Invalid,
            Status::NameTooLong => MountStatus::NameTooLong,
            _ => MountStatus::ServerFault,
        }
    }
}

/// Who has mounted what, as far as is known.
#[derive(Debug, Default)]
pub struct MountList {
    mounts: VecDeque<(IpAddr, Vec<u8>)>,
}

impl MountList {
    fn add(&mut self, client: IpAddr, path: &[u8]) {
        self.remove(client, Some(path));
        if self.mounts.len() >= MOUNTS_MAX {
            self.mounts.pop_front();
        }
        self.mounts.push_back((client, path.to_vec()));
    }

    /// Removes one mount of a client, or all of them.
    fn remove(&mut self, client: IpAddr, path: Option<&[u8]>) {
        self.mounts.retain(|(by, what)| *by != client || path.is_some_and(|path| path != what));
    }
}

/// Executes one call; its results go to `out`.
pub(crate) async fn call<S: FileService>(
    engine: &Engine<S>,
    peer: Peer,
    version: u32,
    procedure: u32,
    arguments: &mut Reader<'_>,
    out: &mut Writer,
) -> Result<Result<(), Unreachable>, Rejection> {
    if version != VERSION {
        return Err(Rejection::ProgramMismatch { low: VERSION, high: VERSION });
    }
    let client = peer.client.ip();
    match procedure {
        0 => {}
        1 => {
            let path = arguments.opaque(PATH_MAX)?;
            let mounted = if engine.access().allows_port(peer.client.port()) {
                match resolve(engine, path).await {
                    Ok(mounted) => mounted,
                    Err(unreachable) => return Ok(Err(unreachable)),
                }
            } else {
                Err(MountStatus::Access)
            };
            match mounted {
                Ok(directory) => {
                    engine.mounts().add(client, path);
                    out.u32(0).opaque(&handle::encode(directory)).u32(1).u32(flavor::SYS);
                }
                Err(status) => {
                    out.u32(status as u32);
                }
            }
        }
        DUMP => {
            for (client, path) in &engine.mounts().mounts {
                out.bool(true).opaque(client.to_string().as_bytes()).opaque(path);
            }
            out.bool(false);
        }
        3 => {
            let path = arguments.opaque(PATH_MAX)?;
            engine.mounts().remove(client, Some(path));
        }
        4 => engine.mounts().remove(client, None),
        5 => {
            for export in engine.exports() {
                out.bool(true).opaque(export.path.as_bytes()).bool(false);
            }
            out.bool(false);
        }
        _ => return Err(Rejection::ProcedureUnavailable),
    }
    Ok(Ok(()))
}

/// The directory a path names. Walks as root, as mounting is the server's decision; follows no symbolic link and never
/// leaves the export.
async fn resolve<S: FileService>(
    engine: &Engine<S>,
    path: &[u8],
) -> Result<Result<FileHandle, MountStatus>, Unreachable> {
    if path.contains(&0) {
        return Ok(Err(MountStatus::Invalid));
    }
    let Some((export, names)) = export::find(engine.exports(), path) else { return Ok(Err(MountStatus::NoEntry)) };
    if names.contains(&b"..".as_slice()) {
        return Ok(Err(MountStatus::Access));
    }
    if names.iter().any(|name| name.len() > NAME_MAX) {
        return Ok(Err(MountStatus::NameTooLong));
    }
    let mut directory = match engine.root(export).await? {
        Ok(root) => root,
        Err(status) => return Ok(Err(status.into())),
    };
    for name in names {
        let lookup = Op::Lookup { dir: directory, name: name.to_vec() };
        directory = match engine.service().call(Credential::ROOT, lookup).await? {
            Ok(Primitive::Node { attr, .. }) if attr.kind == FileKind::Directory => attr.handle,
            Ok(Primitive::Node { .. }) => return Ok(Err(MountStatus::NotDirectory)),
            Ok(_) => return Ok(Err(MountStatus::ServerFault)),
            Err(failure) => return Ok(Err(failure.status.into())),
        };
    }
    Ok(Ok(directory))
}
