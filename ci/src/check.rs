//! `cargo xtask test`: everything that must hold, cheap things first; cargo's own closing lines come last.
use crate::artifacts::{self, Artifacts};
use crate::setup::{self, Need};
use crate::{lab, process};
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
        let (hosts, guests) = selections();
        for selection in [hosts, guests] {
            let clippy = ["clippy", "--all-targets", "--locked"].into_iter();
            let arguments: Vec<&str> = clippy.chain(selection).chain(["--", "-D", "warnings"]).collect();
            step(&root, &arguments)?;
        }
    }
    Artifacts::build()?;
    let test = |selection: &[&str]| {
        let mut cargo = images::cargo(&root);
        cargo.args(["test", "--locked", "--no-fail-fast"]).args(selection);
        cargo.arg("--").args(filter);
        finish(&mut cargo)
    };
    match which {
        Which::All => {
            let (hosts, guests) = selections();
            let results = [test(&hosts), test(&guests)];
            results.into_iter().collect()
        }
        Which::System => test(&["--features", "xtask/system", "--package", "xtask", "--test", "system"]),
    }
}

/// What to select the crates that run on the host by, and those that are or stand on the run time of the images. They are
/// built apart: cargo would give both the same features of their dependencies, but the run time, which brings its own panic
/// handler, must not meet one that uses std (`log/std`, which env_logger asks for).
fn selections() -> (Vec<&'static str>, Vec<&'static str>) {
    const GUESTS: [&str; 4] = ["guest-rt", "guest-nmodule", "guest-dmodule", "testguest"];
    let hosts = ["--workspace", "--features", "xtask/system"].into_iter();
    let hosts = hosts.chain(GUESTS.iter().flat_map(|guest| ["--exclude", guest])).collect();
    (hosts, GUESTS.iter().flat_map(|guest| ["--package", guest]).collect())
}

fn step(root: &Path, arguments: &[&str]) -> Result<()> {
    let mut cargo = images::cargo(root);
    cargo.args(arguments);
    process::run(&mut cargo)
}

fn finish(cargo: &mut Command) -> Result<()> {
    process::run(cargo).context("tests failed")
}
