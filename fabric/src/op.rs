//! The operations of the cluster fabric and their replies, as values; [`crate::wire`] puts them into bytes.
use crate::fs::{
    Attr, CreateHow, Credential, DirEntry, FileHandle, FileKind, SetAttr, Stability, Status, Time, VolumeStat, Wcc,
};
use alloc::{string::String, vec::Vec};

/// A file-system primitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Root directory of a volume by name → [`Reply::Node`].
    OpenVolume {
        /// Name of the volume.
        name: String,
    },
    /// Attributes → [`Reply::Attr`].
    GetAttr {
        /// Object.
        handle: FileHandle,
    },
    /// Set attributes → [`Reply::Wcc`].
    SetAttr {
        /// Object.
        handle: FileHandle,
        /// What to set.
        set: SetAttr,
        /// Refuse with [`Status::NotSync`] unless the object's ctime is this.
        guard: Option<Time>,
    },
    /// Find a name (also `.` and `..`) → [`Reply::Node`]; the failure's `wcc.after` has the directory's attributes.
    Lookup {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
    },
    /// Which of these [`crate::fs::access`] bits are granted → [`Reply::Access`].
    Access {
        /// Object.
        handle: FileHandle,
        /// Bits asked for.
        want: u32,
    },
    /// Target of a symbolic link → [`Reply::Target`].
    ReadLink {
        /// Object.
        handle: FileHandle,
    },
    /// Read → [`Reply::Data`]; short only at the end of the file.
    Read {
        /// Object.
        handle: FileHandle,
        /// First byte.
        offset: u64,
        /// At most [`crate::fs::IO_MAX`].
        length: u32,
    },
    /// Write → [`Reply::Written`].
    Write {
        /// Object.
        handle: FileHandle,
        /// First byte.
        offset: u64,
        /// When it is durable.
        stability: Stability,
        /// At most [`crate::fs::IO_MAX`] bytes.
        data: Vec<u8>,
    },
    /// Create a regular file → [`Reply::Created`].
    Create {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
        /// How.
        how: CreateHow,
    },
    /// Create a directory → [`Reply::Created`].
    MakeDir {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
        /// Attributes.
        set: SetAttr,
    },
    /// Create a symbolic link → [`Reply::Created`].
    Symlink {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
        /// Target, at most [`crate::fs::SYMLINK_MAX`] bytes.
        target: Vec<u8>,
        /// Attributes.
        set: SetAttr,
    },
    /// Create a device, pipe or socket → [`Reply::Created`].
    MakeNode {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
        /// Kind.
        kind: FileKind,
        /// Device numbers.
        rdev: (u32, u32),
        /// Attributes.
        set: SetAttr,
    },
    /// Remove a name that is not a directory → [`Reply::Wcc`] of the directory.
    Remove {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
    },
    /// Remove an empty directory → [`Reply::Wcc`] of the parent.
    RemoveDir {
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
    },
    /// Rename, replacing an existing target as POSIX does → [`Reply::Wcc2`].
    Rename {
        /// From directory.
        from_dir: FileHandle,
        /// From name.
        from_name: Vec<u8>,
        /// To directory.
        to_dir: FileHandle,
        /// To name.
        to_name: Vec<u8>,
    },
    /// Hard link → [`Reply::Linked`].
    Link {
        /// Object.
        handle: FileHandle,
        /// Directory.
        dir: FileHandle,
        /// Name.
        name: Vec<u8>,
    },
    /// List a directory → [`Reply::Entries`]. `.` and `..` are included.
    ReadDir {
        /// Directory.
        dir: FileHandle,
        /// 0 to begin, else the cookie of the last entry had.
        cookie: u64,
        /// Most entries (at least 1).
        max_entries: u32,
        /// Most bytes of names in all.
        max_bytes: u32,
        /// With attributes.
        plus: bool,
    },
    /// Usage of the volume of a handle → [`Reply::Stat`].
    VolumeStat {
        /// Any object of the volume.
        handle: FileHandle,
    },
    /// Make unstable writes of a file durable → [`Reply::Committed`].
    Commit {
        /// Object.
        handle: FileHandle,
        /// First byte.
        offset: u64,
        /// Bytes; 0: to the end.
        count: u32,
    },
}

impl Op {
    /// Whether executing it twice may differ from executing it once: the reply of such an operation is kept
    /// with the session, durably, until its slot is used again.
    pub fn is_non_idempotent(&self) -> bool {
        matches!(
            self,
            Op::SetAttr { .. }
                | Op::Create { .. }
                | Op::MakeDir { .. }
                | Op::Symlink { .. }
                | Op::MakeNode { .. }
                | Op::Remove { .. }
                | Op::RemoveDir { .. }
                | Op::Rename { .. }
                | Op::Link { .. }
        )
    }

    /// Whether executing it changes anything.
    pub fn has_effect(&self) -> bool {
        self.is_non_idempotent() || matches!(self, Op::Write { .. } | Op::Commit { .. })
    }

    /// Whether its effect must be durable before the reply leaves the D-module.
    pub fn is_stable(&self) -> bool {
        match self {
            Op::Write { stability, .. } => *stability != Stability::Unstable,
            Op::Commit { .. } => true,
            _ => self.is_non_idempotent(),
        }
    }
}

/// An operation and who asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// On whose behalf.
    pub credential: Credential,
    /// What.
    pub op: Op,
}

/// What an operation gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Attributes.
    Attr(Attr),
    /// An object found, and the attributes of the directory it was found in (of itself for a root).
    Node {
        /// The object.
        attr: Attr,
        /// The directory.
        dir: Attr,
    },
    /// Around a changed object.
    Wcc(Wcc),
    /// Around two changed directories (from, to).
    Wcc2(Wcc, Wcc),
    /// Bits granted.
    Access {
        /// Bits granted.
        granted: u32,
        /// The object.
        attr: Attr,
    },
    /// Target of a symbolic link.
    Target {
        /// Target.
        target: Vec<u8>,
        /// The link.
        attr: Attr,
    },
    /// Data read.
    Data {
        /// The bytes.
        data: Vec<u8>,
        /// Whether they end at the end of the file.
        eof: bool,
        /// The file.
        attr: Attr,
    },
    /// Bytes written.
    Written {
        /// How many.
        count: u32,
        /// How durable they are.
        stability: Stability,
        /// Changes when the D-module may have lost unstable writes.
        verifier: u64,
        /// Around the file.
        wcc: Wcc,
    },
    /// An object created, and its directory.
    Created {
        /// The object.
        attr: Attr,
        /// Around the directory.
        dir: Wcc,
    },
    /// A link made: the object, and around the directory.
    Linked {
        /// The object.
        attr: Attr,
        /// Around the directory.
        dir: Wcc,
    },
    /// Directory entries.
    Entries {
        /// In cookie order.
        entries: Vec<DirEntry>,
        /// Whether the listing is complete.
        eof: bool,
        /// The directory.
        dir: Attr,
    },
    /// Usage.
    Stat {
        /// Usage.
        stat: VolumeStat,
        /// The object asked about.
        attr: Attr,
    },
    /// Committed.
    Committed {
        /// As in [`Reply::Written`].
        verifier: u64,
        /// Around the file.
        wcc: Wcc,
    },
}

/// A refusal, with the attributes of what it concerned where they are known (the directory of a
/// directory operation, both of a rename, else the object).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why.
    pub status: Status,
    /// Around the object or directory.
    pub wcc: Wcc,
    /// Around the second directory of a rename.
    pub wcc2: Wcc,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure { status, wcc: Wcc::default(), wcc2: Wcc::default() }
    }
}

/// Outcome of an operation.
pub type Outcome = Result<Reply, Failure>;
