//! `vmm release`: ends the ownership record of a VM that has ended for good without being able to say so itself (killed, or
//! its host is gone), so that its place in the D-module's table is free.
//!
//! Always true: what is released is the record that was shown, by its epoch. A VM that runs after all is cut off from the
//! D-module by it, as by a fresh start; it does no harm.

use std::net::SocketAddr;

use clap::Args;
use migration::ownership::{Epoch, OwnerId};
use vmm::port::arbiter::Arbiter;

/// Release the ownership record of a VM that has ended for good.
#[derive(Debug, Args)]
#[command(
    after_help = "Without --epoch the record is only shown. A VM that is still running is cut off from its D-module."
)]
pub struct ReleaseOrder {
    /// Where the record is kept: the D-module.
    #[arg(long, value_name = "ADDRESS:PORT")]
    arbiter: SocketAddr,
    /// The VM.
    #[arg(long, value_name = "N")]
    vm_id: u64,
    /// Release it, if this is its epoch still.
    #[arg(long, value_name = "N")]
    epoch: Option<u64>,
}

/// What there is to say, or why not.
pub fn run(order: &ReleaseOrder) -> Result<String, String> {
    let ReleaseOrder { arbiter, vm_id, epoch } = order;
    let record = Arbiter::new(*arbiter, *vm_id, OwnerId::default()).record().map_err(|e| e.to_string())?;
    let [a, b] = record.owner.0;
    if record.epoch.0 == 0 {
        return Ok(format!("VM {vm_id} has no ownership record\n"));
    }
    let shown = format!("VM {vm_id}: epoch {}, owner {a:016x}{b:016x}", record.epoch.0);
    match epoch {
        None => Ok(format!("{shown}; if it has ended for good: --epoch {}\n", record.epoch.0)),
        Some(epoch) if *epoch != record.epoch.0 => Err(format!("{shown}: not epoch {epoch}")),
        Some(epoch) => match Arbiter::new(*arbiter, *vm_id, record.owner).release(Epoch(*epoch)) {
            Ok(true) => Ok(format!("{shown}: released\n")),
            Ok(false) => {
                Err(format!("{shown}: refused; the VM is being handed over, or was and the D-module cannot know yet"))
            }
            Err(e) => Err(format!("{shown}: {e}")),
        },
    }
}
