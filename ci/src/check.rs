//! `cargo xtask test`: everything that must hold, cheap things first; cargo's own closing lines come last.
use crate::artifacts::{self, Artifacts};
use crate::setup::{self, Need};
use crate::{lab, nested, process};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

/// Room for the disks of the system tests.
const DISK_BYTES: u64 = 6 << 30;

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
    nested::kernel(&artifacts.target)?;
    let mut cargo = images::cargo(&root);
    cargo.args(["test", "--locked", "--no-fail-fast", "--features", "xtask/system"]);
    match which {
        Which::All => cargo.arg("--workspace"),
        Which::System => cargo.args(["--package", "xtask", "--test", "system"]),
    };
    cargo.arg("--").args(filter);
    finish(&mut cargo)
}

fn step(root: &Path, arguments: &[&str]) -> Result<()> {
    let mut cargo = images::cargo(root);
    cargo.args(arguments);
    process::run(&mut cargo)
}

fn finish(cargo: &mut Command) -> Result<()> {
    process::run(cargo).context("tests failed")
}
