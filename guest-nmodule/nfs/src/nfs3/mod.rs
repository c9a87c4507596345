//! NFS version 3 (RFC 1813): numbers and status; [`arguments`] turns calls into file-system primitives, [`results`]
//! turns their outcomes into replies.
use fabric::fs::Status;

pub mod arguments;
pub mod results;

/// Program number.
pub const PROGRAM: u32 = 100_003;
/// Version.
pub const VERSION: u32 = 3;
/// Well-known port.
pub const PORT: u16 = 2049;

/// Largest READ and WRITE.
pub const TRANSFER_MAX: u32 = fabric::fs::IO_MAX as u32;
/// Most bytes of a READDIR or READDIRPLUS reply, whatever the client would take: bounds what one call costs.
pub const DIRECTORY_MAX: u32 = 64 * 1024;
/// Cookie verifier of every directory: cookies stay valid for good, so it only tells the cookie format.
pub const COOKIE_VERIFIER: [u8; 8] = *b"ORcookie";

/// Procedures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum Procedure {
    Null = 0,
    GetAttr = 1,
    SetAttr = 2,
    Lookup = 3,
    Access = 4,
    ReadLink = 5,
    Read = 6,
    Write = 7,
    Create = 8,
    MakeDir = 9,
    Symlink = 10,
    MakeNode = 11,
    Remove = 12,
    RemoveDir = 13,
    Rename = 14,
    Link = 15,
    ReadDir = 16,
    ReadDirPlus = 17,
    FsStat = 18,
    FsInfo = 19,
    PathConf = 20,
    Commit = 21,
}

impl Procedure {
    /// All, by number.
    pub const ALL: [Procedure; 22] = [
        Procedure::Null,
        Procedure::GetAttr,
        Procedure::SetAttr,
        Procedure::Lookup,
        Procedure::Access,
        Procedure::ReadLink,
        Procedure::Read,
        Procedure::Write,
        Procedure::Create,
        Procedure::MakeDir,
        Procedure::Symlink,
        Procedure::MakeNode,
        Procedure::Remove,
        Procedure::RemoveDir,
        Procedure::Rename,
        Procedure::Link,
        Procedure::ReadDir,
        Procedure::ReadDirPlus,
        Procedure::FsStat,
        Procedure::FsInfo,
        Procedure::PathConf,
        Procedure::Commit,
    ];

    /// The procedure of a number.
    pub fn from_number(number: u32) -> Option<Procedure> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Whether a second execution may give another result: its reply is kept for duplicates.
    pub fn is_non_idempotent(self) -> bool {
        use Procedure::*;
        matches!(self, SetAttr | Create | MakeDir | Symlink | MakeNode | Remove | RemoveDir | Rename | Link)
    }
}

/// Status of a procedure (nfsstat3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum NfsStatus {
    Ok = 0,
    Permission = 1,
    NoEntry = 2,
    Io = 5,
    Access = 13,
    Exists = 17,
    CrossDevice = 18,
    NotDirectory = 20,
    IsDirectory = 21,
    Invalid = 22,
    FileTooBig = 27,
    NoSpace = 28,
    TooManyLinks = 31,
    NameTooLong = 63,
    NotEmpty = 66,
    Stale = 70,
    BadHandle = 10001,
    NotSync = 10002,
    BadCookie = 10003,
    NotSupported = 10004,
    TooSmall = 10005,
    ServerFault = 10006,
    BadType = 10007,
    Jukebox = 10008,
}

impl NfsStatus {
    /// How a refusal of `procedure` by the file service is told to an NFS client.
    pub fn of(procedure: Procedure, status: Status) -> NfsStatus {
        use Procedure::*;
        match status {
            Status::NotPermitted => NfsStatus::Permission,
            Status::NotFound => NfsStatus::NoEntry,
            Status::Io => NfsStatus::Io,
            Status::Access => NfsStatus::Access,
            Status::Exists => NfsStatus::Exists,
            Status::CrossVolume => NfsStatus::CrossDevice,
            Status::NotDirectory => NfsStatus::NotDirectory,
            // RFC 1813, 3.3.6 and 3.3.7: a file that is not regular is INVAL.
            Status::IsDirectory if matches!(procedure, Read | Write | Commit | SetAttr) => NfsStatus::Invalid,
            Status::IsDirectory => NfsStatus::IsDirectory,
            Status::Invalid => NfsStatus::Invalid,
            Status::TooLarge => NfsStatus::FileTooBig,
            Status::NoSpace => NfsStatus::NoSpace,
            Status::TooManyLinks => NfsStatus::TooManyLinks,
            Status::NameTooLong => NfsStatus::NameTooLong,
            Status::NotEmpty => NfsStatus::NotEmpty,
            Status::Stale | Status::NoVolume => NfsStatus::Stale,
            Status::BadCookie => NfsStatus::BadCookie,
            Status::NotSync => NfsStatus::NotSync,
            Status::NotSupported => NfsStatus::NotSupported,
            Status::Delay => NfsStatus::Jukebox,
            Status::ServerFault => NfsStatus::ServerFault,
        }
    }
}
