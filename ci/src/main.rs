//! `cargo xtask COMMAND`; see `cargo xtask --help`.
#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use xtask::bench::{self, Bench};
use xtask::check::Which;
use xtask::{artifacts, check, cleanup, demo, lab, nested, setup};

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "Set-up, lab, demo, tests and benchmarks of Outrigger")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check the machine, install the packages all commands need, build everything.
    Setup,
    /// Serve files over NFS from two VMs, and port the N-module to another host and back under load.
    Demo {
        /// Size of the file copied first, like 256M or 1G.
        #[arg(long, default_value = "1G", value_parser = size)]
        size: u64,
        /// Write the results to this file as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Measure, print a table, write docs/benchmarks.md.
    Bench {
        /// What to measure.
        #[arg(value_parser = ["boot", "restore", "port", "nfs", "spawn", "vmm", "soak", "all"])]
        which: String,
        /// Fewer samples: at most a minute each.
        #[arg(long)]
        quick: bool,
        /// Write the rows to this file as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Run all tests, or the system tests alone.
    Test {
        /// `system`: only those that start VMs; `nested`: only those with Linux guests in an emulated machine; `failures`: every
        /// failure at every point of a port, and docs/failure-matrix.md is written.
        #[arg(value_parser = ["system", "nested", "failures"])]
        which: Option<String>,
        /// Only tests whose name contains this.
        filter: Option<String>,
        /// With `nested`: a shell in the emulated machine, after the scenario if one is named.
        #[arg(long)]
        shell: bool,
    },
    /// Start both modules in a lab and keep them until Ctrl-C, to look at by hand.
    Lab,
    /// Remove what runs that were killed have left behind.
    Clean,
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number.and_then(|n| n.checked_mul(1 << shift)).ok_or_else(|| "not a size like 256M or 1G".into())
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nerror: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    cleanup::install_handler()?;
    setup::check_root()?;
    match task {
        Task::Setup => {
            let data = artifacts::data_dir()?;
            setup::prepare(setup::Need::Test, &data, 0)?;
            setup::load_generator(&artifacts::workspace_root(), &data)?;
            let built = artifacts::Artifacts::build()?;
            nested::fetch(&built.target)?;
            println!("all is set up");
            Ok(())
        }
        Task::Demo { size, json } => {
            let json = json.map(std::path::absolute).transpose().context("--json")?;
            demo::run(&demo::Options { size, json })
        }
        Task::Bench { which, quick, json } => {
            let json = json.map(std::path::absolute).transpose().context("--json")?;
            let benches = Bench::ALL.into_iter().filter(|b| which == "all" || b.name() == which).collect();
            bench::run(&bench::Options { benches, quick, json })
        }
        Task::Test { which, filter, shell } => match which.as_deref() {
            Some("nested") => check::nested(filter.as_deref(), shell),
            Some("failures") => check::failures(filter.as_deref()),
            _ if shell => anyhow::bail!("--shell is for `test nested`"),
            Some(_) => check::run(Which::System, filter.as_deref()),
            None => check::run(Which::All, filter.as_deref()),
        },
        Task::Lab => demo::keep_lab(),
        Task::Clean => {
            for thing in lab::clean()? {
                println!("removed {thing}");
            }
            Ok(())
        }
    }
}
