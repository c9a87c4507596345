//! The vocabulary of file-system primitives: what the cluster fabric's operations speak of, and what
//! the data layout implements. Not NFS: any protocol engine can use it.
use alloc::vec::Vec;

/// Longest file name, in bytes.
pub const NAME_MAX: usize = 255;
/// Longest symbolic link target, in bytes.
pub const SYMLINK_MAX: usize = 1024;
/// Most supplementary groups in a credential (RFC 5531, AUTH_SYS).
pub const GROUPS_MAX: usize = 16;
/// Largest READ or WRITE payload, in bytes.
pub const IO_MAX: usize = 1 << 20;

/// A volume of a D-module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId(pub u32);

/// A file for good: inode numbers are used again, the generation tells a successor from the file meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileHandle {
    /// Volume.
    pub volume: VolumeId,
    /// Generation of the inode.
    pub generation: u32,
    /// Inode number.
    pub inode: u64,
}

/// Nanoseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time(pub i64);

/// Kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FileKind {
    /// Regular file.
    Regular = 1,
    /// Directory.
    Directory = 2,
    /// Symbolic link.
    Symlink = 3,
    /// Block device.
    BlockDevice = 4,
    /// Character device.
    CharDevice = 5,
    /// Named pipe.
    Fifo = 6,
    /// Unix socket.
    Socket = 7,
}

/// Attributes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The file.
    pub handle: FileHandle,
    /// Kind.
    pub kind: FileKind,
    /// Permission bits with set-uid, set-gid and sticky (0o7777).
    pub mode: u32,
    /// Hard links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of disk in use.
    pub used: u64,
    /// Device numbers (major, minor) of a device file.
    pub rdev: (u32, u32),
    /// Last access.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the content or of the attributes. Strictly grows with each change of the file.
    pub ctime: Time,
}

/// What a time attribute becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SetTime {
    /// Left as it is.
    #[default]
    Keep,
    /// The D-module's clock.
    ServerNow,
    /// A given time.
    To(Time),
}

/// Attributes to set; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size: truncates or extends with a hole.
    pub size: Option<u64>,
    /// Last access.
    pub atime: SetTime,
    /// Last change.
    pub mtime: SetTime,
}

/// On whose behalf an operation runs; the D-module checks permissions in the same step as the operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups, at most [`GROUPS_MAX`].
    pub groups: Vec<u32>,
}

impl Credential {
    /// uid 0, gid 0: passes every permission check.
    pub const ROOT: Credential = Credential { uid: 0, gid: 0, groups: Vec::new() };
}

/// When a write is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stability {
    /// May be lost in a crash of the D-module until a Commit; the write verifier then changes.
    Unstable = 0,
    /// Data and the metadata needed to find it are durable before the reply.
    DataSync = 1,
    /// Data and all metadata are durable before the reply.
    FileSync = 2,
}

/// How a regular file is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateHow {
    /// Use an existing file (and set its size if given), else create it.
    Unchecked(SetAttr),
    /// Fail with [`Status::Exists`] if there is one.
    Guarded(SetAttr),
    /// RFC 1813, 3.3.8: succeeds if the file does not exist or was created with the same verifier.
    Exclusive(u64),
}

/// Access bits asked for and granted (RFC 1813, 3.3.4).
pub mod access {
    /// Read data or list a directory.
    pub const READ: u32 = 0x01;
    /// Look up a name in a directory.
    pub const LOOKUP: u32 = 0x02;
    /// Rewrite existing data or entries.
    pub const MODIFY: u32 = 0x04;
    /// Add data or entries.
    pub const EXTEND: u32 = 0x08;
    /// Delete an entry of a directory.
    pub const DELETE: u32 = 0x10;
    /// Execute a file.
    pub const EXECUTE: u32 = 0x20;
}

/// Attributes of an object around an operation (RFC 1813, wcc_data).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wcc {
    /// Size, mtime and ctime just before.
    pub before: Option<(u64, Time, Time)>,
    /// Attributes just after.
    pub after: Option<Attr>,
}

/// An entry of a directory listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Cookie with which a listing continues behind this entry; stable while entries come and go.
    pub cookie: u64,
    /// Inode number.
    pub inode: u64,
    /// Name, at most [`NAME_MAX`] bytes, no NUL, no `/`.
    pub name: Vec<u8>,
    /// Attributes, if the listing asked for them.
    pub attr: Option<Attr>,
}

/// Usage of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeStat {
    /// Size in bytes.
    pub total_bytes: u64,
    /// Free bytes.
    pub free_bytes: u64,
    /// Most files.
    pub total_files: u64,
    /// Files that can still be created.
    pub free_files: u64,
}

/// Why an operation was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u16)]
pub enum Status {
    /// Not the owner.
    #[error("operation not permitted")]
    NotPermitted = 1,
    /// No such file.
    #[error("no such file or directory")]
    NotFound = 2,
    /// The disk failed.
    #[error("I/O error")]
    Io = 3,
    /// Permission bits forbid it.
    #[error("permission denied")]
    Access = 4,
    /// Name exists.
    #[error("file exists")]
    Exists = 5,
    /// Across volumes.
    #[error("cross-volume link")]
    CrossVolume = 6,
    /// Not a directory.
    #[error("not a directory")]
    NotDirectory = 7,
    /// Is a directory.
    #[error("is a directory")]
    IsDirectory = 8,
    /// Bad argument.
    #[error("invalid argument")]
    Invalid = 9,
    /// File would be too large.
    #[error("file too large")]
    TooLarge = 10,
    /// Volume full.
    #[error("no space left on the volume")]
    NoSpace = 11,
    /// Too many hard links.
    #[error("too many links")]
    TooManyLinks = 12,
    /// Name too long.
    #[error("name too long")]
    NameTooLong = 13,
    /// Directory not empty.
    #[error("directory not empty")]
    NotEmpty = 14,
    /// The file is gone.
    #[error("stale file handle")]
    Stale = 15,
    /// Directory cookie unknown.
    #[error("bad directory cookie")]
    BadCookie = 16,
    /// Guard of SetAttr did not match.
    #[error("update guard mismatch")]
    NotSync = 17,
    /// Unknown operation or one the D-module does not have.
    #[error("not supported")]
    NotSupported = 18,
    /// Busy; try again later.
    #[error("try again later")]
    Delay = 19,
    /// Inconsistency inside the D-module.
    #[error("server fault")]
    ServerFault = 20,
    /// No such volume.
    #[error("no such volume")]
    NoVolume = 21,
}
