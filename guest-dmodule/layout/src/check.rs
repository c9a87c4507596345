//! The checker: walks a whole volume on disk and compares everything with everything. Shares nothing with the
//! operations but the encodings. For tests and for an administrator who doubts; mounting never needs it.
use crate::block::{BLOCK_SIZE, Block, BlockNumber, BlockPointer, FANOUT, FANOUT_BITS, get_u32};
use crate::directory::{hash, prefix};
use crate::error::LayoutError;
use crate::fsinfo::{FIRST_BLOCK, FSINFO_BLOCKS, FsInfo, MAP_BITS};
use crate::inode::{
    BLOCK_MAP, DEPTH_MAX, FIRST_INODE, INODE_FILE, INODE_MAP, INODE_SIZE, INODES_PER_BLOCK, Inode, Kind, OWNER_FILE,
    ROOT, ROOTS, SESSION_FILE,
};
use crate::leaf::Leaf;
use crate::ops::{check_name, is_dots};
use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec,
    vec::Vec,
};
use fabric::fs::FileKind;

/// Most faults described.
const FAULTS_MAX: usize = 100;

/// What the checker found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What is wrong, at most 100 of it; empty: the volume is consistent.
    pub faults: Vec<String>,
    /// Consistency point looked at.
    pub generation: u64,
    /// Blocks in use, without those at fixed places.
    pub blocks: u64,
    /// Files that are not directories.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Trees waiting to be freed.
    pub orphans: u64,
}

/// Checks the volume whose blocks `read` gives (`None`: cannot be read). Reads every block in use.
pub fn check(read: &mut dyn FnMut(BlockNumber) -> Option<Block>) -> Result<Report, LayoutError> {
    let copies = FSINFO_BLOCKS.map(|number| read(number).unwrap_or_else(Block::zeroed));
    let info = FsInfo::newest([copies[0].as_ref(), copies[1].as_ref()])?;
    let seen = vec![0; info.blocks.div_ceil(64) as usize];
    let report = Report { generation: info.generation, ..Report::default() };
    let mut checker = Checker { read, info, seen, report, inodes: BTreeMap::new(), links: BTreeMap::new() };
    checker.run();
    Ok(checker.report)
}

type Data = BTreeMap<u64, Block>;

struct Checker<'a> {
    read: &'a mut dyn FnMut(BlockNumber) -> Option<Block>,
    info: FsInfo,
    seen: Vec<u64>,
    report: Report,
    inodes: BTreeMap<u64, Inode>,
    /// Entries that lead to an inode.
    links: BTreeMap<u64, u32>,
}

impl Checker<'_> {
    fn fault(&mut self, what: String) {
        if self.report.faults.len() < FAULTS_MAX {
            self.report.faults.push(what);
        }
    }

    fn run(&mut self) {
        let inode_file = self.meta(INODE_FILE);
        let inode_map = self.meta(INODE_MAP);
        let block_map = self.meta(BLOCK_MAP);
        self.meta(SESSION_FILE);
        self.meta(OWNER_FILE);
        self.collect_inodes(&inode_file, &inode_map);
        self.check_orphans();
        let files: Vec<(u64, Inode)> = self.inodes.iter().map(|(number, inode)| (*number, *inode)).collect();
        for (number, inode) in files {
            self.check_file(number, &inode);
        }
        self.check_links();
        self.check_block_map(&block_map);
    }

    fn meta(&mut self, number: u64) -> Data {
        let inode = self.info.counters.meta[number as usize - 1];
        self.tree(number, &inode, true)
    }

    /// Walks a tree; its data blocks, if wanted.
    fn tree(&mut self, number: u64, inode: &Inode, keep: bool) -> Data {
        let mut data = Data::new();
        let mut used = 0;
        for index in 0..ROOTS {
            let root = inode.roots[index as usize];
            self.node(number, root, (inode.height, index), keep, &mut data, &mut used);
        }
        if inode.used < used && inode.kind != Kind::Orphan {
            self.fault(format!("inode {number}: {used} blocks in use, says {}", inode.used));
        }
        data
    }

    fn node(
        &mut self,
        number: u64,
        pointer: BlockPointer,
        (level, index): (u8, u64),
        keep: bool,
        data: &mut Data,
        used: &mut u64,
    ) {
        if pointer.is_hole() {
            return;
        }
        let at = pointer.block;
        if at < FIRST_BLOCK || at >= self.info.blocks {
            return self.fault(format!("inode {number}: level {level} index {index} points to block {at}"));
        }
        let bit = 1 << (at % 64);
        if self.seen[(at / 64) as usize] & bit != 0 {
            return self.fault(format!("inode {number}: block {at} is used twice"));
        }
        self.seen[(at / 64) as usize] |= bit;
        self.report.blocks += 1;
        *used += 1;
        let Some(block) = (self.read)(BlockNumber(at)) else {
            return self.fault(format!("inode {number}: block {at} cannot be read"));
        };
        if block.hash() != pointer.hash {
            return self.fault(format!("inode {number}: block {at} has a wrong checksum"));
        }
        if level > 0 {
            for slot in 0..FANOUT {
                let place = (level - 1, (index << FANOUT_BITS) + slot);
                self.node(number, block.pointer(slot as usize), place, keep, data, used);
            }
        } else {
            let size = self.inodes.get(&number).filter(|inode| inode.is_regular()).map(|inode| inode.size);
            if let Some(size) = size {
                let inside = size.saturating_sub(index * BLOCK_SIZE as u64).min(BLOCK_SIZE as u64) as usize;
                if inside == 0 {
                    self.fault(format!("inode {number}: block {index} is behind the end of the file"));
                } else if block.bytes()[inside..].iter().any(|byte| *byte != 0) {
                    self.fault(format!("inode {number}: bytes behind the end are not zero"));
                }
            }
            if keep {
                data.insert(index, block);
            }
        }
    }

    fn collect_inodes(&mut self, inode_file: &Data, inode_map: &Data) {
        for (index, block) in inode_file {
            for slot in 0..INODES_PER_BLOCK {
                let number = index * INODES_PER_BLOCK + slot;
                let at = slot as usize * INODE_SIZE;
                match Inode::decode(&block.bytes()[at..at + INODE_SIZE]) {
                    None => self.fault(format!("inode {number} cannot be read")),
                    Some(inode) if inode.kind == Kind::Free => {}
                    Some(_) if number < FIRST_INODE || number >= self.info.inodes_max => {
                        self.fault(format!("inode {number} is in use"));
                    }
                    Some(inode) => {
                        self.inodes.insert(number, inode);
                    }
                }
            }
        }
        let mut marked = BTreeSet::new();
        for (index, block) in inode_map {
            for bit in 0..MAP_BITS {
                if block.bytes()[(bit / 8) as usize] >> (bit % 8) & 1 == 1 {
                    marked.insert(index * MAP_BITS + bit);
                }
            }
        }
        let held: BTreeSet<u64> = self.inodes.keys().copied().collect();
        for number in held.symmetric_difference(&marked) {
            self.fault(format!("inode {number}: inode file and inode map differ"));
        }
        if self.info.counters.inodes_used != held.len() as u64 {
            let says = self.info.counters.inodes_used;
            self.fault(format!("{} inodes in use, fsinfo says {says}", held.len()));
        }
    }

    fn check_orphans(&mut self) {
        let mut listed = BTreeSet::new();
        let mut at = self.info.counters.first_orphan;
        while at != 0 {
            let next = self.inodes.get(&at).filter(|inode| inode.kind == Kind::Orphan).map(|inode| inode.next_orphan);
            let Some(next) = next else {
                return self.fault(format!("inode {at} is in the list of orphans and is none"));
            };
            if !listed.insert(at) {
                return self.fault(format!("inode {at} is twice in the list of orphans"));
            }
            at = next;
        }
        let all = self.inodes.values().filter(|inode| inode.kind == Kind::Orphan).count();
        if all != listed.len() {
            self.fault(format!("{all} orphans, {} in the list", listed.len()));
        }
        self.report.orphans = all as u64;
    }

    fn check_file(&mut self, number: u64, inode: &Inode) {
        let data = self.tree(number, inode, inode.is_dir());
        match inode.kind {
            Kind::File(FileKind::Directory) => {
                self.report.directories += 1;
                self.check_directory(number, inode, &data);
            }
            Kind::File(_) => self.report.files += 1,
            Kind::Orphan => {}
            Kind::Free | Kind::Meta => self.fault(format!("inode {number} is of an impossible kind")),
        }
    }

    fn check_directory(&mut self, number: u64, inode: &Inode, data: &Data) {
        if inode.depth > DEPTH_MAX {
            return self.fault(format!("directory {number}: depth {}", inode.depth));
        }
        let mut entries = 0;
        let mut names = BTreeSet::new();
        let mut index = 0;
        while inode.size > 0 && index < 1 << inode.depth {
            let place = if inode.depth == 0 {
                Some(u64::from(inode.table))
            } else {
                let table = data.get(&(u64::from(inode.table) + index / 1024));
                table.map(|table| u64::from(get_u32(table.bytes(), (index % 1024) as usize * 4)))
            };
            let leaf = place.and_then(|place| data.get(&place)).and_then(|block| Leaf::parse(block.bytes()));
            let Some(leaf) = leaf.filter(|leaf| leaf.depth <= inode.depth) else {
                return self.fault(format!("directory {number}: no leaf at {index}"));
            };
            let step = 1 << (inode.depth - leaf.depth);
            if index % step != 0 {
                return self.fault(format!("directory {number}: leaf at {index} begins elsewhere"));
            }
            for entry in leaf.entries() {
                entries += 1;
                let name = String::from_utf8_lossy(entry.name);
                if check_name(entry.name).is_err() || is_dots(entry.name) || !names.insert(entry.name) {
                    self.fault(format!("directory {number}: name {name:?}"));
                }
                let expected = hash(self.info.seed, entry.name);
                if entry.cookie & !7 != expected || prefix(entry.cookie, leaf.depth) != index / step {
                    self.fault(format!("directory {number}: {name:?} is in the wrong place"));
                }
                self.check_entry(number, entry.inode, entry.kind, &name);
            }
            index += step;
        }
        if entries != inode.entries {
            self.fault(format!("directory {number}: {entries} entries, says {}", inode.entries));
        }
    }

    fn check_entry(&mut self, dir: u64, number: u64, kind: u8, name: &str) {
        *self.links.entry(number).or_default() += 1;
        let Some(inode) = self.inodes.get(&number) else {
            return self.fault(format!("directory {dir}: {name:?} leads to inode {number}, which is free"));
        };
        if !matches!(inode.kind, Kind::File(is) if is as u8 == kind) {
            return self.fault(format!("directory {dir}: {name:?} is not of the kind of inode {number}"));
        }
        if inode.is_dir() {
            if inode.parent != dir {
                self.fault(format!("directory {number} is in {dir}, says {}", inode.parent));
            }
            *self.links.entry(dir).or_default() += 1;
        }
    }

    fn check_links(&mut self) {
        let inodes: Vec<(u64, Inode)> = self.inodes.iter().map(|(number, inode)| (*number, *inode)).collect();
        for (number, inode) in inodes.iter().filter(|(_, inode)| matches!(inode.kind, Kind::File(_))) {
            let found = self.links.get(number).copied().unwrap_or(0);
            // A directory's own `.`; the root has itself for a parent.
            let own = if inode.is_dir() { 1 } else { 0 } + u32::from(*number == ROOT);
            if found + own != inode.links {
                self.fault(format!("inode {number}: {} links found, says {}", found + own, inode.links));
            }
            self.check_reachable(*number, inode);
        }
        match self.inodes.get(&ROOT) {
            Some(root) if root.is_dir() && root.parent == ROOT => {}
            _ => self.fault(String::from("no root directory")),
        }
    }

    fn check_reachable(&mut self, number: u64, inode: &Inode) {
        let (mut at, mut steps) = (inode.parent, 0);
        while inode.is_dir() && at != ROOT {
            steps += 1;
            match self.inodes.get(&at) {
                Some(above) if above.is_dir() && steps <= self.inodes.len() => at = above.parent,
                _ => return self.fault(format!("directory {number} does not hang below the root")),
            }
        }
    }

    fn check_block_map(&mut self, map: &Data) {
        for word in 0..self.seen.len() as u64 {
            let held = map.get(&(word * 64 / MAP_BITS));
            let bits = held.map_or(0, |block| crate::space::word(block.bytes(), word % (MAP_BITS / 64)));
            let seen = self.seen[word as usize];
            for bit in (0..64).filter(|bit| (bits ^ seen) >> bit & 1 == 1) {
                let block = word * 64 + bit;
                let what = if seen >> bit & 1 == 1 { "in use and marked free" } else { "leaked" };
                self.fault(format!("block {block} is {what}"));
            }
        }
        let free = self.info.blocks - FIRST_BLOCK - self.report.blocks;
        if free != self.info.counters.free_blocks {
            let says = self.info.counters.free_blocks;
            self.fault(format!("{free} free blocks, fsinfo says {says}"));
        }
    }
}
