//! What a file system should do, in the simplest way, and random operations done on both.
use super::{Random, Volume, pattern};
use fabric::fs::{CreateHow, Credential, FileHandle, FileKind, SetAttr, Stability, Status, Time};
use fabric::id::{Epoch, Sequence, Slot, VmId};
use fabric::op::{Op, Outcome, Reply, Request};
use layout::{Completed, KeepKey};
use std::collections::{BTreeMap, HashSet};

pub const VM: VmId = VmId(77);
const SESSION: Epoch = Epoch(3);
const CHUNK: u64 = 1000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: FileKind,
    pub links: u32,
    pub mode: u32,
    pub size: u64,
    /// Content by pieces of [`CHUNK`] bytes; what is missing is zero.
    pub chunks: BTreeMap<u64, Vec<u8>>,
    pub entries: BTreeMap<Vec<u8>, FileHandle>,
    pub parent: FileHandle,
    pub target: Vec<u8>,
}

impl Node {
    fn new(kind: FileKind, parent: FileHandle) -> Self {
        let links = if kind == FileKind::Directory { 2 } else { 1 };
        Node {
            kind,
            links,
            mode: 0,
            size: 0,
            chunks: BTreeMap::new(),
            entries: BTreeMap::new(),
            parent,
            target: Vec::new(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            let chunk = self.chunks.entry(at / CHUNK).or_insert_with(|| vec![0; CHUNK as usize]);
            chunk[(at % CHUNK) as usize] = *byte;
        }
        // A write of nothing does not make a file longer (POSIX).
        if !data.is_empty() {
            self.size = self.size.max(offset + data.len() as u64);
        }
    }

    fn truncate(&mut self, size: u64) {
        self.chunks.split_off(&size.div_ceil(CHUNK));
        if let Some(chunk) = self.chunks.get_mut(&(size / CHUNK)) {
            chunk[(size % CHUNK) as usize..].fill(0);
        }
        self.size = size;
    }

    fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let end = (offset + length).min(self.size);
        let mut data = Vec::new();
        let mut at = offset;
        while at < end {
            let from = (at % CHUNK) as usize;
            let to = (end - at + from as u64).min(CHUNK) as usize;
            match self.chunks.get(&(at / CHUNK)) {
                Some(chunk) => data.extend_from_slice(&chunk[from..to]),
                None => data.resize(data.len() + to - from, 0),
            }
            at += (to - from) as u64;
        }
        data
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub root: FileHandle,
    pub nodes: BTreeMap<FileHandle, Node>,
    /// Kept replies by slot.
    pub kept: BTreeMap<u16, Vec<u8>>,
}

/// What random operations are like.
#[derive(Clone, Copy)]
pub struct Taste {
    /// Largest offset of a write, as a power of two.
    pub offset_bits: u64,
    pub write_max: u64,
    pub names: u64,
}

impl Model {
    pub fn new(root: FileHandle) -> Self {
        let mut nodes = BTreeMap::new();
        nodes.insert(root, Node::new(FileKind::Directory, root));
        Model { root, nodes, kept: BTreeMap::new() }
    }

    fn node(&mut self, handle: FileHandle) -> &mut Node {
        self.nodes.get_mut(&handle).unwrap()
    }

    fn pick(&self, random: &mut Random, kind: Option<FileKind>) -> Option<FileHandle> {
        let fits: Vec<FileHandle> =
            self.nodes.iter().filter(|(_, node)| kind.is_none_or(|kind| node.kind == kind)).map(|(h, _)| *h).collect();
        (!fits.is_empty()).then(|| fits[random.below(fits.len() as u64) as usize])
    }

    fn is_below(&self, mut dir: FileHandle, above: FileHandle) -> bool {
        loop {
            if dir == above {
                return true;
            }
            if dir == self.root {
                return false;
            }
            dir = self.nodes[&dir].parent;
        }
    }

    fn unlink(&mut self, handle: FileHandle) {
        let node = self.node(handle);
        if node.kind == FileKind::Directory {
            let parent = node.parent;
            self.node(parent).links -= 1;
            self.nodes.remove(&handle);
        } else {
            node.links -= 1;
            if node.links == 0 {
                self.nodes.remove(&handle);
            }
        }
    }

    /// What the operation gives here; `Ok(Some)` names the new object's kind.
    fn expect(&self, op: &Op) -> Result<(), Status> {
        let entry = |dir: &FileHandle, name: &[u8]| self.nodes[dir].entries.get(name).copied();
        match op {
            Op::Create { dir, name, how } => match (entry(dir, name), how) {
                (None, _) => Ok(()),
                (Some(file), CreateHow::Unchecked(_)) if self.nodes[&file].kind == FileKind::Regular => Ok(()),
                _ => Err(Status::Exists),
            },
            Op::MakeDir { dir, name, .. } | Op::Symlink { dir, name, .. } => {
                if entry(dir, name).is_some() {
                    Err(Status::Exists)
                } else {
                    Ok(())
                }
            }
            Op::Link { handle, dir, name } => {
                if entry(dir, name).is_some() {
                    Err(Status::Exists)
                } else if self.nodes[handle].kind == FileKind::Directory {
                    Err(Status::NotPermitted)
                } else {
                    Ok(())
                }
            }
            Op::Remove { dir, name } => match entry(dir, name) {
                None => Err(Status::NotFound),
                Some(file) if self.nodes[&file].kind == FileKind::Directory => Err(Status::IsDirectory),
                Some(_) => Ok(()),
            },
            Op::RemoveDir { dir, name } => match entry(dir, name) {
                None => Err(Status::NotFound),
                Some(sub) if self.nodes[&sub].kind != FileKind::Directory => Err(Status::NotDirectory),
                Some(sub) if !self.nodes[&sub].entries.is_empty() => Err(Status::NotEmpty),
                Some(_) => Ok(()),
            },
            Op::Rename { from_dir, from_name, to_dir, to_name } => {
                let from = entry(from_dir, from_name).ok_or(Status::NotFound)?;
                let from_is_dir = self.nodes[&from].kind == FileKind::Directory;
                if let Some(to) = entry(to_dir, to_name) {
                    let to_is_dir = self.nodes[&to].kind == FileKind::Directory;
                    match (from_is_dir, to_is_dir) {
                        _ if from == to => return Ok(()),
                        (true, false) => return Err(Status::NotDirectory),
                        (false, true) => return Err(Status::IsDirectory),
                        (true, true) if !self.nodes[&to].entries.is_empty() => return Err(Status::NotEmpty),
                        _ => {}
                    }
                }
                if from_is_dir && from_dir != to_dir && self.is_below(*to_dir, from) {
                    return Err(Status::Invalid);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The operation has succeeded, with this reply.
    fn apply(&mut self, op: &Op, reply: &Reply) {
        match (op, reply) {
            (Op::Create { dir, name, how }, Reply::Created { attr, .. }) => {
                if let Some(file) = self.nodes[dir].entries.get(name) {
                    assert_eq!(*file, attr.handle);
                    if let CreateHow::Unchecked(SetAttr { size: Some(size), .. }) = how {
                        let file = *file;
                        self.node(file).truncate(*size);
                    }
                    return;
                }
                self.add(*dir, name, attr.handle, Node { mode: attr.mode, ..Node::new(FileKind::Regular, *dir) });
                if let CreateHow::Unchecked(SetAttr { size: Some(size), .. }) = how {
                    self.node(attr.handle).size = *size;
                }
            }
            (Op::MakeDir { dir, name, .. }, Reply::Created { attr, .. }) => {
                self.add(*dir, name, attr.handle, Node { mode: attr.mode, ..Node::new(FileKind::Directory, *dir) });
                self.node(*dir).links += 1;
            }
            (Op::Symlink { dir, name, target, .. }, Reply::Created { attr, .. }) => {
                let node = Node { mode: 0o777, target: target.clone(), ..Node::new(FileKind::Symlink, *dir) };
                self.add(*dir, name, attr.handle, Node { size: target.len() as u64, ..node });
            }
            (Op::Link { handle, dir, name }, Reply::Linked { .. }) => {
                self.node(*handle).links += 1;
                self.node(*dir).entries.insert(name.clone(), *handle);
            }
            (Op::Remove { dir, name } | Op::RemoveDir { dir, name }, Reply::Wcc(_)) => {
                let gone = self.node(*dir).entries.remove(name).unwrap();
                self.unlink(gone);
            }
            (Op::Rename { from_dir, from_name, to_dir, to_name }, Reply::Wcc2(..)) => {
                let from = self.nodes[from_dir].entries[from_name];
                let to = self.nodes[to_dir].entries.get(to_name).copied();
                if to == Some(from) {
                    return;
                }
                self.node(*from_dir).entries.remove(from_name);
                self.node(*to_dir).entries.insert(to_name.clone(), from);
                if let Some(to) = to {
                    self.unlink(to);
                }
                if self.nodes[&from].kind == FileKind::Directory {
                    self.node(*from_dir).links -= 1;
                    self.node(*to_dir).links += 1;
                    self.node(from).parent = *to_dir;
                }
            }
            (Op::Write { handle, offset, data, .. }, Reply::Written { .. }) => self.node(*handle).write(*offset, data),
            (Op::SetAttr { handle, set, .. }, Reply::Wcc(_)) => {
                let node = self.node(*handle);
                if let Some(size) = set.size {
                    node.truncate(size);
                }
                node.mode = set.mode.unwrap_or(node.mode);
            }
            other => panic!("unexpected reply: {other:?}"),
        }
    }

    fn add(&mut self, dir: FileHandle, name: &[u8], handle: FileHandle, node: Node) {
        assert!(self.nodes.insert(handle, node).is_none(), "handle in use");
        self.node(dir).entries.insert(name.to_vec(), handle);
    }

    pub fn random_op(&self, random: &mut Random, taste: Taste) -> Op {
        let name = |random: &mut Random| {
            let number = random.below(taste.names);
            // One name in four is long.
            let mut name = format!("n{number}").into_bytes();
            if number.is_multiple_of(4) {
                name.resize(200, b'x');
            }
            name
        };
        let dir = self.pick(random, Some(FileKind::Directory)).unwrap();
        let file = self.pick(random, Some(FileKind::Regular));
        let offset = |random: &mut Random| {
            let offset = random.next() >> (64 - random.below(taste.offset_bits + 1)).min(63);
            if random.chance(50) { offset & !4095 } else { offset }
        };
        let mode = SetAttr { mode: Some(0o700 + random.below(64) as u32), ..SetAttr::default() };
        match (random.below(100), file) {
            (0..=9, _) => Op::Create { dir, name: name(random), how: CreateHow::Guarded(mode) },
            (10..=16, _) => {
                let size = random.chance(50).then(|| offset(random));
                Op::Create { dir, name: name(random), how: CreateHow::Unchecked(SetAttr { size, ..mode }) }
            }
            (17..=24, _) => Op::MakeDir { dir, name: name(random), set: mode },
            (25..=28, _) => {
                let target = pattern(random.next(), 1 + random.below(1024) as usize).iter().map(|b| b | 1).collect();
                Op::Symlink { dir, name: name(random), target, set: SetAttr::default() }
            }
            (29..=38, _) => Op::Remove { dir, name: name(random) },
            (39..=43, _) => Op::RemoveDir { dir, name: name(random) },
            (44..=54, _) => {
                let to_dir = self.pick(random, Some(FileKind::Directory)).unwrap();
                Op::Rename { from_dir: dir, from_name: name(random), to_dir, to_name: name(random) }
            }
            (55..=59, _) => Op::Link { handle: self.pick(random, None).unwrap(), dir, name: name(random) },
            (60..=69, Some(handle)) => {
                let size = random.chance(80).then(|| offset(random));
                Op::SetAttr { handle, set: SetAttr { size, ..mode }, guard: None }
            }
            (_, Some(handle)) => {
                let mut data = pattern(random.next(), random.below(taste.write_max) as usize);
                if random.chance(50) {
                    data.truncate(data.len() & !4095);
                }
                let stability = if random.chance(30) { Stability::FileSync } else { Stability::Unstable };
                Op::Write { handle, offset: offset(random), stability, data }
            }
            _ => Op::Create { dir, name: name(random), how: CreateHow::Guarded(mode) },
        }
    }
}

/// A volume and what it should be.
pub struct Pair {
    pub model: Model,
    pub used: HashSet<FileHandle>,
    pub ctimes: BTreeMap<FileHandle, Time>,
    pub sequence: u64,
}

impl Pair {
    pub fn new(volume: &Volume) -> Self {
        Pair { model: Model::new(volume.root()), used: HashSet::new(), ctimes: BTreeMap::new(), sequence: 0 }
    }

    /// One random operation on both. `None` if the volume is full.
    pub fn step(&mut self, volume: &mut Volume, random: &mut Random, taste: Taste) -> Option<Completed> {
        let op = self.model.random_op(random, taste);
        let slot = random.below(8) as u16;
        self.sequence += 1;
        let key = KeepKey { vm_id: VM, slot: Slot(slot), session: SESSION, sequence: Sequence(self.sequence) };
        let keep = (op.is_non_idempotent() && random.chance(70)).then_some(key);
        let expected = self.model.expect(&op);
        let before: HashSet<FileHandle> = self.model.nodes.keys().copied().collect();
        let done = volume.try_execute(&Request { credential: Credential::ROOT, op: op.clone() }, keep);
        match (&done.outcome, expected) {
            (Err(failure), Ok(())) if failure.status == Status::NoSpace => return None,
            (Err(failure), expected) => assert_eq!(Err(failure.status), expected, "{op:?}"),
            (Ok(reply), Ok(())) => {
                self.model.apply(&op, reply);
                if let Some(key) = keep {
                    let kept = fabric::wire::encode_kept(key.session, key.sequence, &done.outcome).unwrap();
                    self.model.kept.insert(slot, kept);
                }
                if let Reply::Created { attr, .. } = reply
                    && !before.contains(&attr.handle)
                {
                    assert!(self.used.insert(attr.handle), "handle used before");
                }
                self.follow_ctimes(reply);
            }
            (Ok(_), Err(status)) => panic!("{op:?} should have failed with {status}"),
        }
        Some(done)
    }

    fn follow_ctimes(&mut self, reply: &Reply) {
        let changed = match reply {
            Reply::Wcc(wcc) | Reply::Written { wcc, .. } => vec![wcc.after],
            Reply::Created { attr, dir } | Reply::Linked { attr, dir } => vec![Some(*attr), dir.after],
            Reply::Wcc2(from, to) => vec![from.after, to.after],
            _ => Vec::new(),
        };
        for attr in changed.into_iter().flatten() {
            let old = self.ctimes.insert(attr.handle, attr.ctime);
            assert!(old.is_none_or(|old| attr.ctime >= old), "ctime went back");
        }
    }
}

/// The volume holds exactly what the model holds.
pub fn compare(volume: &mut Volume, model: &Model) {
    for (handle, node) in &model.nodes {
        let attr = volume.attr(*handle);
        assert_eq!((attr.kind, attr.links), (node.kind, node.links), "{handle:?}");
        if *handle != model.root {
            assert_eq!(attr.mode, node.mode, "{handle:?}");
        }
        match node.kind {
            FileKind::Directory => compare_dir(volume, *handle, node),
            FileKind::Symlink => match volume.run(Op::ReadLink { handle: *handle }) {
                Ok(Reply::Target { target, .. }) => assert_eq!(target, node.target),
                other => panic!("readlink: {other:?}"),
            },
            _ => {
                assert_eq!(attr.size, node.size, "{handle:?}");
                compare_content(volume, *handle, node);
            }
        }
    }
    for slot in 0..8 {
        let kept = volume.kept(VM, Slot(slot));
        assert_eq!(kept.as_ref(), model.kept.get(&slot), "kept reply of slot {slot}");
    }
}

fn compare_dir(volume: &mut Volume, dir: FileHandle, node: &Node) {
    let (mut cookie, mut found) = (0, BTreeMap::new());
    loop {
        let op = Op::ReadDir { dir, cookie, max_entries: 7, max_bytes: 4000, plus: true };
        let Ok(Reply::Entries { entries, eof, .. }) = volume.run(op) else { panic!("readdir") };
        for entry in entries {
            assert!(entry.cookie > cookie);
            cookie = entry.cookie;
            let attr = entry.attr.unwrap();
            assert_eq!(attr.handle.inode, entry.inode);
            assert!(found.insert(entry.name, attr.handle).is_none());
        }
        if eof {
            break;
        }
    }
    assert_eq!(found.remove(&b"."[..]), Some(dir));
    assert_eq!(found.remove(&b".."[..]), Some(node.parent));
    assert_eq!(found, node.entries);
}

fn compare_content(volume: &mut Volume, handle: FileHandle, node: &Node) {
    let mut places: Vec<u64> = node.chunks.keys().map(|at| at * CHUNK).collect();
    places.extend([0, node.size.saturating_sub(500), node.size / 2]);
    places.sort_unstable();
    let mut end = 0;
    for at in places {
        if at >= end {
            let got = volume.read(handle, at, 50_000);
            assert!(got == node.read(at, 50_000), "{handle:?}: content at {at} differs");
            end = at + got.len() as u64;
        }
    }
}

/// What an operation was refused with.
pub fn refusal(outcome: Outcome) -> Status {
    outcome.expect_err("should be refused").status
}
