//! Feeds a target for a bounded number of rounds, in the tests: the seeds as they are, then what is made of them.
//!
//! `FUZZ_ROUNDS` in the environment is another number of rounds, `FUZZ_SEED` another beginning. A finding is printed as
//! hexadecimal, to become a regression test; no file is written.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Target;
use crate::mutate::{Random, input};

fn from_environment(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")),
        Err(_) => default,
    }
}

/// Feeds `target`.
///
/// # Panics
/// On a finding.
pub fn run(target: &Target) {
    let rounds = from_environment("FUZZ_ROUNDS", target.rounds);
    let first = from_environment("FUZZ_SEED", 1) << 32;
    let seeds = (target.seeds)();
    for seed in &seeds {
        feed(target, seed, "a seed");
    }
    for round in 0..rounds {
        let mut random = Random::new(first + round);
        feed(target, &input(&seeds, &mut random), &format!("round {round}"));
    }
}

fn feed(target: &Target, bytes: &[u8], which: &str) {
    if catch_unwind(AssertUnwindSafe(|| target.feed(bytes))).is_err() {
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        panic!("{} fails with this input ({which}): {hex}", target.name);
    }
}

/// An input as [`run`] printed it.
///
/// # Panics
/// When it is no hexadecimal.
pub fn unhex(text: &str) -> Vec<u8> {
    let text: String = text.split_whitespace().collect();
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap_or_else(|e| panic!("{e}")))
        .collect()
}
