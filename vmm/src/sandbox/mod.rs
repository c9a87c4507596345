//! Giving up what a thread does not need before the guest can have any use of it.
//!
//! Owns what this process was told about its sandbox, once and for all threads. Threads are of two sorts: those that face the
//! guest ([`Kind::Vcpu`], [`Kind::Io`]) can open no file at all and make few system calls; those that serve the operator
//! ([`Kind::Control`]) open sockets and the files of [`files`], but execute no program, make no devices, and have no capability either. A thread
//! confines itself; what it starts afterwards is confined likewise. Always true: confining is never undone, and a
//! thread that cannot be confined as asked does not go on. A forbidden system call ends the process with
//! [`STATUS`], after a line that names it.
//!
//! Not in here: what the host's kernel cannot do (a kernel without landlock is said so in the log, the rest holds).

mod calls;
pub mod files;
mod filter;
mod namespaces;

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::error::{Error, Result, host};
use crate::schedule::RANK_MAX;
pub use filter::STATUS;

/// A sort of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Runs a vCPU, and serves devices while the guest is parked.
    Vcpu,
    /// Serves devices.
    Io,
    /// Control interface, porting, checkpoints.
    Control,
}

/// What the operator wants.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Give nothing up: for debuggers, and for kernels without seccomp.
    #[arg(long)]
    pub no_sandbox: bool,
    /// Become this user before the guest runs.
    #[arg(long, value_name = "UID", conflicts_with = "no_sandbox")]
    pub uid: Option<u32>,
    /// Become this group before the guest runs.
    #[arg(long, value_name = "GID", conflicts_with = "no_sandbox")]
    pub gid: Option<u32>,
    /// Make this directory the root of the file system before the guest runs. Paths given later are inside.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["no_sandbox", "receive"])]
    pub chroot: Option<PathBuf>,
    /// Enter this network namespace before anything is opened: a name of `ip netns`, or a file.
    #[arg(long, value_name = "NAME|PATH")]
    pub netns: Option<PathBuf>,
    /// Have mount, IPC, UTS and cgroup namespaces of its own.
    #[arg(long)]
    pub unshare: bool,
    /// Let control threads use this file or directory while the VM runs: for checkpoints, keys that are replaced. Repeatable. Allowed
    /// without it: the directories of the control socket, of the keys, and of a checkpoint that is restored.
    #[arg(long, value_name = "PATH[,access=ro|rw]", conflicts_with = "no_sandbox")]
    pub allow_path: Vec<files::AllowedPath>,
}

struct Sandbox {
    options: Options,
    filters: filter::Filters,
    /// Control threads keep the right to be urgent as a capability, for want of the limit that would give it to them.
    keeps_nice: bool,
}

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

thread_local! {
    /// How this thread is confined.
    static CONFINED: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// Sets the sandbox of this process up: threads that call [`confine`] are confined from now on. To be called once, before there
/// are other threads. Without it nothing is confined, as in a program that uses this crate as a library.
pub fn set_up(options: Options) -> Result<()> {
    if let Some(netns) = &options.netns {
        namespaces::enter_network(netns)?;
    }
    if options.unshare {
        namespaces::unshare()?;
    }
    if options.no_sandbox {
        log::warn!("--no-sandbox: this process keeps all its rights");
        return Ok(());
    }
    if let Some(dir) = options.chroot.as_deref().filter(|d| !d.is_dir()) {
        return Err(Error::Config(vec![crate::error::FieldError::new(
            "--chroot",
            format!("{}: not a directory", dir.display()),
        )]));
    }
    if let Some(dir) = &options.chroot {
        // What is in there is there to be used.
        files::allow(dir, files::Use::Change).map_err(host(format!("chroot {}", dir.display())))?;
    }
    files::allow_all(&options.allow_path)?;
    let keeps_nice = !limit_urgency();
    filter::install_handler()?;
    let filters = filter::Filters::compile()?;
    let _ = SANDBOX.set(Sandbox { options, filters, keeps_nice });
    Ok(())
}

/// Porting uses the lowest real-time priorities for the instants of a hand-over: lets threads without capabilities do that. Where
/// the limit cannot be raised (that takes CAP_SYS_RESOURCE) but the capability that needs no limit is there, `false`.
fn limit_urgency() -> bool {
    let most = RANK_MAX as libc::rlim_t;
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: the limit is valid for the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_RTPRIO, &limit) } == 0 {
        return true;
    }
    let e = std::io::Error::last_os_error();
    if caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_NICE).unwrap_or(false) {
        log::info!("limit of real-time priorities: {e}: control threads keep CAP_SYS_NICE for porting");
        return false;
    }
    log::info!("no real-time priority for porting, pauses will be longer on a busy host: {e}");
    true
}

/// Confines the calling thread, if this process has a sandbox.
pub fn confine(kind: Kind) -> Result<()> {
    let Some(sandbox) = SANDBOX.get() else { return Ok(()) };
    // The root is all threads': it stays while the VM is being built, and threads of its devices may be started then.
    if kind == Kind::Control
        && let Some(dir) = &sandbox.options.chroot
    {
        change_root(dir)?;
    }
    // Of the thread: capabilities are not the process's. The bounding set goes first: later the right to change it is gone too,
    // and so it is for a thread that was started by a confined one.
    for set in [caps::CapSet::Ambient, caps::CapSet::Bounding] {
        let _ = caps::clear(None, set);
    }
    // A thread that was started by a confined one may have none to keep.
    let nice = caps::Capability::CAP_SYS_NICE;
    let keeps = sandbox.keeps_nice
        && kind == Kind::Control
        && caps::has_cap(None, caps::CapSet::Permitted, nice).unwrap_or(false);
    if keeps {
        // Not lost with the user.
        // SAFETY: no memory is involved.
        unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) };
    }
    become_user(&sandbox.options)?;
    let kept: caps::CapsHashSet = keeps.then_some(nice).into_iter().collect();
    let none = caps::CapsHashSet::new();
    // What is effective must be permitted: it goes first, and comes last.
    for (set, to) in [
        (caps::CapSet::Effective, &none),
        (caps::CapSet::Permitted, &kept),
        (caps::CapSet::Inheritable, &none),
        (caps::CapSet::Effective, &kept),
    ] {
        caps::set(None, set, to).map_err(|e| Error::State(format!("capabilities: {e}")))?;
    }
    // SAFETY: no memory is involved.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(host("no_new_privs")(std::io::Error::last_os_error()));
    }
    files::restrict(kind)?;
    sandbox.filters.apply(kind)?;
    CONFINED.set(Some(kind));
    Ok(())
}

/// Whether the calling thread is confined.
fn confined() -> bool {
    CONFINED.get().is_some()
}

/// Whether the calling thread faces the guest and is confined. What it starts is confined as it is, and cannot do more.
pub fn faces_guest() -> bool {
    matches!(CONFINED.get(), Some(Kind::Vcpu | Kind::Io))
}

/// The root is the whole process's: the first thread changes it.
fn change_root(dir: &std::path::Path) -> Result<()> {
    static CHANGED: OnceLock<()> = OnceLock::new();
    if CHANGED.set(()).is_err() {
        return Ok(());
    }
    std::os::unix::fs::chroot(dir).map_err(host(format!("chroot {}", dir.display())))?;
    std::env::set_current_dir("/").map_err(host("chdir /"))
}

/// By the bare system calls, which change the calling thread alone: the C library would ask threads that are confined already.
fn become_user(options: &Options) -> Result<()> {
    let failed = |what: &str| host(what.to_owned())(std::io::Error::last_os_error());
    // SAFETY: no memory is involved.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    if options.uid.is_none_or(|u| u == uid) && options.gid.is_none_or(|g| g == gid) {
        // Nothing asked for, or inherited from the thread that started this one.
        return Ok(());
    }
    if options.uid.is_some() || options.gid.is_some() {
        // SAFETY: an empty list of groups needs no memory.
        if unsafe { libc::syscall(libc::SYS_setgroups, 0usize, std::ptr::null::<libc::gid_t>()) } != 0 {
            return Err(failed("--uid, --gid: giving up the groups"));
        }
    }
    if let Some(gid) = options.gid {
        // SAFETY: no memory is involved.
        if unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) } != 0 {
            return Err(failed("--gid"));
        }
    }
    if let Some(uid) = options.uid {
        // SAFETY: no memory is involved.
        if unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) } != 0 {
            return Err(failed("--uid"));
        }
    }
    Ok(())
}
