//! What the other commands need of the machine: checked with one clear sentence each, and installed where it is a package.
//!
//! Always true: nothing is installed that is there already, no service is started by an installation, and a package that
//! cannot be installed is named with what to do.
use crate::cleanup::Temporary;
use crate::process;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How much a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `demo`: the lab and a client.
    Demo,
    /// `bench`: the load generators and the programs compared with, too.
    Bench,
    /// `test nested`: an emulated machine.
    Nested,
    /// `test`: everything.
    Test,
}

const DEMO_PACKAGES: &[&str] = &["iproute2", "libnfs-utils", "curl"];
const BENCH_PACKAGES: &[&str] = &[
    "gcc",
    "libc6-dev",
    "libnfs-dev",
    "liburing-dev",
    "nfs-ganesha",
    "nfs-ganesha-vfs",
    "qemu-system-x86",
    "qemu-system-common",
    "rpcbind",
];
/// What the emulated machine is made of; `lz4` unpacks its kernel.
const NESTED_PACKAGES: &[&str] =
    &["qemu-system-x86", "qemu-system-common", "qemu-utils", "busybox-static", "cpio", "lz4", "socat", "e2fsprogs"];

/// What the tests of single crates need: the control interface of `vmm` is tried with a program from PyPI.
const TEST_PACKAGES: &[&str] = &["python3-venv"];

/// While it is there, Debian's packages start no service.
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// Space for tool output, images and small files, beside what a command needs for its disks.
const BUILD_BYTES: u64 = 3 << 30;

/// Checks the machine and installs missing packages. `disk_bytes` is what the command will write below `data_dir`.
pub fn prepare(need: Need, data_dir: &Path, disk_bytes: u64) -> Result<()> {
    check_root()?;
    packages(need)?;
    if need == Need::Nested {
        return check_space(data_dir, disk_bytes.saturating_add(BUILD_BYTES));
    }
    check_device(
        "/dev/kvm",
        "this needs KVM: run it on a machine (or a virtual machine with nested virtualisation) whose kernel offers it, \
         for example after `modprobe kvm_intel` or `modprobe kvm_amd`",
    )?;
    check_device("/dev/net/tun", "virtual network cards need the kernel's tun driver: try `modprobe tun`")?;
    check_space(data_dir, disk_bytes.saturating_add(BUILD_BYTES))
}

/// Fails unless the process may do what the lab needs.
pub fn check_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this must run as root (network namespaces, taps and /dev/kvm): try `sudo -E cargo xtask …`");
    }
    Ok(())
}

fn check_device(path: &str, what_to_do: &str) -> Result<()> {
    match std::fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(e) => bail!("cannot open {path} ({e}); {what_to_do}"),
    }
}

/// Fails if a directory's file system has fewer free bytes.
pub fn check_space(dir: &Path, bytes: u64) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let stat = nix::sys::statvfs::statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < bytes {
        bail!(
            "{} has {} MiB free, {} MiB are needed; make room, or put the build elsewhere with CARGO_TARGET_DIR, \
             or ask for less with --size",
            dir.display(),
            free >> 20,
            bytes.div_ceil(1 << 20)
        );
    }
    Ok(())
}

fn packages(need: Need) -> Result<()> {
    let mut wanted = DEMO_PACKAGES.to_vec();
    if matches!(need, Need::Bench | Need::Test) {
        wanted.extend(BENCH_PACKAGES);
    }
    if matches!(need, Need::Nested | Need::Test) {
        wanted.extend(NESTED_PACKAGES);
    }
    if need == Need::Test {
        wanted.extend(TEST_PACKAGES);
    }
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("this needs what Debian calls: {list}; install it, this machine has no apt-get");
    }
    eprintln!("installing {list}");
    // Left alone where the machine has one of its own.
    let policy = Path::new(POLICY);
    let _policy =
        if policy.exists() { None } else { Some(Temporary::script(policy.to_owned(), "#!/bin/sh\nexit 101\n")?) };
    if install(&missing).is_err() {
        // No package lists, or old ones.
        process::output(apt().arg("update")).context("cannot read the package lists")?;
        install(&missing).with_context(|| format!("cannot install {list}; install these packages by hand"))?;
    }
    Ok(())
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    let query = Command::new("dpkg-query").args(["-W", "-f=${Package} ${db:Status-Status}\n"]).args(wanted).output();
    let installed = match query {
        // Its status is 1 when one is unknown; the others are listed all the same.
        Ok(out) => String::from_utf8_lossy(&out.stdout).into_owned(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("this sets itself up on Debian and its relatives; dpkg-query is not here")
        }
        Err(e) => return Err(e).context("cannot run dpkg-query"),
    };
    let there = |p: &str| installed.lines().any(|l| l == format!("{p} installed"));
    Ok(wanted.iter().copied().filter(|p| !there(p)).collect())
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y"]);
    apt
}

fn install(packages: &[&str]) -> Result<()> {
    process::output(apt().args(["install", "--no-install-recommends"]).args(packages)).map(drop)
}

/// Builds the NFS load generator into `dir` and returns its path.
pub fn load_generator(root: &Path, dir: &Path) -> Result<PathBuf> {
    compile(root, dir, "nfs_load", "-lnfs")
}

/// Builds the program that measures a disk image without a VM into `dir` and returns its path.
pub fn block_load(root: &Path, dir: &Path) -> Result<PathBuf> {
    compile(root, dir, "block_load", "-luring")
}

/// Builds a program of `ci/loadgen`, if it is older than its source.
fn compile(root: &Path, dir: &Path, name: &str, library: &str) -> Result<PathBuf> {
    let source = root.join(format!("ci/loadgen/{name}.c"));
    let program = dir.join(name);
    std::fs::create_dir_all(dir)?;
    let modified = |p: &Path| std::fs::metadata(p).and_then(|m| m.modified()).ok();
    if modified(&program) <= modified(&source) {
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&program).arg(&source).arg(library);
        process::output(&mut gcc).with_context(|| format!("cannot build {name}"))?;
    }
    Ok(program)
}
