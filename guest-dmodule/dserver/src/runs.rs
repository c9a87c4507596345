//! Contiguous blocks as one transfer.
use alloc::vec::Vec;
use layout::{Block, BlockNumber};

/// Most blocks of one transfer: 1 MiB.
pub const RUN_MAX: usize = 256;

/// Blocks to write one after the other.
#[derive(Debug)]
pub struct Run {
    /// Where the first goes.
    pub first: BlockNumber,
    /// The blocks.
    pub blocks: Vec<Block>,
}

/// Cuts blocks in ascending order of their number into runs of at most [`RUN_MAX`].
pub fn runs(writes: Vec<(BlockNumber, Block)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, block) in writes {
        match runs.last_mut() {
            Some(run) if run.blocks.len() < RUN_MAX && run.first.0 + run.blocks.len() as u64 == number.0 => {
                run.blocks.push(block);
            }
            _ => runs.push(Run { first: number, blocks: alloc::vec![block] }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_go_together() {
        let numbers = [4, 5, 6, 9, 11, 12];
        let cut: Vec<(u64, usize)> = runs(numbers.map(|n| (BlockNumber(n), Block::zeroed())).into())
            .iter()
            .map(|r| (r.first.0, r.blocks.len()))
            .collect();
        assert_eq!(cut, [(4, 3), (9, 1), (11, 2)]);
        let long = (0..600).map(|n| (BlockNumber(n), Block::zeroed())).collect();
        let cut: Vec<usize> = runs(long).iter().map(|r| r.blocks.len()).collect();
        assert_eq!(cut, [256, 256, 88]);
    }
}
