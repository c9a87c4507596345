//! Making a VM of a checkpoint.
//!
//! Owns what lies between the files and a guest that runs: [`restore`] does everything that can fail, and last of all takes the VM
//! over in its ownership record; [`Restored::run`] lets it go. Always true: a VM with an arbiter runs only if this
//! process has won its record by compare-and-swap, from the very record the process that took the checkpoint left; a
//! VM that went on after its checkpoint is a copy, and its guest is told so (VM generation id).

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::checkpoint::{Checkpoint, FINAL};
use migration::ownership::{OwnerId as RecordOwner, Record, Verdict};

use super::{RESTORED_FILE, RestoreRequest, chain, fill, place};
use crate::acpi::{Event, generation};
use crate::boot::BootFiles;
use crate::boot::info::{ClockState, OwnerId};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::port::arbiter::Arbiter;
use crate::port::guest;
use crate::port::wait::{Interest, wait};
use crate::sandbox::files::{self, Use};
use crate::stats::Stats;
use crate::vm::Vm;

/// Longest time the arbiter may take to answer the compare-and-swap.
const VERDICT_MAX: Duration = Duration::from_secs(20);
/// Longest sleep meanwhile.
const TICK: Duration = Duration::from_millis(50);

/// A VM with its state, which this process may run.
pub struct Restored {
    /// The VM; its threads are to be started, paused.
    pub vm: Arc<Vm>,
    clock: Option<ClockState>,
    epoch: Option<u64>,
}

/// Builds the VM and takes it over.
pub fn restore(request: &RestoreRequest, owner: OwnerId, stats: &Arc<Stats>) -> Result<Restored> {
    let started = Instant::now();
    let chain = chain::open(&request.path)?;
    // The next ones are likely to be written beside it, and build on it.
    files::allow_beside(&request.path, Use::Change);
    let Some(newest) = chain.first() else { return Err(Error::State("no checkpoint".into())) };
    let checkpoint = &newest.checkpoint;
    let description = guest::decode(&checkpoint.description)?;
    let config = place::place(description.config.clone(), request)?;
    let size = usize::try_from(config.memory.bytes()).unwrap_or(usize::MAX);
    let mut memory = Memory::with_sharing(size, config.shares_memory())?;
    if memory.regions().last().map_or(0, |r| r.range().end) != checkpoint.limit {
        return Err(Error::State(format!("checkpoint {}: its memory is of another size", newest.dir.display())));
    }
    fill::fill(&mut memory, &chain, request.memory, request.verify)?;
    log::info!("memory from {} checkpoints: {:?}", chain.len(), started.elapsed());
    // For a reset. Where they are no more, a reset ends the process.
    let boot = BootFiles::open(&config.image, config.initrd.as_deref());
    let boot = boot.map_err(|e| log::info!("a reset will end the process: {e}")).ok();
    let vm = Arc::new(Vm::arrive(&description, config, memory, boot, owner, stats.clone())?);
    let state = guest::decode_state(&vm, &checkpoint.sections)?;
    vm.load(&state)?;
    let epoch = claim(&vm, checkpoint)?;
    if is_copy(&newest.dir, checkpoint) {
        renew(&vm)?;
    }
    Ok(Restored { vm, clock: state.clock, epoch })
}

impl Restored {
    /// The guest runs here. The VM's threads have been started, paused.
    pub fn run(self) -> Result<()> {
        self.vm.take_over(self.clock, self.epoch)?;
        self.vm.resume_devices();
        self.vm.resume()?;
        guest::announce(&self.vm);
        Ok(())
    }
}

/// Takes the VM over in its ownership record, if it has one; the epoch that was won.
fn claim(vm: &Vm, checkpoint: &Checkpoint) -> Result<Option<u64>> {
    let (vm_id, epoch) = (vm.config().vm_id, guest::epoch(vm));
    let Some(address) = vm.config().arbiter else {
        return match epoch {
            0 => Ok(None),
            _ => Err(Error::State(format!(
                "the guest has epoch {epoch} of VM {vm_id}, so there is an ownership record: say where (arbiter)"
            ))),
        };
    };
    if vm_id == 0 {
        return Err(Error::State("an arbiter is configured, but no vm_id".into()));
    }
    if checkpoint.flags & FINAL == 0 {
        return Err(Error::State(format!(
            "VM {vm_id} went on after this checkpoint, and its D-module knows what it has done since: only a checkpoint that was \
             taken with \"stop\" can be restored under its vm_id"
        )));
    }
    let failed = |e: &dyn std::fmt::Display| Error::State(format!("the ownership record of VM {vm_id}: {e}"));
    let mut arbiter = Arbiter::new(address, vm_id, RecordOwner(vm.owner().0));
    let record = arbiter.record().map_err(|e| failed(&e))?;
    let saved = guest::owner(&checkpoint.sections)?;
    let as_left = record.owner == saved && (epoch == 0 || record.epoch.0 == epoch);
    // A VM nobody has claimed yet has no record.
    if !as_left && (record.epoch.0, epoch) != (0, 0) {
        return Err(failed(&format_args!(
            "epoch {} of owner {:016x}{:016x}, not as the checkpoint left it (epoch {epoch}): the VM runs elsewhere, or has been \
             restored or started afresh since",
            record.epoch.0, record.owner.0[0], record.owner.0[1]
        )));
    }
    arbiter.compete(record.epoch);
    let deadline = Instant::now() + VERDICT_MAX;
    while Instant::now() < deadline {
        match arbiter.poll() {
            Some((_, Verdict::Won(epoch))) => return Ok(Some(epoch.0)),
            Some((_, Verdict::Lost(Record { epoch, .. }) | Verdict::Behind(epoch))) => {
                return Err(failed(&format_args!("somebody else has taken it over: epoch {}", epoch.0)));
            }
            None => {}
        }
        let fd = arbiter.descriptor().map(|fd| (fd, Interest::Read));
        let _ = wait(fd.as_slice(), Some(TICK));
    }
    Err(failed(&format_args!("no answer of the arbiter {address} within {VERDICT_MAX:?}")))
}

/// Whether there is, or may be, another VM that has gone on from this checkpoint.
fn is_copy(dir: &Path, checkpoint: &Checkpoint) -> bool {
    if checkpoint.flags & FINAL == 0 {
        return true;
    }
    match OpenOptions::new().write(true).create_new(true).open(dir.join(RESTORED_FILE)) {
        Ok(_) => false,
        Err(e) => {
            if e.kind() != io::ErrorKind::AlreadyExists {
                log::warn!("{}: {e}: the VM is taken for a copy", dir.display());
            }
            true
        }
    }
}

/// Tells the guest that its past is not its own alone.
fn renew(vm: &Vm) -> Result<()> {
    let mut devices = vm.devices();
    if devices.acpi().is_connected() {
        generation::write(vm.memory(), generation::new()?)?;
        devices.acpi().raise(Event::Generation);
    }
    Ok(())
}
