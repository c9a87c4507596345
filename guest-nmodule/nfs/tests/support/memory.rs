//! A small file system in memory, for the time until the data layout can stand here.
use fabric::fs::*;
use fabric::op::{Failure, Op, Outcome, Reply};
use nfs::service::{FileService, Unreachable};
use std::cell::RefCell;
use std::collections::BTreeMap;

struct Node {
    attr: Attr,
    data: Vec<u8>,
    entries: BTreeMap<Vec<u8>, u64>,
    parent: u64,
    verifier: Option<u64>,
}

pub struct Memory {
    nodes: RefCell<BTreeMap<u64, Node>>,
    clock: RefCell<i64>,
}

const ROOT: u64 = 2;

impl Memory {
    pub fn new() -> Self {
        let memory = Memory { nodes: RefCell::default(), clock: RefCell::new(1_700_000_000_000_000_000) };
        let mut nodes = memory.nodes.borrow_mut();
        let root = memory.node(ROOT, FileKind::Directory, ROOT, &SetAttr { mode: Some(0o755), ..Default::default() });
        nodes.insert(ROOT, root);
        drop(nodes);
        memory
    }

    fn now(&self) -> Time {
        *self.clock.borrow_mut() += 1000;
        Time(*self.clock.borrow())
    }

    fn node(&self, inode: u64, kind: FileKind, parent: u64, set: &SetAttr) -> Node {
        let now = self.now();
        let attr = Attr {
            handle: FileHandle { volume: VolumeId(1), generation: 1, inode },
            kind,
            mode: set.mode.unwrap_or(0o644),
            links: if kind == FileKind::Directory { 2 } else { 1 },
            uid: set.uid.unwrap_or(0),
            gid: set.gid.unwrap_or(0),
            size: 0,
            used: 0,
            rdev: (0, 0),
            atime: now,
            mtime: now,
            ctime: now,
        };
        Node { attr, data: Vec::new(), entries: BTreeMap::new(), parent, verifier: None }
    }

    fn execute(&self, op: Op) -> Outcome {
        let nodes = &mut *self.nodes.borrow_mut();
        let check = |nodes: &BTreeMap<u64, Node>, handle: FileHandle| match nodes.get(&handle.inode) {
            Some(node) if node.attr.handle == handle => Ok(handle.inode),
            _ => Err(Failure::from(Status::Stale)),
        };
        let wcc = |before: Attr, after: Attr| Wcc {
            before: Some((before.size, before.mtime, before.ctime)),
            after: Some(after),
        };
        match op {
            Op::OpenVolume { name } if name == "vol0" => {
                Ok(Reply::Node { attr: nodes[&ROOT].attr, dir: nodes[&ROOT].attr })
            }
            Op::OpenVolume { .. } => Err(Status::NoVolume.into()),
            Op::GetAttr { handle } => Ok(Reply::Attr(nodes[&check(nodes, handle)?].attr)),
            Op::SetAttr { handle, set, guard } => {
                let id = check(nodes, handle)?;
                let now = self.now();
                let node = nodes.get_mut(&id).unwrap();
                let before = node.attr;
                if guard.is_some_and(|guard| guard != before.ctime) {
                    return Err(Failure { status: Status::NotSync, wcc: wcc(before, before), wcc2: Wcc::default() });
                }
                if let Some(size) = set.size {
                    node.data.resize(size as usize, 0);
                    node.attr.size = size;
                }
                node.attr.mode = set.mode.unwrap_or(before.mode);
                if let SetTime::To(time) = set.mtime {
                    node.attr.mtime = time;
                }
                node.attr.ctime = now;
                Ok(Reply::Wcc(wcc(before, node.attr)))
            }
            Op::Lookup { dir, name } => {
                let id = check(nodes, dir)?;
                let node = &nodes[&id];
                let found = match name.as_slice() {
                    b"." => Some(id),
                    b".." => Some(node.parent),
                    name => node.entries.get(name).copied(),
                };
                match found {
                    Some(found) => Ok(Reply::Node { attr: nodes[&found].attr, dir: node.attr }),
                    None => Err(Failure {
                        status: Status::NotFound,
                        wcc: Wcc { before: None, after: Some(node.attr) },
                        wcc2: Wcc::default(),
                    }),
                }
            }
            Op::Access { handle, want } => {
                Ok(Reply::Access { granted: want, attr: nodes[&check(nodes, handle)?].attr })
            }
            Op::Read { handle, offset, length } => {
                let node = &nodes[&check(nodes, handle)?];
                let start = node.data.len().min(offset as usize);
                let end = node.data.len().min(start + length as usize);
                Ok(Reply::Data { data: node.data[start..end].to_vec(), eof: end == node.data.len(), attr: node.attr })
            }
            Op::Write { handle, offset, stability, data } => {
                let id = check(nodes, handle)?;
                let now = self.now();
                let node = nodes.get_mut(&id).unwrap();
                let before = node.attr;
                let end = offset as usize + data.len();
                if node.data.len() < end {
                    node.data.resize(end, 0);
                }
                node.data[offset as usize..end].copy_from_slice(&data);
                node.attr.size = node.data.len() as u64;
                (node.attr.mtime, node.attr.ctime) = (now, now);
                Ok(Reply::Written { count: data.len() as u32, stability, verifier: 7, wcc: wcc(before, node.attr) })
            }
            Op::Create { dir, name, how } => {
                let (set, exclusive, unchecked) = match how {
                    CreateHow::Unchecked(set) => (set, None, true),
                    CreateHow::Guarded(set) => (set, None, false),
                    CreateHow::Exclusive(verifier) => (SetAttr::default(), Some(verifier), false),
                };
                let id = check(nodes, dir)?;
                let before = nodes[&id].attr;
                if let Some(old) = nodes[&id].entries.get(&name).copied() {
                    let node = nodes.get_mut(&old).unwrap();
                    if !unchecked && (exclusive.is_none() || node.verifier != exclusive) {
                        return Err(Status::Exists.into());
                    }
                    if let Some(size) = set.size {
                        node.data.resize(size as usize, 0);
                        node.attr.size = size;
                    }
                    return Ok(Reply::Created { attr: node.attr, dir: wcc(before, before) });
                }
                self.enter(nodes, id, name, FileKind::Regular, &set, exclusive)
            }
            Op::MakeDir { dir, name, set } => {
                let id = check(nodes, dir)?;
                if nodes[&id].entries.contains_key(&name) {
                    return Err(Status::Exists.into());
                }
                self.enter(nodes, id, name, FileKind::Directory, &set, None)
            }
            Op::Remove { dir, name } | Op::RemoveDir { dir, name } => {
                let id = check(nodes, dir)?;
                let before = nodes[&id].attr;
                let now = self.now();
                let Some(gone) = nodes.get_mut(&id).unwrap().entries.remove(&name) else {
                    return Err(Status::NotFound.into());
                };
                nodes.remove(&gone);
                let node = nodes.get_mut(&id).unwrap();
                (node.attr.mtime, node.attr.ctime) = (now, now);
                Ok(Reply::Wcc(wcc(before, node.attr)))
            }
            Op::ReadDir { dir, cookie, max_entries, plus, .. } => {
                let node = &nodes[&check(nodes, dir)?];
                let own = [(b".".to_vec(), node.attr.handle.inode), (b"..".to_vec(), node.parent)];
                let all: Vec<_> = own.into_iter().chain(node.entries.iter().map(|(n, i)| (n.clone(), *i))).collect();
                let rest = all.iter().enumerate().skip(cookie as usize);
                let entries: Vec<DirEntry> = rest
                    .take(max_entries as usize)
                    .map(|(index, (name, inode))| DirEntry {
                        cookie: index as u64 + 1,
                        inode: *inode,
                        name: name.clone(),
                        attr: plus.then(|| nodes[inode].attr),
                    })
                    .collect();
                let eof = cookie as usize + entries.len() >= all.len();
                Ok(Reply::Entries { entries, eof, dir: node.attr })
            }
            Op::VolumeStat { handle } => {
                let stat = VolumeStat { total_bytes: 1 << 30, free_bytes: 1 << 29, total_files: 1000, free_files: 900 };
                Ok(Reply::Stat { stat, attr: nodes[&check(nodes, handle)?].attr })
            }
            Op::Commit { handle, .. } => {
                let attr = nodes[&check(nodes, handle)?].attr;
                Ok(Reply::Committed { verifier: 7, wcc: wcc(attr, attr) })
            }
            _ => Err(Status::NotSupported.into()),
        }
    }

    fn enter(
        &self,
        nodes: &mut BTreeMap<u64, Node>,
        dir: u64,
        name: Vec<u8>,
        kind: FileKind,
        set: &SetAttr,
        verifier: Option<u64>,
    ) -> Outcome {
        let before = nodes[&dir].attr;
        let inode = nodes.keys().next_back().unwrap() + 1;
        let mut node = self.node(inode, kind, dir, set);
        node.verifier = verifier;
        let attr = node.attr;
        nodes.insert(inode, node);
        let now = self.now();
        let directory = nodes.get_mut(&dir).unwrap();
        directory.entries.insert(name, inode);
        (directory.attr.mtime, directory.attr.ctime) = (now, now);
        let wcc = Wcc { before: Some((before.size, before.mtime, before.ctime)), after: Some(directory.attr) };
        Ok(Reply::Created { attr, dir: wcc })
    }
}

impl FileService for Memory {
    async fn call(&self, _: Credential, op: Op) -> Result<Outcome, Unreachable> {
        tokio::task::yield_now().await;
        Ok(self.execute(op))
    }
}
