//! Which files a thread may use once it is confined (landlock).
//!
//! Threads that face the guest: none. Control threads: what this process was given, as far as they need it later (the directory of the
//! control socket, of keys, of a checkpoint it was restored from), what the kernel tells about this process, and what the operator allows by
//! `--allow-path`. Always true: a rule is a directory or file that was opened while that was still allowed, so that it means the same
//! whatever is renamed, or becomes the root, afterwards.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, RulesetStatus,
};

use super::{Kind, confined};
use crate::error::{Error, FieldError, Result};

/// Newest rules of landlock that are asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V3;

/// Most rules: one more is refused.
const RULES_MAX: usize = 128;

/// What control threads read of the system: this process's memory map and pages, how much memory there is, which boot this is, the names
/// of block devices.
const SYSTEM: [&str; 5] =
    ["/proc/self", "/proc/meminfo", "/proc/sys/kernel/random/boot_id", "/sys/dev/block", "/sys/devices"];

/// What may be done with a file, or with all below a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Read it.
    Read,
    /// Read, write, make and remove files, directories and sockets.
    Change,
    /// Remove files: of a socket that goes with the process.
    Remove,
}

impl Use {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Use::Read => read,
            Use::Remove => AccessFs::RemoveFile.into(),
            Use::Change => {
                read | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::RemoveFile
                    | AccessFs::RemoveDir
                    | AccessFs::MakeReg
                    | AccessFs::MakeDir
                    | AccessFs::MakeSock
                    | AccessFs::MakeSym
            }
        }
    }
}

/// The value of `--allow-path`: `PATH[,access=ro|rw]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedPath {
    path: PathBuf,
    access: Use,
}

impl FromStr for AllowedPath {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (path, access) = match text.rsplit_once(",access=") {
            None => (text, Use::Change),
            Some((path, "rw")) => (path, Use::Change),
            Some((path, "ro")) => (path, Use::Read),
            Some((_, other)) => return Err(format!("access={other}: it is ro or rw")),
        };
        if path.is_empty() {
            return Err("a path is needed: PATH[,access=ro|rw]".into());
        }
        Ok(AllowedPath { path: path.into(), access })
    }
}

struct Rule {
    fd: PathFd,
    access: Use,
}

/// A control thread of this process has been confined.
static CONTROL_CONFINED: AtomicBool = AtomicBool::new(false);

static RULES: Mutex<Vec<Rule>> = Mutex::new(Vec::new());

/// Control threads that are confined from now on may use this.
pub fn allow(path: &Path, access: Use) -> io::Result<()> {
    let fd = PathFd::new(path).map_err(io::Error::other)?;
    let mut rules = RULES.lock().unwrap_or_else(PoisonError::into_inner);
    if rules.len() == RULES_MAX {
        return Err(io::Error::other(format!("more than {RULES_MAX} paths")));
    }
    rules.push(Rule { fd, access });
    Ok(())
}

/// The same for the directory that holds a file the process was given. What cannot be opened is not allowed, which is the safe side.
pub fn allow_beside(file: &Path, access: Use) {
    if confined() {
        // No thread gets more than it has.
        return;
    }
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    if let Err(e) = allow(dir, access) {
        log::info!("{}: not for control threads: {e}", dir.display());
    }
}

/// What the operator allows.
pub fn allow_all(paths: &[AllowedPath]) -> Result<()> {
    let refused = |p: &AllowedPath| {
        let e = allow(&p.path, p.access).err()?;
        Some(FieldError::new("--allow-path", format!("{}: {e}", p.path.display())))
    };
    let errors: Vec<_> = paths.iter().filter_map(refused).collect();
    if errors.is_empty() { Ok(()) } else { Err(Error::Config(errors)) }
}

/// What to add to the error of a file of which the operator does not see why it cannot be used; empty where that is not the reason.
pub fn hint(e: &io::Error) -> &'static str {
    // The thread may have been started by one that is confined.
    if CONTROL_CONFINED.load(Ordering::Relaxed) && e.kind() == io::ErrorKind::PermissionDenied {
        " (start vmm with --allow-path DIR for what is to be used while the VM runs, beyond the directories of its control socket and keys)"
    } else {
        ""
    }
}

/// From now on the calling thread opens nothing (if it faces the guest), or only what is allowed; executes nothing, makes no devices.
pub fn restrict(kind: Kind) -> Result<()> {
    let status = landlocked(kind).map_err(|e| Error::State(format!("landlock: {e}")))?;
    if status == RulesetStatus::NotEnforced {
        log::info!("this kernel has no landlock: files are not restricted beyond system calls");
    }
    Ok(())
}

fn landlocked(kind: Kind) -> std::result::Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK))?.create()?;
    if kind == Kind::Control {
        CONTROL_CONFINED.store(true, Ordering::Relaxed);
        for path in SYSTEM {
            // A chroot has none of them.
            if let Ok(fd) = PathFd::new(path) {
                ruleset = ruleset.add_rule(PathBeneath::new(fd, Use::Read.rights()))?;
            }
        }
        let rules = RULES.lock().unwrap_or_else(PoisonError::into_inner);
        ruleset = rules.iter().try_fold(ruleset, add)?;
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

fn add(ruleset: RulesetCreated, rule: &Rule) -> std::result::Result<RulesetCreated, RulesetError> {
    ruleset.add_rule(PathBeneath::new(&rule.fd, rule.access.rights()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_be_followed_by_what_may_be_done() {
        let parse = |text: &str| text.parse::<AllowedPath>();
        let allowed = |path: &str, access| Ok(AllowedPath { path: path.into(), access });
        assert_eq!(parse("/a"), allowed("/a", Use::Change));
        assert_eq!(parse("/a,access=ro"), allowed("/a", Use::Read));
        assert_eq!(parse("a,b,access=rw"), allowed("a,b", Use::Change));
        assert_eq!(parse("/a,access=rx"), Err("access=rx: it is ro or rw".into()));
        assert!(parse("").is_err() && parse(",access=ro").is_err());
    }

    #[test]
    fn what_is_not_there_cannot_be_allowed() {
        let missing = "/proc/self/none".parse::<AllowedPath>().unwrap();
        let error = allow_all(&[missing]).unwrap_err().to_string();
        assert!(error.starts_with("--allow-path: /proc/self/none: "), "{error}");
    }
}
