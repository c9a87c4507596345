//! How a process stands in a port, and what is done to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fabric::id::Owner;
use serde_json::Value;

use crate::hold::Points;
use crate::port_support::Vmm;

/// See [`in_vain`].
const WATCHED: Duration = Duration::from_millis(500);

/// A `vmm` with its points.
pub struct Instance {
    pub vmm: Vmm,
    pub points: Points,
    /// Number of its host.
    pub at: usize,
    pub log: PathBuf,
}

/// How a process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    Dead,
    Running,
    /// Waits for a VM, and none is on its way.
    Waiting,
    Unknown,
    /// A source that has lost, and waits for the VM to be given back.
    Watching,
    /// In the middle of something.
    Busy,
}

/// The id by which the ownership record knows a process.
pub fn owner(vmm: &Vmm) -> Option<Owner> {
    let (_, info) = vmm.try_api("GET", "/v1/vm", None)?;
    let hex = info["owner"].as_str()?;
    let half = |range| u64::from_str_radix(hex.get(range)?, 16).ok();
    Some(Owner([half(0..16)?, half(16..32)?]))
}

/// The source has done all it does for the port: it has ended, or its guest goes on.
pub fn source_is_over(vmm: &Vmm, id: u64) -> bool {
    match vmm.try_api("GET", &format!("/v1/migrations/{id}"), None) {
        Some((_, status)) => !["running", "completed"].contains(&status["state"].as_str().unwrap_or_default()),
        None => true,
    }
}

/// As it says itself; `port`: the one it is the source of.
pub fn stand(vmm: &mut Vmm, port: Option<u64>) -> Stand {
    if !vmm.is_alive() {
        return Stand::Dead;
    }
    let of_port = match port {
        Some(id) => match vmm.try_api("GET", &format!("/v1/migrations/{id}"), None) {
            Some((200, status)) if status["phase"] == "watching" => return Stand::Watching,
            Some((200, status)) => status["state"].clone(),
            _ => return Stand::Busy,
        },
        None => Value::Null,
    };
    let Some((200, info)) = vmm.try_api("GET", "/v1/vm", None) else { return Stand::Busy };
    match (of_port.as_str(), info["state"].as_str()) {
        (Some("unknown"), _) => Stand::Unknown,
        (Some("running" | "completed"), _) => Stand::Busy,
        (_, Some("running")) => Stand::Running,
        (_, Some("receiving")) if info["arrival"]["phase"] == "" => Stand::Waiting,
        _ => Stand::Busy,
    }
}

/// Whether a source has watched for long enough although the destination is dead: nobody can give the VM back any more, and so the source's limit
/// is not waited for; it is ended.
pub fn in_vain(since: &mut Option<Instant>, source: &mut Instance) -> bool {
    let over = since.get_or_insert_with(Instant::now).elapsed() > WATCHED;
    if over {
        signal(source, libc::SIGKILL);
    }
    over
}

/// Not to a process that has ended and been waited for.
pub fn signal(instance: &mut Instance, signal: i32) {
    if instance.vmm.is_alive() {
        instance.vmm.signal(signal);
    }
}

/// From now on the process gets no more memory, or any again.
pub fn starve(instance: &mut Instance, starve: bool) {
    if !instance.vmm.is_alive() {
        return;
    }
    let pid = instance.vmm.pid();
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let bytes = if starve { pages * 4096 } else { libc::RLIM_INFINITY };
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit is valid for the call; nothing is asked back.
    let rc = unsafe { libc::prlimit(pid as i32, libc::RLIMIT_AS, &limit, std::ptr::null_mut()) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}
