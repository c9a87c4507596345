//! The `vmm` binary: one process, one VM.

use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use clap::Parser;
use vmm::boot::info::OwnerId;
use vmm::config::cli::{Args, Order};
use vmm::stats::{self, Stats};
use vmm::vm::Vm;

/// Exit status for a wrong configuration or command line.
const STATUS_USAGE: u8 = 2;
/// Exit status when the VM could not be built.
const STATUS_FAILED: u8 = 1;

fn main() -> ExitCode {
    stats::process_starts();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let order = match Args::parse().order() {
        Ok(order) => order,
        Err(e) => return fail(&e, STATUS_USAGE),
    };
    match run(order) {
        Ok(status) => ExitCode::from(status),
        Err(e) => fail(&e, STATUS_FAILED),
    }
}

fn fail(e: &vmm::Error, status: u8) -> ExitCode {
    for line in e.to_string().lines() {
        eprintln!("vmm: {line}");
    }
    ExitCode::from(status)
}

fn run(order: Order) -> vmm::Result<u8> {
    let Order::Boot(config) = order else {
        return Err(vmm::Error::Conflict("--receive is not built yet".into()));
    };
    let vm = Vm::boot(config, OwnerId::random()?, Arc::new(Stats::default()))?;
    let (tx, rx) = mpsc::channel();
    vm.start(move |end| {
        let _ = tx.send(end.status());
    })?;
    let status = rx.recv().unwrap_or(i32::from(STATUS_FAILED));
    vm.stop();
    Ok(status as u8)
}
