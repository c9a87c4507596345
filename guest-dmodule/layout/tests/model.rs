//! Random operations against the model, with remounts in between.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use layout::MountOptions;
use rig::model::{Pair, Taste, compare};
use rig::*;

fn course(seed: u64, blocks: u64, taste: Taste, steps: u64, options: MountOptions) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let mut volume = Volume::new(blocks, options);
    let mut pair = Pair::new(&volume);
    for step in 0..steps {
        pair.step(&mut volume, &mut random, taste);
        match random.below(60) {
            0 => volume.sync(),
            1 => volume.settle(),
            2 => {
                volume.check();
                volume = volume.remount();
            }
            _ => {}
        }
        if step % 200 == 199 {
            compare(&mut volume, &pair.model);
        }
    }
    compare(&mut volume, &pair.model);
    volume.check();
    let mut volume = volume.remount();
    compare(&mut volume, &pair.model);
    volume.settle();
    volume.check();
    compare(&mut volume, &pair.model);
}

#[test]
fn small_files() {
    for seed in 0..seeds(12) {
        course(seed, 8192, Taste { offset_bits: 17, write_max: 20_000, names: 30 }, 600, SMALL);
    }
}

#[test]
fn sparse_files() {
    for seed in 100..100 + seeds(12) {
        course(seed, 16_384, Taste { offset_bits: 42, write_max: 9_000, names: 12 }, 600, SMALL);
    }
}

#[test]
fn files_around_the_heights_of_trees() {
    let options = MountOptions { verifier: 1, cache_blocks: 2048, dirty_blocks: 1024 };
    for seed in 200..200 + seeds(6) {
        course(seed, 65_536, Taste { offset_bits: 24, write_max: 300_000, names: 10 }, 300, options);
    }
}

#[test]
fn directories_of_several_leaves() {
    for seed in 300..300 + seeds(6) {
        course(seed, 16_384, Taste { offset_bits: 10, write_max: 3000, names: 3000 }, 3000, SMALL);
    }
}

#[test]
fn a_full_volume() {
    for seed in 400..400 + seeds(12) {
        course(seed, 700, Taste { offset_bits: 22, write_max: 100_000, names: 40 }, 600, SMALL);
    }
}
