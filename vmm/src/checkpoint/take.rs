//! Taking a checkpoint of a VM that goes on running.
//!
//! Owns the thread's way through it: memory is copied while the guest runs, as in a port, until little changes between two looks; then the
//! guest stands still for its state and a copy of the rest, and goes on while that is written. Pages without content are left out as in a port
//! ([`crate::port::dead`]), each decided on behind the reading of the log that it is due by, and are zero in the checkpoint. Always true: the guest is
//! let go whatever fails (unless it was paused before); one that was to end goes on too, if its checkpoint could not be
//! brought to the disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::checkpoint::{AT_REST, CHAIN_MAX, Checkpoint, CheckpointId, FINAL, Parent};
use migration::message::Stamp;
use vm_memory::{Bytes, GuestAddress};

use super::directory::Staging;
use super::lineage::{Broken, Lineage, drain};
use super::pages::PageFile;
use super::{CheckpointReport, CheckpointRequest, at, chain, wrong};
use crate::boot::info::{host_real_ns, random};
use crate::error::{Error, Result};
use crate::memory::PAGE_SIZE;
use crate::port::dead::Dead;
use crate::port::guest;
use crate::port::transfer::Pending;
use crate::schedule::Urgent;
use crate::vm::{Phase, Vm};

/// How often a template is given time to park, and how much.
const REST_TRIES: u32 = 100;
/// See [`REST_TRIES`].
const REST_WAIT: Duration = Duration::from_millis(2);

/// Most times memory is gone through while the guest runs.
const ROUNDS_MAX: u32 = 8;
/// So few pages are left to the pause at once: a copy of them takes less than the state does.
const RESIDUE_AIM: u64 = 256;
/// A round that leaves more than this share of the one before has not helped.
const SHRINK_PERCENT: u64 = 85;
/// Most pages that are copied aside in the pause; what is beyond is written to the file in it (16 MiB).
const ASIDE_MAX: usize = 4096;

/// Takes one; the answer comes when it is on the disk. To be called on a thread that may wait.
pub fn take(vm: &Arc<Vm>, request: &CheckpointRequest) -> Result<CheckpointReport> {
    let started = Instant::now();
    if !matches!(vm.phase(), Phase::Running | Phase::Paused) {
        return Err(Error::Conflict("only of a VM that runs, or is paused, a checkpoint can be taken".into()));
    }
    let claim = vm.claim_log()?;
    let mut attempt = Attempt::begin(vm, request)?;
    let result = attempt.run();
    attempt.end(&result);
    let mut report = result?;
    if request.stop {
        // Before the claim goes: nobody can resume it any more.
        vm.stop();
    }
    drop(claim);
    report.elapsed_us = started.elapsed().as_micros() as u64;
    Ok(report)
}

struct Attempt<'a> {
    vm: &'a Arc<Vm>,
    request: &'a CheckpointRequest,
    /// What the VM had before, if its record is whole.
    before: std::result::Result<Lineage, Broken>,
    parent: Option<Parent>,
    staging: Option<Staging>,
    depth: usize,
    /// The checkpoint that was taken.
    taken: Option<(CheckpointId, u64)>,
}

impl<'a> Attempt<'a> {
    /// Everything that can be refused before anything is touched.
    fn begin(vm: &'a Arc<Vm>, request: &'a CheckpointRequest) -> Result<Attempt<'a>> {
        let staging = Staging::create(&request.path)?;
        let mut slot = vm.lineage();
        let (parent, depth) = match &request.parent {
            None => (None, 1),
            Some(path) => {
                let lineage = slot.as_ref().map_err(|b| wrong("parent", b.reason()))?;
                if lineage.resets != vm.stats().resets() {
                    return Err(wrong("parent", "the VM has begun again since: take a whole one"));
                }
                if lineage.depth >= CHAIN_MAX {
                    let text = format!("it is the last of {CHAIN_MAX} that need each other: take a whole one");
                    return Err(wrong("parent", text));
                }
                (Some(parent(lineage, path, &staging)?), lineage.depth + 1)
            }
        };
        let before = std::mem::replace(&mut *slot, Err(Broken::NotBegun));
        drop(slot);
        Ok(Attempt { vm, request, before, parent, staging: Some(staging), depth, taken: None })
    }

    fn run(&mut self) -> Result<CheckpointReport> {
        let (vm, memory, kvm) = (self.vm, self.vm.memory(), self.vm.fd());
        let Some(staging) = self.staging.take() else { return Err(Error::State("taken already".into())) };
        let io = at("path", &self.request.path);
        let description = guest::description(vm, vm.describe())?;
        let incremental = self.parent.is_some();
        let limit = memory.regions().last().map_or(0, |r| r.range().end);
        let mut pending = match &mut self.before {
            Ok(lineage) => {
                lineage.drain(memory, kvm)?;
                if incremental { lineage.since.clone() } else { Pending::populated(memory) }
            }
            Err(_) => {
                memory.start_dirty_log(kvm)?;
                Pending::populated(memory)
            }
        };
        let mut file = PageFile::new(staging.memory(), limit, incremental).map_err(&io)?;
        let mut page = [0; PAGE_SIZE];
        let mut rounds = 0;
        let mut least = u64::MAX;
        let dirty = loop {
            // Behind the reading of the log.
            let dead = Dead::look(vm);
            for number in pending.drain() {
                if dead.reason(number).is_some() {
                    file.clear(number).map_err(&io)?;
                    continue;
                }
                read(vm, number, &mut page)?;
                file.put(number, &page).map_err(&io)?;
            }
            rounds += 1;
            // Those without content as well: whether a map of free pages holds at each look would make the figures jump.
            let dirty = pending.outlook(memory, kvm, Dead::none)?;
            // What is the monitor's own the outlook has taken.
            if let Ok(lineage) = &mut self.before {
                lineage.since.add(pending.words());
            }
            if dirty <= RESIDUE_AIM
                || rounds == ROUNDS_MAX
                || dirty.saturating_mul(100) > least.saturating_mul(SHRINK_PERCENT)
            {
                break dirty;
            }
            least = dirty;
            self.drain_into(&mut pending)?;
        };

        // Twice what is expected, so that nothing is allocated in the pause.
        let expected = ASIDE_MAX.min(2 * dirty as usize);
        let (mut numbers, mut aside) = (Vec::with_capacity(expected), Vec::with_capacity(expected * PAGE_SIZE));
        let mut cleared = Vec::new();
        let pause = Pause::begin(vm)?;
        let created_ns = host_real_ns();
        // Device state first: quiescing may still write to guest memory, which the bitmap then shows.
        guest::quiesce(vm)?;
        let (mut sections, _) = guest::save(vm)?;
        guest::add_owner(vm, &mut sections)?;
        let at_rest = vm.info().is_some() && vm.is_at_rest();
        self.drain_into(&mut pending)?;
        let dead = Dead::look(vm);
        for number in pending.drain() {
            if dead.reason(number).is_some() {
                cleared.push(number);
                continue;
            }
            let bytes = memory.still(number * PAGE_SIZE as u64, PAGE_SIZE)?;
            if numbers.len() < ASIDE_MAX {
                aside.extend_from_slice(bytes);
            } else {
                file.put(number, bytes).map_err(&io)?;
            }
            numbers.push(number);
        }
        let exit = pause.exit;
        // The guest goes on here, unless it is to end.
        let held = self.request.stop.then_some(pause);
        for (number, bytes) in numbers.iter().zip(aside.chunks_exact(PAGE_SIZE)) {
            file.put(*number, bytes).map_err(&io)?;
        }
        for number in cleared {
            file.clear(number).map_err(&io)?;
        }
        let pages = file.finish().map_err(&io)?;
        let id = CheckpointId(random()?);
        let flags = if at_rest { AT_REST } else { 0 } | if self.request.stop { FINAL } else { 0 };
        let (raw_pages, all_pages) = (pages.raw_pages(), pages.runs().iter().map(|r| u64::from(r.pages)).sum());
        let checkpoint = Checkpoint {
            id,
            created_ns,
            limit,
            flags,
            writer: concat!("outrigger vmm ", env!("CARGO_PKG_VERSION")).into(),
            parent: self.parent.clone(),
            description,
            sections,
            pages,
        };
        let state = checkpoint.encode().map_err(|e| Error::State(format!("this VM does not fit a checkpoint: {e}")))?;
        let path = staging.path().to_owned();
        staging.finish(&state)?;
        if let Some(pause) = held {
            pause.keep();
        }
        self.taken = Some((id, Checkpoint::seal(&state).unwrap_or_default()));
        Ok(CheckpointReport {
            id: id.to_string(),
            path,
            parent: self.parent.as_ref().map(|p| p.id.to_string()),
            pages: all_pages,
            raw_pages,
            bytes: raw_pages * PAGE_SIZE as u64 + state.len() as u64,
            residue_pages: numbers.len() as u64,
            rounds,
            // The vCPU has long gone on: what was left has been written since.
            pause_us: exit.filter(|_| !self.request.stop).and_then(|exit| {
                let entered = guest::entered(vm)?;
                (entered.mono_ns > exit.mono_ns).then(|| entered.since(&exit) / 1000)
            }),
            elapsed_us: 0,
            at_rest,
            stopped: self.request.stop,
        })
    }

    /// Adds what has changed to what has to be written.
    fn drain_into(&mut self, pending: &mut Pending) -> Result<()> {
        let (memory, kvm) = (self.vm.memory(), self.vm.fd());
        let changed = match &mut self.before {
            Ok(lineage) => lineage.drain(memory, kvm)?,
            Err(_) => drain(memory, kvm)?,
        };
        pending.add(changed.words());
        Ok(())
    }

    /// The record goes on from the new checkpoint, or from the one before, or there is none and the log goes off.
    fn end(self, result: &Result<CheckpointReport>) {
        let tracked = self.request.track && !self.request.stop;
        let memory = self.vm.memory();
        let next = match (result, self.taken) {
            (Ok(_), Some((id, seal))) if tracked => Ok(Lineage {
                id,
                seal,
                depth: self.depth,
                resets: self.vm.stats().resets(),
                since: Pending::none(memory),
            }),
            (Ok(_), _) => Err(Broken::NotTracked),
            (Err(_), _) => self.before,
        };
        if next.is_err()
            && let Err(e) = memory.stop_dirty_log(self.vm.fd())
        {
            log::warn!("the dirty log stays on: {e}");
        }
        *self.vm.lineage() = next;
    }
}

/// Checks that what was named is the last checkpoint of this VM; how the new one will name it.
fn parent(lineage: &Lineage, path: &Path, staging: &Staging) -> Result<Parent> {
    let (checkpoint, seal) = chain::read_state(path).map_err(|e| match e {
        Error::Config(_) => wrong("parent", format!("{}: no checkpoint there", path.display())),
        e => wrong("parent", e.to_string()),
    })?;
    if (checkpoint.id, seal) != (lineage.id, lineage.seal) {
        let text = format!(
            "{}: checkpoint {} is not the last one of this VM, {}: what changed is known only since that",
            path.display(),
            checkpoint.id,
            lineage.id
        );
        return Err(wrong("parent", text));
    }
    let whole = path.canonicalize().map_err(at("parent", path))?;
    // Checkpoints side by side can be moved together.
    let named = match whole.file_name() {
        Some(name) if whole.parent() == Some(staging.parent()) => PathBuf::from("..").join(name),
        _ => whole,
    };
    let path = named.to_str().ok_or_else(|| wrong("parent", "its path is not UTF-8"))?;
    Ok(Parent { id: lineage.id, seal: lineage.seal, path: path.into() })
}

fn read(vm: &Vm, number: u64, page: &mut [u8; PAGE_SIZE]) -> Result<()> {
    let address = number * PAGE_SIZE as u64;
    let read = vm.memory().ram().read_slice(page, GuestAddress(address));
    read.map_err(|e| Error::Memory(format!("page {address:#x}: {e}")))
}

/// While it lives, the guest stands still.
struct Pause<'a> {
    vm: &'a Vm,
    /// Last exit of the last vCPU, if the VM ran.
    exit: Option<Stamp>,
    over: bool,
    urgent: Vec<Urgent>,
}

impl<'a> Pause<'a> {
    fn begin(vm: &'a Vm) -> Result<Pause<'a>> {
        let mut pause = Pause { vm, exit: None, over: false, urgent: Vec::new() };
        if vm.phase() == Phase::Running {
            pause.urgent.extend(Urgent::port());
            pause.exit = Some(guest::pause(vm, &mut pause.urgent)?);
            pause.let_park()?;
        } else {
            vm.devices().stop_input();
        }
        Ok(pause)
    }

    /// Of use is a template only at the end of a park, where it is nearly always: if it is not, it goes on for a little.
    fn let_park(&mut self) -> Result<()> {
        let vm = self.vm;
        if !vm.config().cmdline.split_ascii_whitespace().any(|word| word == guest_abi::TEMPLATE_WORD) {
            return Ok(());
        }
        for _ in 0..REST_TRIES {
            if vm.is_at_rest() {
                break;
            }
            self.urgent.clear();
            vm.devices().resume();
            vm.resume()?;
            std::thread::sleep(REST_WAIT);
            self.exit = Some(guest::pause(vm, &mut self.urgent)?);
        }
        Ok(())
    }

    /// The guest never goes on.
    fn keep(mut self) {
        self.over = true;
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        match self.exit {
            Some(_) => guest::resume(self.vm, None, Vec::new()),
            None => self.vm.resume_devices(),
        }
        self.urgent.clear();
    }
}
