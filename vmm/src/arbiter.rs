//! `vmm arbiter`: keeps the ownership records of VMs that have no D-module.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use vmm::records::{Service, Store};
use vmm::sandbox::files::{Use, allow};
use vmm::sandbox::{self, Kind};

/// Keep the ownership records of VMs that have no D-module.
#[derive(Debug, Args)]
#[command(
    after_help = "VMs are given it as --arbiter ADDRESS:PORT. It belongs on a network that only hosts can reach: \
                        who reaches it decides who runs."
)]
pub struct ArbiterOrder {
    /// Where to listen.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// Directory of the records; made if it is not there.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Give nothing up: for debuggers, and for kernels without seccomp.
    #[arg(long)]
    no_sandbox: bool,
}

/// Answers until the process is ended; why it does not.
pub fn run(order: &ArbiterOrder) -> vmm::Result<std::convert::Infallible> {
    sandbox::set_up(sandbox::Options { no_sandbox: order.no_sandbox, ..sandbox::Options::default() })?;
    let store = Store::open(&order.dir)?;
    allow(&order.dir, Use::Change)
        .map_err(|source| vmm::Error::Host { what: format!("directory {}", order.dir.display()), source })?;
    let records = store.table().len();
    let service = Service::listen(order.listen, store)?;
    let address = service.address()?;
    // Before the first question; the threads of the connections are what this one is.
    sandbox::confine(Kind::Control)?;
    // Whoever started it may not look.
    let _ = writeln!(std::io::stdout(), "vmm arbiter: {records} records in {}, on {address}", order.dir.display());
    service.run()
}
