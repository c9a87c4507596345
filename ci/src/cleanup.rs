//! What must not outlive a run: processes, network namespaces, directories.
//!
//! Always true: a thing is registered in the same locked step that creates it, so an interrupt (Ctrl-C,
//! SIGTERM, SIGHUP) finds all there is; the interrupt handler keeps the lock until the process has ended, so that nothing
//! is created behind it. Survives: interrupts at any time. What a SIGKILL leaves is removed by `cargo xtask clean`, which knows
//! a dead run by its lock file (see [`crate::lab`]).
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Says something on standard error, if that is still there: `eprintln!` panics when it is not.
macro_rules! say {
    ($($message:tt)*) => {{
        let _ = writeln!(std::io::stderr(), $($message)*);
    }};
}

/// Exit status after a panic, as Rust has it.
const PANICKED: i32 = 101;
/// How often a panic tries to get hold of the list.
const PANIC_TRIES: usize = 200;
/// Exit status after an interrupt, as a shell reports it for SIGINT.
const INTERRUPTED: i32 = 130;
/// Rounds of killing what runs in a namespace: a process may fork while it is being killed.
const KILL_ROUNDS: usize = 50;

/// Something to undo.
#[derive(Debug, PartialEq, Eq)]
enum Thing {
    Process(u32),
    Namespace(String),
    Path(PathBuf),
    KernelDirectory(PathBuf),
}

static THINGS: Mutex<Vec<Thing>> = Mutex::new(Vec::new());

fn things() -> MutexGuard<'static, Vec<Thing>> {
    THINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes an interrupt, and a panic, undo everything registered and end the process.
pub fn install_handler() -> Result<()> {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        say(info);
        // The thread that panics may be the one that holds the lock.
        for _ in 0..PANIC_TRIES {
            if let Ok(mut things) = THINGS.try_lock() {
                undo_all(&mut things);
                std::process::exit(PANICKED);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }));
    ctrlc::set_handler(|| {
        let mut things = things();
        say!("\ninterrupted: cleaning up");
        undo_all(&mut things);
        std::process::exit(INTERRUPTED);
    })
    .context("cannot install the Ctrl-C handler")
}

/// Newest first: processes before the namespaces and directories they use.
fn undo_all(things: &mut Vec<Thing>) {
    for thing in things.drain(..).rev() {
        undo(&thing);
    }
}

fn undo(thing: &Thing) {
    match thing {
        Thing::Process(pid) => {
            if let Ok(pid) = i32::try_from(*pid) {
                // It may have ended already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        Thing::Namespace(name) => delete_namespace(name),
        Thing::KernelDirectory(path) => {
            if let Err(e) = std::fs::remove_dir(path) {
                say!("cannot remove {}: {e}", path.display());
            }
        }
        Thing::Path(path) => {
            let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            if let Err(e) = removed
                && e.kind() != std::io::ErrorKind::NotFound
            {
                say!("cannot remove {}: {e}", path.display());
            }
        }
    }
}

/// Kills what runs in a namespace, then deletes it (and with it its links).
pub fn delete_namespace(name: &str) {
    for _ in 0..KILL_ROUNDS {
        let pids = Command::new("ip").args(["netns", "pids", name]).output();
        let pids = pids.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        // A thread of ours that looks into the namespace is listed too.
        let own = std::process::id().to_string();
        let pids: Vec<i32> = pids.split_whitespace().filter(|p| *p != own).filter_map(|p| p.parse().ok()).collect();
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    match Command::new("ip").args(["netns", "delete", name]).output() {
        Ok(out) if out.status.success() => {}
        Ok(out) => say!("cannot delete namespace {name}: {}", String::from_utf8_lossy(&out.stderr).trim()),
        Err(e) => say!("cannot run ip: {e}"),
    }
}

/// Starts a child and registers it in one step.
pub fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let mut things = things();
    let child = command.spawn()?;
    things.push(Thing::Process(child.id()));
    Ok(child)
}

/// Forgets a child that has been waited for.
pub fn reaped(pid: u32) {
    things().retain(|t| *t != Thing::Process(pid));
}

/// A network namespace that goes with the value.
#[derive(Debug)]
pub struct Namespace(String);

impl Namespace {
    /// Creates it.
    pub fn create(name: String) -> Result<Self> {
        let mut things = things();
        crate::process::succeed(Command::new("ip").args(["netns", "add", &name]))?;
        things.push(Thing::Namespace(name.clone()));
        Ok(Namespace(name))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let mut things = things();
        delete_namespace(&self.0);
        things.retain(|t| !matches!(t, Thing::Namespace(n) if *n == self.0));
    }
}

/// A directory in a file system of the kernel's that goes with the value: what the kernel put in it goes by itself.
#[derive(Debug)]
pub struct KernelDirectory(PathBuf);

impl KernelDirectory {
    /// Creates it.
    pub fn create(path: PathBuf) -> Result<Self> {
        let mut things = things();
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        things.push(Thing::KernelDirectory(path.clone()));
        Ok(KernelDirectory(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for KernelDirectory {
    fn drop(&mut self) {
        let mut things = things();
        undo(&Thing::KernelDirectory(self.0.clone()));
        things.retain(|t| !matches!(t, Thing::KernelDirectory(p) if *p == self.0));
    }
}

/// A directory, with all that is in it, or a file, that goes with the value.
#[derive(Debug)]
pub struct Temporary(PathBuf);

impl Temporary {
    /// Creates a directory and those above it; only the last one goes.
    pub fn directory(path: PathBuf) -> Result<Self> {
        let mut things = things();
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        things.push(Thing::Path(path.clone()));
        Ok(Temporary(path))
    }

    /// Creates an executable file.
    pub fn script(path: PathBuf, text: &str) -> Result<Self> {
        let mut things = things();
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        things.push(Thing::Path(path.clone()));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Temporary(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let mut things = things();
        undo(&Thing::Path(self.0.clone()));
        things.retain(|t| !matches!(t, Thing::Path(p) if *p == self.0));
    }
}
