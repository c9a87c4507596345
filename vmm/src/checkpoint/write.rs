//! Taking a checkpoint.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_abi::TEMPLATE_WORD;
use migration::checkpoint::{AT_REST, Checkpoint, CheckpointId, Content, PageTable, page_sum};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MEMORY, STATE, STATE_PART};
use crate::boot::info::{host_real_ns, random};
use crate::error::{Error, FieldError, Result, host};
use crate::memory::{Memory, PAGE_SIZE};
use crate::port::guest;
use crate::port::transfer::Pending;
use crate::vm::{Phase, Vm};

/// How often a template is given time to park, and how much.
const REST_TRIES: u32 = 100;
const REST_WAIT: Duration = Duration::from_millis(2);

/// Body of `POST /v1/vm/checkpoint`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Directory to be made for it.
    pub path: PathBuf,
}

/// What was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Taken {
    /// Its random number.
    pub id: String,
    /// Whether the guest was parked, so that instances can be made of a template.
    pub at_rest: bool,
    /// Pages of memory with content.
    pub pages: u64,
    /// How long the VM stood still, in microseconds.
    pub pause_us: u64,
}

/// Writes the VM as it is into a new directory; it stands still meanwhile, and then is as it was.
pub fn take(vm: &Arc<Vm>, request: &CheckpointRequest) -> Result<Taken> {
    if !vm.config().disks.is_empty() {
        return Err(Error::Conflict("a VM with disks cannot be checkpointed: they would go on without it".into()));
    }
    let directory = request.path.as_path();
    let wrong =
        |e: std::io::Error| Error::Config(vec![FieldError::new("path", format!("{}: {e}", directory.display()))]);
    let _claim = vm.claim_copy()?;
    let running = match vm.phase() {
        Phase::Running => true,
        Phase::Paused => false,
        Phase::Created | Phase::Ended => return Err(Error::Conflict("the VM does not run".into())),
    };
    let description = guest::description(vm)?;
    fs::create_dir(directory).map_err(wrong)?;
    let began = Instant::now();
    vm.devices().stop_input();
    let result = pause(vm).and_then(|()| vm.quiesce()).and_then(|()| write(vm, directory, description));
    vm.devices().resume();
    if running {
        vm.resume()?;
    }
    let pause_us = began.elapsed().as_micros() as u64;
    match result {
        Ok(taken) => Ok(Taken { pause_us, ..taken }),
        Err(e) => {
            if let Err(left) = fs::remove_dir_all(directory) {
                log::warn!("{}: {left}", directory.display());
            }
            Err(e)
        }
    }
}

/// Stops the vCPUs: those of a template where they are of use, at the end of a park, which is where it is nearly always.
fn pause(vm: &Vm) -> Result<()> {
    vm.pause()?;
    if vm.config().cmdline.split_ascii_whitespace().any(|word| word == TEMPLATE_WORD) {
        for _ in 0..REST_TRIES {
            if vm.is_at_rest() {
                break;
            }
            vm.resume()?;
            std::thread::sleep(REST_WAIT);
            vm.pause()?;
        }
    }
    Ok(())
}

fn write(vm: &Vm, directory: &Path, description: migration::message::Description) -> Result<Taken> {
    let at_rest = vm.is_at_rest();
    let created_ns = host_real_ns();
    let (sections, _) = guest::save(vm)?;
    let limit = vm.memory().regions().map(|r| r.range().end).max().unwrap_or(0);
    let pages = write_memory(vm.memory(), limit, &directory.join(MEMORY))?;
    let checkpoint = Checkpoint {
        id: CheckpointId(random()?),
        created_ns,
        limit,
        flags: if at_rest { AT_REST } else { 0 },
        writer: concat!("vmm ", env!("CARGO_PKG_VERSION")).into(),
        parent: None,
        description,
        sections,
        pages,
    };
    let bytes = checkpoint.encode().map_err(|e| Error::State(e.to_string()))?;
    let part = directory.join(STATE_PART);
    let what = || host(format!("checkpoint {}", directory.display()));
    let mut file = File::create_new(&part).map_err(what())?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(what())?;
    fs::rename(&part, directory.join(STATE)).map_err(what())?;
    File::open(directory).and_then(|d| d.sync_all()).map_err(what())?;
    Ok(Taken { id: checkpoint.id.to_string(), at_rest, pages: checkpoint.pages.raw_pages(), pause_us: 0 })
}

/// Writes the pages that are not zero at their places; the rest are holes.
fn write_memory(memory: &Memory, limit: u64, path: &Path) -> Result<PageTable> {
    let what = || host(format!("checkpoint {}", path.display()));
    let file = File::create_new(path).map_err(what())?;
    // As long as memory: who maps the file must find an end nowhere before.
    file.set_len(limit).map_err(what())?;
    let mut table = PageTable::new();
    for page in Pending::populated(memory).drain() {
        let at = page * PAGE_SIZE as u64;
        let bytes = memory.still(at, PAGE_SIZE)?;
        if bytes.iter().any(|b| *b != 0) {
            file.write_all_at(bytes, at).map_err(what())?;
            table.push(page, Content::Raw(page_sum(bytes)));
        }
    }
    file.sync_all().map_err(what())?;
    Ok(table)
}
