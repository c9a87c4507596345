//! The state file of a checkpoint.
//!
//! Asserted: what is parsed is what its own encoding says again.

use migration::checkpoint::{AT_REST, Checkpoint, CheckpointId, Content, HEADER_LEN, PageTable, Parent};
use migration::message::{CpuLeaf, Description};
use migration::section::{Section, Sections};
use migration::wire::Digest;

use crate::Target;

/// See the module. The first byte decides whether the checksums are put right, as an attacker would.
pub const TARGET: Target = Target { name: "checkpoint", run, seeds, memory: 4 << 20, rounds: 4000 };

fn sum(bytes: &[u8]) -> [u8; 8] {
    let mut digest = Digest::default();
    digest.update(bytes);
    digest.finish().to_le_bytes()
}

fn reseal(bytes: &mut [u8]) {
    if let Some((header, body)) = bytes.split_at_mut_checked(HEADER_LEN) {
        header[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
        header[24..32].copy_from_slice(&sum(body));
        let seal = sum(&header[..56]);
        header[56..].copy_from_slice(&seal);
    }
}

fn run(input: &[u8]) {
    let Some((how, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if !how.is_multiple_of(4) {
        reseal(&mut bytes);
    }
    let _ = Checkpoint::seal(&bytes);
    let Ok(checkpoint) = Checkpoint::parse(&bytes) else { return };
    // Not `iter`: a run of zero pages may be as long as memory.
    assert!(checkpoint.pages.sums().all(|(run, sums)| sums.is_empty() || sums.len() == run.pages as usize));
    assert!(checkpoint.pages.memory_file_len() <= checkpoint.limit);
    let again = checkpoint.encode().unwrap_or_else(|e| panic!("what was parsed cannot be encoded: {e}"));
    assert_eq!(Checkpoint::parse(&again).as_ref(), Ok(&checkpoint));
}

fn seeds() -> Vec<Vec<u8>> {
    let mut sections = Sections::new();
    for name in ["clock", "vcpu0"] {
        let _ = sections.push(Section { name: name.into(), version: 1, bytes: vec![1, 2, 3] });
    }
    let mut pages = PageTable::new();
    for page in [1, 2, 3, 7, 8, 100] {
        pages.push(page, Content::Raw(page * 3));
    }
    pages.push(101, Content::Zero);
    let cpu = vec![CpuLeaf { function: 1, index: 0, flags: 0, registers: [1, 2, 3, 4] }];
    let alone = Checkpoint {
        id: CheckpointId([7; 16]),
        created_ns: 5,
        limit: 8 << 20,
        flags: AT_REST,
        writer: "vmm 0.1.0".into(),
        parent: None,
        description: Description { memory_size: 8 << 20, vcpus: 1, tsc_khz: 2_000_000, cpu, config: b"{}".to_vec() },
        sections,
        pages,
    };
    let parent = Parent { id: CheckpointId([8; 16]), seal: 9, path: "../before".into() };
    let child = Checkpoint { parent: Some(parent), ..alone.clone() };
    [alone, child].iter().filter_map(|c| c.encode().ok()).map(|c| [&[1], &c[..]].concat()).collect()
}
