//! `cargo xtask test`: everything that must hold, cheap things first; cargo's own closing lines come last.
use crate::artifacts::{self, Artifacts};
use crate::setup::{self, Need};
use crate::{lab, nested, process};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Room for the disks of the system tests.
const DISK_BYTES: u64 = 6 << 30;

/// Columns of the failure matrix tried side by side: most of the time they wait.
const FAILURES_AT_ONCE: &str = "6";

/// A choice of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// All of them.
    #[default]
    All,
    /// Only the system tests, or those of them whose name contains a word.
    System,
}

/// Sets up, builds and runs the tests. `filter` chooses tests by name.
pub fn run(which: Which, filter: Option<&str>) -> Result<()> {
    let data = artifacts::data_dir()?;
    setup::prepare(Need::Test, &data, DISK_BYTES)?;
    for thing in lab::clean()? {
        eprintln!("removed {thing}, left by an earlier run");
    }
    let root = artifacts::workspace_root();
    setup::load_generator(&root, &data)?;
    if which == Which::All {
        eprintln!("format and lints");
        step(&root, &["fmt", "--all", "--check"])?;
        step(
            &root,
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--features",
                "xtask/system",
                "--locked",
                "--",
                "-D",
                "warnings",
            ],
        )?;
    }
    let artifacts = Artifacts::build()?;
    nested::fetch(&artifacts.target)?;
    let mut cargo = images::cargo(&root);
    cargo.args(["test", "--locked", "--no-fail-fast", "--features", "xtask/system"]);
    match which {
        Which::All => cargo.arg("--workspace"),
        Which::System => cargo.args(["--package", "xtask", "--test", "system", "--test", "nested"]),
    };
    cargo.arg("--").args(filter);
    finish(&mut cargo)
}

/// The scenarios of the nested test bed whose name contains `filter`; a single one with everything it prints.
pub fn nested(filter: Option<&str>, shell: bool) -> Result<()> {
    let scenarios = nested::matching(filter);
    if scenarios.is_empty() {
        let all: Vec<&str> = nested::ALL.iter().map(|s| s.name).collect();
        bail!("no scenario is called like that; there are: {}", all.join(", "));
    }
    let target = artifacts::target_dir()?;
    setup::prepare(Need::Nested, &target, 0)?;
    if shell {
        let chosen = if filter.is_some() { scenarios } else { Vec::new() };
        return nested::shell(&chosen, &nested::Parts::build(&chosen)?);
    }
    let parts = nested::Parts::build(&scenarios)?;
    let began = Instant::now();
    let totals = nested::report::run(&scenarios, &parts, scenarios.len() == 1)?;
    println!("{totals} ({:.0} s)", began.elapsed().as_secs_f64());
    if totals.failed > 0 { bail!("tests failed") } else { Ok(()) }
}

/// All failures of a port, those that last included; writes docs/failure-matrix.md when all that was found is as it must be.
/// With `filter` only some are tried, and nothing is written.
pub fn failures(filter: Option<&str>) -> Result<()> {
    let root = artifacts::workspace_root();
    setup::prepare(Need::Test, &artifacts::data_dir()?, 0)?;
    let results = artifacts::target_dir()?.join("failures");
    if results.exists() {
        std::fs::remove_dir_all(&results).with_context(|| format!("cannot remove {}", results.display()))?;
    }
    let test = || {
        let mut cargo = images::cargo(&root);
        cargo.args(["test", "--locked", "--package", "vmm", "--test", "failures", "--"]).env("FAILURES", &results);
        cargo
    };
    let mut all = test();
    // A sample is a part of a column.
    all.args(["--include-ignored", "--skip", "the_document", "--skip", "sample", "--nocapture"]);
    all.args(["--test-threads", FAILURES_AT_ONCE]);
    all.args(filter);
    finish(&mut all)?;
    if filter.is_some() {
        return Ok(());
    }
    finish(test().args(["--ignored", "--exact", "the_document_is_written"]))
}

fn step(root: &Path, arguments: &[&str]) -> Result<()> {
    let mut cargo = images::cargo(root);
    cargo.args(arguments);
    process::run(&mut cargo)
}

fn finish(cargo: &mut Command) -> Result<()> {
    let mut totals = Totals::default();
    let outcome = process::run_and_see(cargo, |line| totals.add(line));
    println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.ignored);
    outcome.context("tests failed")
}

/// Sum of the closing lines of all test programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Totals {
    /// Adds a line like `test result: ok. 5 passed; 0 failed; 1 ignored; …`; any other adds nothing.
    fn add(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ").and_then(|l| l.split_once(". ")) else { return };
        for count in counts.1.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_added_up() {
        let mut totals = Totals::default();
        totals.add("test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.12s");
        totals.add("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        totals.add("test blocks_are_ignored ... ok");
        assert_eq!(totals, Totals { passed: 7, failed: 3, ignored: 1 });
    }
}
