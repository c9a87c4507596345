//! `cargo xtask COMMAND`; see `cargo xtask --help`.
#![forbid(unsafe_code)]

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use xtask::{artifacts, cleanup, lab, setup};

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
    /// Remove what runs that were killed have left behind.
    Clean,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    cleanup::install_handler()?;
    match task {
        Task::Setup => {
            let data = artifacts::data_dir()?;
            setup::prepare(setup::Need::Test, &data, 0)?;
            setup::load_generator(&artifacts::workspace_root(), &data)?;
            artifacts::Artifacts::build()?;
            println!("all is set up");
            Ok(())
        }
        Task::Clean => {
            for thing in lab::clean()? {
                println!("removed {thing}");
            }
            Ok(())
        }
    }
}
