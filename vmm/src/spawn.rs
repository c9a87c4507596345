//! Spawned instances: many VMs of one template's checkpoint.
//!
//! A template is a VM whose command line has the word `template`: its guest has prepared all that needs no identity and is parked.
//! Owns what an instance has that the template had not: command line, identity, entropy, addresses, taps, the number of the
//! instance; the rest of it is the checkpoint's, its memory copied page by page when it is written. Always true: the guest finds all
//! of it before its first instruction; nothing of the template's identity is left; what cannot be right is refused before a
//! VM is made.

use std::collections::HashSet;
use std::ffi::CString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use guest_abi::{Identity, TEMPLATE_WORD};
use migration::ownership::OwnerId as ArbiterId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::boot::BootFiles;
use crate::boot::info::{OwnerId, random};
use crate::checkpoint::Saved;
use crate::config::{Config, MacAddress, NetConfig, SerialOutput, TlsConfig};
use crate::error::{Error, FieldError, Result};
use crate::port::arbiter::Arbiter;
use crate::port::guest;
use crate::stats::{BootTimes, Stats};
use crate::virtio::DeviceState;
use crate::vm::{Vm, VmState};

/// Body of `PUT /v1/vm/spawn`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SpawnRequest {
    /// Directory of the template's checkpoint.
    pub template: PathBuf,
    /// Key of the instance's ownership record: its own, not 0.
    pub vm_id: u64,
    /// Name of the VM; the template's if not given.
    #[serde(default)]
    pub name: Option<String>,
    /// Words of the command line: they take the place of the template's with the same key.
    #[serde(default)]
    pub cmdline: String,
    /// The network devices, by the template's ids, each with a tap that exists; a random MAC if none is given.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// The D-module that keeps the ownership record; the template's if not given.
    #[serde(default)]
    #[schemars(schema_with = "crate::config::optional_socket_address_schema")]
    pub arbiter: Option<SocketAddr>,
    /// Console; the template's if not given.
    #[serde(default)]
    pub serial: Option<SerialOutput>,
    /// How ports of the VM are protected: the template does not say. Without it the VM cannot be ported.
    #[serde(default)]
    pub tls: Option<TlsConfig>,
    /// Take the vm_id over from whoever has it or had it.
    #[serde(default)]
    pub replace: bool,
}

/// Makes an instance, ready to start.
pub fn build(request: &SpawnRequest, owner: OwnerId, stats: &Arc<Stats>) -> Result<Vm> {
    BootTimes::reach(&stats.boot.asked);
    let saved = Saved::open(&request.template).map_err(|e| match e {
        Error::Config(wrong) => {
            Error::Config(wrong.into_iter().map(|e| FieldError::new("template", e.message)).collect())
        }
        e => e,
    })?;
    let refused = |why: &str| Error::State(format!("checkpoint {}: {why}", request.template.display()));
    let template = &saved.description;
    if !words(&template.config.cmdline).any(|w| w == TEMPLATE_WORD) {
        return Err(refused("is of no template: there is no word \"template\" on its command line"));
    }
    if !saved.is_at_rest() {
        return Err(refused("its guest was not parked when it was taken, so it might go on as what it was"));
    }
    let Some(info) = template.info else {
        return Err(refused("its guest has no boot-info page to learn its identity from"));
    };
    let config = instance_config(&template.config, request)?;
    let memory = saved.map(&config)?;
    claimable(&config, request.replace, owner)?;

    // For a reset: an instance begins again as what it is by its command line.
    let files = BootFiles::open(&config.image, config.initrd.as_deref());
    let files = files.map_err(|e| log::info!("a reset will end the process: {e}")).ok();
    let vm = Vm::arrive(template, config, memory, files, owner, stats.clone())?;
    vm.prepare_save()?;
    let mut state = guest::decode_state(&vm, saved.sections())?;
    own_addresses(&mut state, vm.config());
    vm.load(&state)?;
    let identity = Identity { vm_id: request.vm_id, epoch: 0, owner: owner.0, entropy: random()? };
    info.make_instance(vm.memory(), &vm.guest_cmdline(), identity)?;
    if let Some(clock) = state.clock {
        info.continue_clock(vm.memory(), vm.vcpu().fd(), clock)?;
    }
    vm.resume_devices();
    Ok(vm)
}

/// The template's configuration with what is the instance's; every mistake by its field.
fn instance_config(template: &Config, request: &SpawnRequest) -> Result<Config> {
    let mut errors = Vec::new();
    let mut bad = |field: String, message: String| errors.push(FieldError::new(field, message));
    if request.vm_id == 0 {
        bad("vm_id".into(), "0: an instance needs an id of its own".into());
    }
    let mut config = template.clone();
    config.vm_id = request.vm_id;
    config.name = request.name.clone().unwrap_or_else(|| template.name.clone());
    config.cmdline = instance_cmdline(&template.cmdline, &request.cmdline);
    if words(&request.cmdline).any(|w| w == TEMPLATE_WORD) {
        bad("cmdline".into(), format!("{TEMPLATE_WORD:?}: an instance is no template"));
    }
    config.tls.clone_from(&request.tls);
    config.arbiter = request.arbiter.or(template.arbiter);
    config.serial = request.serial.clone().unwrap_or_else(|| template.serial.clone());
    let mut taps = HashSet::new();
    for (i, net) in config.nets.iter_mut().enumerate() {
        let Some((place, own)) = request.nets.iter().enumerate().find(|(_, own)| own.id == net.id) else {
            bad(format!("nets[{i}]"), format!("the template's {} needs a tap", net.id));
            continue;
        };
        net.tap.clone_from(&own.tap);
        net.fd = own.fd;
        net.vhost_user = None;
        net.mac = Some(match own.mac {
            Some(mac) => mac,
            None => MacAddress::local(random()?),
        });
        let at = format!("nets[{place}]");
        for mistake in net.mistakes(&at) {
            bad(mistake.field, mistake.message);
        }
        if let Some(tap) = &own.tap {
            if !exists(tap) {
                bad(format!("{at}.tap"), format!("there is no interface {tap}"));
            } else if !taps.insert(tap) {
                bad(format!("{at}.tap"), format!("{tap} is used twice"));
            }
        }
    }
    for (i, own) in request.nets.iter().enumerate() {
        if template.nets.iter().all(|net| net.id != own.id) {
            bad(format!("nets[{i}].id"), format!("{:?}: the template has no such device", own.id));
        }
    }
    if errors.is_empty() { Ok(config) } else { Err(Error::Config(errors)) }
}

/// Whether there is a network interface of this name here.
fn exists(interface: &str) -> bool {
    // SAFETY: the name is a C string.
    CString::new(interface).is_ok_and(|name| unsafe { libc::if_nametoindex(name.as_ptr()) } != 0)
}

fn words(cmdline: &str) -> impl Iterator<Item = &str> {
    cmdline.split_ascii_whitespace()
}

/// The template's words but for those the instance has its own of, and the word that makes a template; then the instance's.
fn instance_cmdline(template: &str, own: &str) -> String {
    let key = |word: &str| word.split_once('=').map_or(word, |(key, _)| key).to_owned();
    let replaced: HashSet<String> = words(own).map(key).collect();
    let kept = words(template).filter(|w| *w != TEMPLATE_WORD && !replaced.contains(&key(w)));
    kept.chain(words(own)).collect::<Vec<_>>().join(" ")
}

/// A vm_id that has, or had, an owner is another instance's: a start would fence that.
fn claimable(config: &Config, replace: bool, owner: OwnerId) -> Result<()> {
    let Some(address) = config.arbiter.filter(|_| !replace) else { return Ok(()) };
    let record = Arbiter::new(address, config.vm_id, ArbiterId(owner.0)).record();
    let record = record.map_err(|e| Error::Conflict(format!("whose vm_id {} is, is not known: {e}", config.vm_id)))?;
    if record.epoch.0 != 0 {
        let why = format!("vm_id {} is in use, or was (epoch {})", config.vm_id, record.epoch.0);
        return Err(Error::Conflict(format!("{why}: take another, or say \"replace\"")));
    }
    Ok(())
}

/// The state of network devices is the instance's: its MACs, no frames of the template's.
fn own_addresses(state: &mut VmState, config: &Config) {
    for device in &mut state.devices.virtio {
        let mac = config.nets.iter().find(|net| net.id == device.id).and_then(|net| net.mac);
        if let (DeviceState::Net(net), Some(mac)) = (&mut device.device, mac) {
            net.own_mac = mac.0;
            net.mac = mac.0;
            net.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests;
