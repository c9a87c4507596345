//! The vocabulary of file systems ([`crate::fs`]) in bytes.
use super::WireError;
use super::bytes::{Reader, Writer};
use crate::fs::{
    Attr, CreateHow, Credential, DirEntry, FileHandle, FileKind, GROUPS_MAX, NAME_MAX, SetAttr, SetTime, Stability,
    Status, Time, VolumeId, VolumeStat, Wcc,
};
use alloc::vec::Vec;

type Result<T> = core::result::Result<T, WireError>;

impl Writer {
    pub(super) fn handle(&mut self, v: FileHandle) {
        self.u32(v.volume.0);
        self.u32(v.generation);
        self.u64(v.inode);
    }
    pub(super) fn name(&mut self, v: &[u8]) {
        self.string(v, NAME_MAX);
    }
    pub(super) fn time(&mut self, v: Time) {
        self.u64(v.0.cast_unsigned());
    }
    pub(super) fn kind(&mut self, v: FileKind) {
        self.u8(v as u8);
    }
    pub(super) fn stability(&mut self, v: Stability) {
        self.u8(v as u8);
    }
    pub(super) fn rdev(&mut self, v: (u32, u32)) {
        self.u32(v.0);
        self.u32(v.1);
    }
    pub(super) fn attr(&mut self, v: &Attr) {
        self.handle(v.handle);
        self.kind(v.kind);
        self.u32(v.mode);
        self.u32(v.links);
        self.u32(v.uid);
        self.u32(v.gid);
        self.u64(v.size);
        self.u64(v.used);
        self.rdev(v.rdev);
        self.time(v.atime);
        self.time(v.mtime);
        self.time(v.ctime);
    }
    fn set_time(&mut self, v: SetTime) {
        match v {
            SetTime::Keep => self.u8(0),
            SetTime::ServerNow => self.u8(1),
            SetTime::To(t) => {
                self.u8(2);
                self.time(t);
            }
        }
    }
    pub(super) fn set_attr(&mut self, v: &SetAttr) {
        self.option(v.mode, Self::u32);
        self.option(v.uid, Self::u32);
        self.option(v.gid, Self::u32);
        self.option(v.size, Self::u64);
        self.set_time(v.atime);
        self.set_time(v.mtime);
    }
    pub(super) fn create_how(&mut self, v: &CreateHow) {
        match v {
            CreateHow::Unchecked(set) => {
                self.u8(0);
                self.set_attr(set);
            }
            CreateHow::Guarded(set) => {
                self.u8(1);
                self.set_attr(set);
            }
            CreateHow::Exclusive(verifier) => {
                self.u8(2);
                self.u64(*verifier);
            }
        }
    }
    pub(super) fn credential(&mut self, v: &Credential) {
        self.u32(v.uid);
        self.u32(v.gid);
        self.count(v.groups.len(), GROUPS_MAX);
        v.groups.iter().for_each(|g| self.u32(*g));
    }
    pub(super) fn wcc(&mut self, v: &Wcc) {
        self.option(v.before, |w, (size, mtime, ctime)| {
            w.u64(size);
            w.time(mtime);
            w.time(ctime);
        });
        self.option(v.after.as_ref(), Self::attr);
    }
    pub(super) fn dir_entry(&mut self, v: &DirEntry) {
        self.u64(v.cookie);
        self.u64(v.inode);
        self.name(&v.name);
        self.option(v.attr.as_ref(), Self::attr);
    }
    pub(super) fn volume_stat(&mut self, v: &VolumeStat) {
        self.u64(v.total_bytes);
        self.u64(v.free_bytes);
        self.u64(v.total_files);
        self.u64(v.free_files);
    }
    pub(super) fn status(&mut self, v: Status) {
        self.u16(v as u16);
    }
}

/// Fewest bytes of a [`DirEntry`].
pub(super) const DIR_ENTRY_LEAST: usize = 8 + 8 + 4 + 1;

impl Reader<'_> {
    pub(super) fn handle(&mut self) -> Result<FileHandle> {
        let (volume, generation, inode) = (VolumeId(self.u32()?), self.u32()?, self.u64()?);
        Ok(FileHandle { volume, generation, inode })
    }
    pub(super) fn name(&mut self) -> Result<Vec<u8>> {
        self.string(NAME_MAX)
    }
    pub(super) fn time(&mut self) -> Result<Time> {
        Ok(Time(self.u64()?.cast_signed()))
    }
    pub(super) fn kind(&mut self) -> Result<FileKind> {
        Ok(match self.u8()? {
            1 => FileKind::Regular,
            2 => FileKind::Directory,
            3 => FileKind::Symlink,
            4 => FileKind::BlockDevice,
            5 => FileKind::CharDevice,
            6 => FileKind::Fifo,
            7 => FileKind::Socket,
            _ => return Err(WireError::Malformed("file kind")),
        })
    }
    pub(super) fn stability(&mut self) -> Result<Stability> {
        Ok(match self.u8()? {
            0 => Stability::Unstable,
            1 => Stability::DataSync,
            2 => Stability::FileSync,
            _ => return Err(WireError::Malformed("stability")),
        })
    }
    pub(super) fn rdev(&mut self) -> Result<(u32, u32)> {
        Ok((self.u32()?, self.u32()?))
    }
    pub(super) fn attr(&mut self) -> Result<Attr> {
        Ok(Attr {
            handle: self.handle()?,
            kind: self.kind()?,
            mode: self.u32()?,
            links: self.u32()?,
            uid: self.u32()?,
            gid: self.u32()?,
            size: self.u64()?,
            used: self.u64()?,
            rdev: self.rdev()?,
            atime: self.time()?,
            mtime: self.time()?,
            ctime: self.time()?,
        })
    }
    fn set_time(&mut self) -> Result<SetTime> {
        Ok(match self.u8()? {
            0 => SetTime::Keep,
            1 => SetTime::ServerNow,
            2 => SetTime::To(self.time()?),
            _ => return Err(WireError::Malformed("time to set")),
        })
    }
    pub(super) fn set_attr(&mut self) -> Result<SetAttr> {
        Ok(SetAttr {
            mode: self.option(Self::u32)?,
            uid: self.option(Self::u32)?,
            gid: self.option(Self::u32)?,
            size: self.option(Self::u64)?,
            atime: self.set_time()?,
            mtime: self.set_time()?,
        })
    }
    pub(super) fn create_how(&mut self) -> Result<CreateHow> {
        Ok(match self.u8()? {
            0 => CreateHow::Unchecked(self.set_attr()?),
            1 => CreateHow::Guarded(self.set_attr()?),
            2 => CreateHow::Exclusive(self.u64()?),
            _ => return Err(WireError::Malformed("way to create")),
        })
    }
    pub(super) fn credential(&mut self) -> Result<Credential> {
        let (uid, gid) = (self.u32()?, self.u32()?);
        let n = self.count(GROUPS_MAX, 4)?;
        let groups = (0..n).map(|_| self.u32()).collect::<Result<_>>()?;
        Ok(Credential { uid, gid, groups })
    }
    pub(super) fn wcc(&mut self) -> Result<Wcc> {
        let before = self.option(|r| Ok((r.u64()?, r.time()?, r.time()?)))?;
        Ok(Wcc { before, after: self.option(Self::attr)? })
    }
    pub(super) fn dir_entry(&mut self) -> Result<DirEntry> {
        let (cookie, inode) = (self.u64()?, self.u64()?);
        Ok(DirEntry { cookie, inode, name: self.name()?, attr: self.option(Self::attr)? })
    }
    pub(super) fn volume_stat(&mut self) -> Result<VolumeStat> {
        Ok(VolumeStat {
            total_bytes: self.u64()?,
            free_bytes: self.u64()?,
            total_files: self.u64()?,
            free_files: self.u64()?,
        })
    }
    pub(super) fn status(&mut self) -> Result<Status> {
        Ok(match self.u16()? {
            1 => Status::NotPermitted,
            2 => Status::NotFound,
            3 => Status::Io,
            4 => Status::Access,
            5 => Status::Exists,
            6 => Status::CrossVolume,
            7 => Status::NotDirectory,
            8 => Status::IsDirectory,
            9 => Status::Invalid,
            10 => Status::TooLarge,
            11 => Status::NoSpace,
            12 => Status::TooManyLinks,
            13 => Status::NameTooLong,
            14 => Status::NotEmpty,
            15 => Status::Stale,
            16 => Status::BadCookie,
            17 => Status::NotSync,
            18 => Status::NotSupported,
            19 => Status::Delay,
            20 => Status::ServerFault,
            21 => Status::NoVolume,
            _ => return Err(WireError::Malformed("status")),
        })
    }
}
