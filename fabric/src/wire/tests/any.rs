//! Any value of the vocabulary.
use crate::fs::*;
use crate::id::*;
use crate::op::*;
use crate::owner::OwnerRecord;
use crate::wire::{CasStatus, Farewell, Frame, Hello, HelloAck, Refusal};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

pub fn handle() -> impl Strategy<Value = FileHandle> + Clone {
    any::<(u32, u32, u64)>().prop_map(|(v, generation, inode)| FileHandle { volume: VolumeId(v), generation, inode })
}
fn time() -> impl Strategy<Value = Time> + Clone {
    any::<i64>().prop_map(Time)
}
fn name() -> impl Strategy<Value = Vec<u8>> + Clone {
    vec(any::<u8>(), 0..=NAME_MAX)
}
fn target() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..=SYMLINK_MAX)
}
fn bulk() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![Just(Vec::new()), vec(any::<u8>(), 0..300), any::<u8>().prop_map(|b| vec![b; IO_MAX])]
}
fn kind() -> impl Strategy<Value = FileKind> + Clone {
    use FileKind::*;
    prop::sample::select(vec![Regular, Directory, Symlink, BlockDevice, CharDevice, Fifo, Socket])
}
fn stability() -> impl Strategy<Value = Stability> {
    prop::sample::select(vec![Stability::Unstable, Stability::DataSync, Stability::FileSync])
}
fn attr() -> impl Strategy<Value = Attr> + Clone {
    (handle(), kind(), any::<[u32; 6]>(), any::<[u64; 2]>(), (time(), time(), time())).prop_map(
        |(handle, kind, [mode, links, uid, gid, major, minor], [size, used], (atime, mtime, ctime))| Attr {
            handle,
            kind,
            mode,
            links,
            uid,
            gid,
            size,
            used,
            rdev: (major, minor),
            atime,
            mtime,
            ctime,
        },
    )
}
fn set_time() -> impl Strategy<Value = SetTime> {
    prop_oneof![Just(SetTime::Keep), Just(SetTime::ServerNow), time().prop_map(SetTime::To)]
}
fn set() -> impl Strategy<Value = SetAttr> {
    (any::<(Option<u32>, Option<u32>, Option<u32>, Option<u64>)>(), set_time(), set_time())
        .prop_map(|((mode, uid, gid, size), atime, mtime)| SetAttr { mode, uid, gid, size, atime, mtime })
}
fn how() -> impl Strategy<Value = CreateHow> {
    prop_oneof![
        set().prop_map(CreateHow::Unchecked),
        set().prop_map(CreateHow::Guarded),
        any::<u64>().prop_map(CreateHow::Exclusive)
    ]
}
fn wcc() -> impl Strategy<Value = Wcc> + Clone {
    (option::of((any::<u64>(), time(), time())), option::of(attr())).prop_map(|(before, after)| Wcc { before, after })
}

pub fn op() -> impl Strategy<Value = Op> {
    let dir = handle;
    prop_oneof![
        "[a-zé]{0,100}".prop_map(|name| Op::OpenVolume { name }),
        handle().prop_map(|handle| Op::GetAttr { handle }),
        (handle(), set(), option::of(time())).prop_map(|(handle, set, guard)| Op::SetAttr { handle, set, guard }),
        (dir(), name()).prop_map(|(dir, name)| Op::Lookup { dir, name }),
        (handle(), any::<u32>()).prop_map(|(handle, want)| Op::Access { handle, want }),
        handle().prop_map(|handle| Op::ReadLink { handle }),
        (handle(), any::<u64>(), any::<u32>()).prop_map(|(handle, offset, length)| Op::Read { handle, offset, length }),
        (handle(), any::<u64>(), stability(), bulk()).prop_map(|(handle, offset, stability, data)| Op::Write {
            handle,
            offset,
            stability,
            data
        }),
        (dir(), name(), how()).prop_map(|(dir, name, how)| Op::Create { dir, name, how }),
        (dir(), name(), set()).prop_map(|(dir, name, set)| Op::MakeDir { dir, name, set }),
        (dir(), name(), target(), set()).prop_map(|(dir, name, target, set)| Op::Symlink { dir, name, target, set }),
        (dir(), name(), kind(), any::<(u32, u32)>(), set()).prop_map(|(dir, name, kind, rdev, set)| Op::MakeNode {
            dir,
            name,
            kind,
            rdev,
            set
        }),
        (dir(), name()).prop_map(|(dir, name)| Op::Remove { dir, name }),
        (dir(), name()).prop_map(|(dir, name)| Op::RemoveDir { dir, name }),
        (dir(), name(), dir(), name()).prop_map(|(from_dir, from_name, to_dir, to_name)| Op::Rename {
            from_dir,
            from_name,
            to_dir,
            to_name
        }),
        (handle(), dir(), name()).prop_map(|(handle, dir, name)| Op::Link { handle, dir, name }),
        (dir(), any::<(u64, u32, u32, bool)>()).prop_map(|(dir, (cookie, max_entries, max_bytes, plus))| {
            Op::ReadDir { dir, cookie, max_entries, max_bytes, plus }
        }),
        handle().prop_map(|handle| Op::VolumeStat { handle }),
        (handle(), any::<(u64, u32)>()).prop_map(|(handle, (offset, count))| Op::Commit { handle, offset, count }),
    ]
}

fn status() -> impl Strategy<Value = Status> {
    use Status::*;
    prop::sample::select(vec![
        NotPermitted,
        NotFound,
        Io,
        Access,
        Exists,
        CrossVolume,
        NotDirectory,
        IsDirectory,
        Invalid,
        TooLarge,
        NoSpace,
        TooManyLinks,
        NameTooLong,
        NotEmpty,
        Stale,
        BadCookie,
        NotSync,
        NotSupported,
        Delay,
        ServerFault,
        NoVolume,
    ])
}
fn entry() -> impl Strategy<Value = DirEntry> {
    (any::<(u64, u64)>(), name(), option::of(attr())).prop_map(|((cookie, inode), name, attr)| DirEntry {
        cookie,
        inode,
        name,
        attr,
    })
}

pub fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        (status(), wcc(), wcc()).prop_map(|(status, wcc, wcc2)| Err(Failure { status, wcc, wcc2 })),
        attr().prop_map(|a| Ok(Reply::Attr(a))),
        (attr(), attr()).prop_map(|(attr, dir)| Ok(Reply::Node { attr, dir })),
        wcc().prop_map(|w| Ok(Reply::Wcc(w))),
        (wcc(), wcc()).prop_map(|(a, b)| Ok(Reply::Wcc2(a, b))),
        (any::<u32>(), attr()).prop_map(|(granted, attr)| Ok(Reply::Access { granted, attr })),
        (target(), attr()).prop_map(|(target, attr)| Ok(Reply::Target { target, attr })),
        (bulk(), any::<bool>(), attr()).prop_map(|(data, eof, attr)| Ok(Reply::Data { data, eof, attr })),
        (any::<u32>(), stability(), any::<u64>(), wcc())
            .prop_map(|(count, stability, verifier, wcc)| Ok(Reply::Written { count, stability, verifier, wcc })),
        (attr(), wcc()).prop_map(|(attr, dir)| Ok(Reply::Created { attr, dir })),
        (attr(), wcc()).prop_map(|(attr, dir)| Ok(Reply::Linked { attr, dir })),
        (vec(entry(), 0..20), any::<bool>(), attr()).prop_map(|(entries, eof, dir)| Ok(Reply::Entries {
            entries,
            eof,
            dir
        })),
        (any::<[u64; 4]>(), attr()).prop_map(|([total_bytes, free_bytes, total_files, free_files], attr)| {
            Ok(Reply::Stat { stat: VolumeStat { total_bytes, free_bytes, total_files, free_files }, attr })
        }),
        (any::<u64>(), wcc()).prop_map(|(verifier, wcc)| Ok(Reply::Committed { verifier, wcc })),
    ]
}

/// Replies that an operation whose reply is kept can have.
pub fn kept_outcome() -> impl Strategy<Value = Outcome> {
    outcome().prop_filter("kept", |o| {
        matches!(o, Err(_) | Ok(Reply::Wcc(_) | Reply::Wcc2(..) | Reply::Created { .. } | Reply::Linked { .. }))
    })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        any::<u64>().prop_map(|e| Refusal::StaleEpoch { current: Epoch(e) }),
        any::<u64>().prop_map(|s| Refusal::BadSequence { last: Sequence(s) }),
        Just(Refusal::BadSlot),
        Just(Refusal::Busy),
        Just(Refusal::NoSession),
        any::<(u16, u16)>().prop_map(|(min, max)| Refusal::Version { min, max }),
        Just(Refusal::Full),
        Just(Refusal::Storage),
        Just(Refusal::Invalid),
    ]
}

pub fn frame() -> impl Strategy<Value = Frame> {
    let credential = (any::<(u32, u32)>(), vec(any::<u32>(), 0..=GROUPS_MAX))
        .prop_map(|((uid, gid), groups)| Credential { uid, gid, groups });
    let record = any::<[u64; 5]>().prop_map(|[vm, epoch, session, a, b]| OwnerRecord {
        vm_id: VmId(vm),
        epoch: Epoch(epoch),
        session: Epoch(session),
        owner: Owner([a, b]),
    });
    let place = any::<(u64, u16, u64)>().prop_map(|(e, s, n)| (Epoch(e), Slot(s), Sequence(n)));
    prop_oneof![
        (any::<[u64; 6]>(), any::<(u16, u16)>()).prop_map(|([vm, epoch, a, b, nonce, capabilities], (lo, hi))| {
            Frame::Hello(Hello {
                vm_id: VmId(vm),
                epoch: Epoch(epoch),
                owner: Owner([a, b]),
                nonce,
                version_min: lo,
                version_max: hi,
                capabilities,
            })
        }),
        (any::<[u64; 4]>(), any::<(u16, u16)>()).prop_map(|([epoch, boot, nonce, capabilities], (version, slots))| {
            Frame::HelloAck(HelloAck {
                epoch: Epoch(epoch),
                boot_id: BootId(boot),
                nonce,
                version,
                slots,
                capabilities,
            })
        }),
        refusal().prop_map(Frame::HelloRefused),
        (place.clone(), credential, op()).prop_map(|((epoch, slot, sequence), credential, op)| Frame::Request {
            epoch,
            slot,
            sequence,
            request: Request { credential, op }
        }),
        (place.clone(), outcome()).prop_map(|((_, slot, sequence), outcome)| Frame::Response {
            slot,
            sequence,
            outcome
        }),
        (place, refusal()).prop_map(|((epoch, slot, sequence), reason)| Frame::Refused {
            epoch,
            slot,
            sequence,
            reason
        }),
        any::<u64>().prop_map(|v| Frame::OwnerGet { vm_id: VmId(v) }),
        record.clone().prop_map(Frame::OwnerRecord),
        any::<[u64; 4]>().prop_map(|[vm, e, a, b]| Frame::OwnerCas {
            vm_id: VmId(vm),
            expect: Epoch(e),
            owner: Owner([a, b])
        }),
        any::<[u64; 4]>().prop_map(|[vm, e, a, b]| Frame::OwnerRelease {
            vm_id: VmId(vm),
            epoch: Epoch(e),
            owner: Owner([a, b])
        }),
        any::<[u64; 6]>().prop_map(|[vm, e, a, b, c, d]| Frame::OwnerReserve {
            vm_id: VmId(vm),
            epoch: Epoch(e),
            owner: Owner([a, b]),
            heir: Owner([c, d])
        }),
        (
            prop::sample::select(vec![
                CasStatus::Won,
                CasStatus::Lost,
                CasStatus::Refused,
                CasStatus::Unknown,
                CasStatus::Behind
            ]),
            record
        )
            .prop_map(|(status, record)| Frame::OwnerCasResult { status, record }),
        any::<u64>().prop_map(|token| Frame::Ping { token }),
        any::<u64>().prop_map(|token| Frame::Pong { token }),
        prop::sample::select(vec![Farewell::Closing, Farewell::Superseded, Farewell::Protocol, Farewell::Full])
            .prop_map(|reason| Frame::Goodbye { reason }),
    ]
}
