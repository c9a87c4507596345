//! POSIX's and RFC 1813's rules, one by one: permissions, times, links, names.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use fabric::fs::{
    Attr, CreateHow, Credential, FileHandle, FileKind, SetAttr, SetTime, Stability, Status, Time, access,
};
use fabric::op::{Op, Outcome, Reply};
use rig::model::refusal;
use rig::*;

fn user(uid: u32) -> Credential {
    Credential { uid, gid: uid, groups: vec![500] }
}

fn mode(mode: u32) -> SetAttr {
    SetAttr { mode: Some(mode), ..SetAttr::default() }
}

fn made(outcome: Outcome) -> Attr {
    match outcome {
        Ok(Reply::Created { attr, .. }) => attr,
        other => panic!("{other:?}"),
    }
}

fn create(volume: &mut Volume, who: &Credential, dir: FileHandle, name: &str, bits: u32) -> Outcome {
    let how = CreateHow::Guarded(mode(bits));
    volume.as_user(who.clone(), Op::Create { dir, name: name.into(), how })
}

fn make_dir(volume: &mut Volume, who: &Credential, dir: FileHandle, name: &str, bits: u32) -> FileHandle {
    made(volume.as_user(who.clone(), Op::MakeDir { dir, name: name.into(), set: mode(bits) })).handle
}

fn write(volume: &mut Volume, who: &Credential, handle: FileHandle) -> Outcome {
    volume.as_user(who.clone(), Op::Write { handle, offset: 0, stability: Stability::Unstable, data: vec![1] })
}

fn rename(volume: &mut Volume, who: &Credential, from: (FileHandle, &str), to: (FileHandle, &str)) -> Outcome {
    let op = Op::Rename { from_dir: from.0, from_name: from.1.into(), to_dir: to.0, to_name: to.1.into() };
    volume.as_user(who.clone(), op)
}

#[test]
fn permission_bits_hold_for_owner_group_and_others() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let (ann, bob, eve) = (user(10), user(20), Credential { groups: vec![], ..user(30) });
    let file = made(create(&mut volume, &ann, root, "file", 0o640)).handle;
    let set = SetAttr { gid: Some(500), ..SetAttr::default() };
    volume.as_user(ann.clone(), Op::SetAttr { handle: file, set, guard: None }).unwrap();
    let read = |volume: &mut Volume, who: &Credential| {
        volume.as_user(who.clone(), Op::Read { handle: file, offset: 0, length: 10 }).map(|_| ()).map_err(|e| e.status)
    };
    assert_eq!((read(&mut volume, &ann), read(&mut volume, &bob)), (Ok(()), Ok(())));
    assert_eq!(read(&mut volume, &eve), Err(Status::Access));
    assert_eq!(refusal(write(&mut volume, &bob, file)), Status::Access);
    write(&mut volume, &ann, file).unwrap();
    // An owner may write what was open before it became read-only; user 0 may do everything.
    let set = mode(0o000);
    volume.as_user(ann.clone(), Op::SetAttr { handle: file, set, guard: None }).unwrap();
    write(&mut volume, &ann, file).unwrap();
    write(&mut volume, &Credential::ROOT, file).unwrap();
    let want = access::READ | access::MODIFY | access::EXTEND | access::EXECUTE;
    let Ok(Reply::Access { granted, .. }) = volume.as_user(ann.clone(), Op::Access { handle: file, want }) else {
        panic!()
    };
    assert_eq!(granted, 0);
    let granted = match volume.run(Op::Access { handle: file, want }) {
        Ok(Reply::Access { granted, .. }) => granted,
        other => panic!("{other:?}"),
    };
    assert_eq!(granted, want & !access::EXECUTE);
    // Directories: search and write.
    let dir = make_dir(&mut volume, &ann, root, "dir", 0o755);
    assert_eq!(refusal(create(&mut volume, &bob, dir, "x", 0o600)), Status::Access);
    let closed = make_dir(&mut volume, &ann, root, "closed", 0o700);
    let lookup = Op::Lookup { dir: closed, name: b"x".to_vec() };
    let failure = volume.as_user(bob.clone(), lookup).unwrap_err();
    assert_eq!(failure.status, Status::Access);
    assert_eq!(failure.wcc.after.unwrap().handle, closed, "a refusal has the directory's attributes");
    let list = Op::ReadDir { dir: closed, cookie: 0, max_entries: 9, max_bytes: 999, plus: false };
    assert_eq!(refusal(volume.as_user(bob, list)), Status::Access);
}

#[test]
fn only_the_owner_changes_attributes() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let (ann, bob) = (user(10), user(20));
    let file = made(create(&mut volume, &ann, root, "file", 0o666)).handle;
    let set = |volume: &mut Volume, who: &Credential, set: SetAttr| {
        let op = Op::SetAttr { handle: file, set, guard: None };
        volume.as_user(who.clone(), op).map(|_| ()).map_err(|failure| failure.status)
    };
    let denied = Err(Status::NotPermitted);
    assert_eq!(set(&mut volume, &bob, mode(0o777)), denied);
    assert_eq!(set(&mut volume, &ann, SetAttr { uid: Some(20), ..SetAttr::default() }), denied);
    assert_eq!(set(&mut volume, &ann, SetAttr { gid: Some(77), ..SetAttr::default() }), denied);
    assert_eq!(set(&mut volume, &ann, SetAttr { gid: Some(500), uid: Some(10), ..SetAttr::default() }), Ok(()));
    let past = SetAttr { mtime: SetTime::To(Time(5)), ..SetAttr::default() };
    assert_eq!(set(&mut volume, &bob, past), denied);
    assert_eq!(set(&mut volume, &bob, SetAttr { mtime: SetTime::ServerNow, ..SetAttr::default() }), Ok(()));
    assert_eq!(set(&mut volume, &ann, past), Ok(()));
    assert_eq!(volume.attr(file).mtime, Time(5));
    assert_eq!(set(&mut volume, &bob, SetAttr { size: Some(10), ..SetAttr::default() }), Ok(()));
    assert_eq!(set(&mut volume, &bob, SetAttr { size: Some(1 << 50), ..SetAttr::default() }), Err(Status::TooLarge));
    let ctime = volume.attr(file).ctime;
    let guarded = |guard| Op::SetAttr { handle: file, set: mode(0o600), guard: Some(guard) };
    assert_eq!(refusal(volume.run(guarded(Time(3)))), Status::NotSync);
    volume.run(guarded(ctime)).unwrap();
    let dir_size = Op::SetAttr { handle: root, set: SetAttr { size: Some(0), ..SetAttr::default() }, guard: None };
    assert_eq!(refusal(volume.run(dir_size)), Status::IsDirectory);
}

#[test]
fn set_id_bits_go_when_they_must() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let (ann, bob) = (user(10), user(20));
    let file = made(create(&mut volume, &ann, root, "tool", 0o6777)).handle;
    write(&mut volume, &Credential::ROOT, file).unwrap();
    assert_eq!(volume.attr(file).mode, 0o6777);
    write(&mut volume, &bob, file).unwrap();
    assert_eq!(volume.attr(file).mode, 0o777);
    let again = |set| Op::SetAttr { handle: file, set, guard: None };
    volume.run(again(mode(0o6755))).unwrap();
    volume.as_user(ann.clone(), again(SetAttr { gid: Some(500), ..SetAttr::default() })).unwrap();
    assert_eq!(volume.attr(file).mode, 0o755);
    // Set-gid for a group one is not in.
    volume.run(again(SetAttr { gid: Some(99), ..SetAttr::default() })).unwrap();
    volume.as_user(ann.clone(), again(mode(0o2755))).unwrap();
    assert_eq!(volume.attr(file).mode, 0o755);
    // A directory's set-gid is inherited, with its group.
    let dir = make_dir(&mut volume, &ann, root, "shared", 0o2777);
    let group = SetAttr { gid: Some(500), ..SetAttr::default() };
    volume.as_user(ann, Op::SetAttr { handle: dir, set: group, guard: None }).unwrap();
    let sub = make_dir(&mut volume, &bob, dir, "sub", 0o755);
    let attr = volume.attr(sub);
    assert_eq!((attr.gid, attr.mode, attr.uid), (500, 0o2755, 20));
    assert_eq!(made(create(&mut volume, &bob, dir, "f", 0o644)).gid, 500);
    assert_eq!(made(create(&mut volume, &bob, root, "f", 0o644)).gid, 20);
}

#[test]
fn sticky_directories_protect_their_entries() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let (ann, bob) = (user(10), user(20));
    let tmp = make_dir(&mut volume, &Credential::ROOT, root, "tmp", 0o1777);
    create(&mut volume, &ann, tmp, "anns", 0o666).unwrap();
    create(&mut volume, &bob, tmp, "bobs", 0o666).unwrap();
    let remove = |name: &str| Op::Remove { dir: tmp, name: name.into() };
    assert_eq!(refusal(volume.as_user(bob.clone(), remove("anns"))), Status::NotPermitted);
    assert_eq!(refusal(rename(&mut volume, &bob, (tmp, "anns"), (root, "x"))), Status::NotPermitted);
    assert_eq!(refusal(rename(&mut volume, &bob, (tmp, "bobs"), (tmp, "anns"))), Status::NotPermitted);
    rename(&mut volume, &bob, (tmp, "bobs"), (tmp, "more")).unwrap();
    volume.as_user(ann, remove("anns")).unwrap();
    volume.as_user(bob, remove("more")).unwrap();
}

#[test]
fn renames_do_what_posix_says() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let who = Credential::ROOT;
    let a = make_dir(&mut volume, &who, root, "a", 0o755);
    let b = make_dir(&mut volume, &who, a, "b", 0o755);
    let c = make_dir(&mut volume, &who, b, "c", 0o755);
    let file = made(create(&mut volume, &who, root, "file", 0o644)).handle;
    // Into itself, at any depth.
    assert_eq!(refusal(rename(&mut volume, &who, (root, "a"), (c, "x"))), Status::Invalid);
    assert_eq!(refusal(rename(&mut volume, &who, (root, "a"), (a, "x"))), Status::Invalid);
    for dots in [".", ".."] {
        assert_eq!(refusal(rename(&mut volume, &who, (a, dots), (root, "x"))), Status::Invalid);
        assert_eq!(refusal(rename(&mut volume, &who, (root, "a"), (root, dots))), Status::Invalid);
    }
    assert_eq!(refusal(rename(&mut volume, &who, (root, "file"), (root, "a"))), Status::IsDirectory);
    assert_eq!(refusal(rename(&mut volume, &who, (root, "a"), (root, "file"))), Status::NotDirectory);
    assert_eq!(refusal(rename(&mut volume, &who, (root, "none"), (root, "x"))), Status::NotFound);
    // `..` and the link counts follow a moved directory.
    rename(&mut volume, &who, (b, "c"), (root, "c")).unwrap();
    let up = |volume: &mut Volume, dir| volume.lookup(dir, "..").unwrap().handle;
    assert_eq!(up(&mut volume, c), root);
    assert_eq!((volume.attr(root).links, volume.attr(b).links), (4, 2));
    // Over an empty directory, not over a full one.
    assert_eq!(refusal(rename(&mut volume, &who, (root, "c"), (root, "a"))), Status::NotEmpty);
    rename(&mut volume, &who, (root, "c"), (a, "b")).unwrap();
    assert_eq!(refusal(volume.run(Op::GetAttr { handle: b })), Status::Stale);
    assert_eq!((volume.attr(root).links, volume.attr(a).links), (3, 3));
    // Two names of one file: nothing happens, both stay.
    volume.run(Op::Link { handle: file, dir: a, name: b"other".to_vec() }).unwrap();
    rename(&mut volume, &who, (root, "file"), (a, "other")).unwrap();
    assert_eq!(volume.attr(file).links, 2);
    assert!(volume.lookup(root, "file").is_ok() && volume.lookup(a, "other").is_ok());
    // A moved directory's `..` is written: that takes a permission.
    let ann = user(10);
    let hers = make_dir(&mut volume, &ann, root, "hers", 0o777);
    let fixed = make_dir(&mut volume, &ann, hers, "fixed", 0o555);
    assert_eq!(refusal(rename(&mut volume, &ann, (hers, "fixed"), (root, "fixed"))), Status::Access);
    rename(&mut volume, &ann, (hers, "fixed"), (hers, "still")).unwrap();
    assert_eq!(up(&mut volume, fixed), hers);
    volume.check();
}

#[test]
fn removal_and_links() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let dir = volume.make_dir(root, "dir").handle;
    let file = volume.create(dir, "file").handle;
    let remove = |dir, name: &str| Op::Remove { dir, name: name.into() };
    let remove_dir = |dir, name: &str| Op::RemoveDir { dir, name: name.into() };
    assert_eq!(refusal(volume.run(remove(root, "dir"))), Status::IsDirectory);
    assert_eq!(refusal(volume.run(remove_dir(dir, "file"))), Status::NotDirectory);
    assert_eq!(refusal(volume.run(remove_dir(root, "dir"))), Status::NotEmpty);
    assert_eq!(refusal(volume.run(remove_dir(dir, "."))), Status::Invalid);
    assert_eq!(refusal(volume.run(remove_dir(dir, ".."))), Status::NotEmpty);
    assert_eq!(refusal(volume.run(remove(file, "x"))), Status::NotDirectory);
    let link = |handle, name: &str| Op::Link { handle, dir: root, name: name.into() };
    assert_eq!(refusal(volume.run(link(dir, "hard"))), Status::NotPermitted);
    assert_eq!(refusal(volume.run(link(file, "dir"))), Status::Exists);
    let before = volume.attr(file).ctime;
    volume.run(link(file, "hard")).unwrap();
    assert!(volume.attr(file).ctime > before);
    volume.run(remove(dir, "file")).unwrap();
    assert_eq!(volume.attr(file).links, 1);
    let Ok(Reply::Wcc(wcc)) = volume.run(remove_dir(root, "dir")) else { panic!() };
    assert!(wcc.before.unwrap().2 < wcc.after.unwrap().ctime);
    assert_eq!(volume.attr(root).links, 2);
    assert_eq!(refusal(volume.run(Op::GetAttr { handle: dir })), Status::Stale);
    assert_eq!(refusal(volume.run(Op::Lookup { dir, name: b"..".to_vec() })), Status::Stale);
    volume.check();
}

#[test]
fn names_are_checked() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let make = |name: &[u8]| Op::MakeDir { dir: root, name: name.to_vec(), set: SetAttr::default() };
    for (name, status) in [
        (&b""[..], Status::Invalid),
        (b"a/b", Status::Invalid),
        (b"a\0b", Status::Invalid),
        (b".", Status::Exists),
        (b"..", Status::Exists),
        (&[b'x'; 256], Status::NameTooLong),
    ] {
        assert_eq!(refusal(volume.run(make(name))), status, "{name:?}");
    }
    volume.run(make(&[b'x'; 255])).unwrap();
    volume.run(make(b"\xff\xfe not text")).unwrap();
    let target = |length| Op::Symlink { dir: root, name: b"l".to_vec(), target: vec![b't'; length], set: mode(0) };
    assert_eq!(refusal(volume.run(target(1025))), Status::NameTooLong);
    assert_eq!(refusal(volume.run(target(0))), Status::Invalid);
    let link = made(volume.run(target(1024)));
    assert_eq!((link.kind, link.mode, link.size), (FileKind::Symlink, 0o777, 1024));
    let Ok(Reply::Target { target, .. }) = volume.run(Op::ReadLink { handle: link.handle }) else { panic!() };
    assert_eq!(target, [b't'; 1024]);
    assert_eq!(refusal(volume.run(Op::ReadLink { handle: root })), Status::Invalid);
}

#[test]
fn creation_is_unchecked_guarded_or_exclusive() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let create = |how| Op::Create { dir: root, name: b"f".to_vec(), how };
    let file = made(volume.run(create(CreateHow::Exclusive(77)))).handle;
    assert_eq!(made(volume.run(create(CreateHow::Exclusive(77)))).handle, file);
    assert_eq!(refusal(volume.run(create(CreateHow::Exclusive(78)))), Status::Exists);
    assert_eq!(refusal(volume.run(create(CreateHow::Guarded(mode(0o600))))), Status::Exists);
    volume.write(file, 0, b"something");
    assert_eq!(made(volume.run(create(CreateHow::Unchecked(mode(0o777))))).size, 9);
    let empty = SetAttr { size: Some(0), ..SetAttr::default() };
    let again = made(volume.run(create(CreateHow::Unchecked(empty))));
    assert_eq!((again.handle, again.size, again.mode), (file, 0, 0o600));
    volume.make_dir(root, "d");
    let over = Op::Create { dir: root, name: b"d".to_vec(), how: CreateHow::Unchecked(empty) };
    assert_eq!(refusal(volume.run(over)), Status::Exists);
    // Devices are for user 0, pipes for all.
    let node = |kind, name: &str| Op::MakeNode { dir: root, name: name.into(), kind, rdev: (8, 1), set: mode(0o600) };
    assert_eq!(refusal(volume.as_user(user(10), node(FileKind::BlockDevice, "dev"))), Status::NotPermitted);
    let device = made(volume.run(node(FileKind::CharDevice, "dev")));
    assert_eq!((device.rdev, device.kind), ((8, 1), FileKind::CharDevice));
    made(volume.as_user(user(10), node(FileKind::Fifo, "pipe")));
    assert_eq!(refusal(volume.run(node(FileKind::Regular, "r"))), Status::Invalid);
    volume.check();
}

#[test]
fn times_follow_changes_and_ctime_strictly_grows() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    let file = volume.create(root, "f").handle;
    // A clock that stands still or goes back does not stop ctime.
    volume.now = 0;
    let mut last = volume.attr(file).ctime;
    for step in 0..5 {
        volume.now = -50_000 * (step + 1);
        let (mtime, size) = (volume.attr(file).mtime, volume.attr(file).size);
        match step {
            0 => volume.write(file, size, b"x"),
            1 => volume.set_size(file, 100),
            2 => drop(volume.run(Op::SetAttr { handle: file, set: mode(0o611), guard: None }).unwrap()),
            3 => drop(volume.run(Op::Link { handle: file, dir: root, name: b"g".to_vec() }).unwrap()),
            _ => volume.remove(root, "g"),
        }
        let attr = volume.attr(file);
        assert!(attr.ctime > last, "step {step}");
        assert_eq!(attr.mtime == mtime, step > 1, "step {step}");
        last = attr.ctime;
    }
    let before = volume.attr(root);
    volume.now = before.mtime.0 + 5000;
    volume.create(root, "new");
    assert!(volume.attr(root).mtime > before.mtime);
}

#[test]
fn listings_respect_their_limits() {
    let mut volume = Volume::new(2048, SMALL);
    let root = volume.root();
    for number in 0..50 {
        volume.create(root, &format!("file{number:02}"));
    }
    let list = |cookie, max_entries, max_bytes| Op::ReadDir { dir: root, cookie, max_entries, max_bytes, plus: false };
    let Ok(Reply::Entries { entries, eof, .. }) = volume.run(list(0, 10, 1000)) else { panic!() };
    assert_eq!((entries.len(), eof), (10, false));
    assert_eq!((&entries[0].name[..], entries[0].cookie), (&b"."[..], 1));
    let Ok(Reply::Entries { entries, .. }) = volume.run(list(2, 100, 13)) else { panic!() };
    assert_eq!(entries.len(), 2);
    assert_eq!(refusal(volume.run(list(2, 100, 3))), Status::Invalid);
    assert_eq!(refusal(volume.run(list(5, 100, 300))), Status::BadCookie);
    assert_eq!(refusal(volume.run(list(u64::MAX, 100, 300))), Status::BadCookie);
    let Ok(Reply::Entries { entries, eof, .. }) = volume.run(list((1 << 63) - 1, 100, 300)) else { panic!() };
    assert_eq!((entries.len(), eof), (0, true));
}
