//! The kernel's own record of when vCPUs ran: one ruler for both sides of a comparison, whatever they say of themselves.
//!
//! Owns an instance of the kernel's tracing with the event `kvm_fpu`, which KVM writes when KVM_RUN has taken a vCPU's registers over
//! (`load`) and before it gives them back (`unload`), on every kind of processor. Always true: the file system is mounted in
//! a mount namespace of its own and nowhere else; the instance goes with the value, and at an interrupt; what a
//! SIGKILL leaves goes at the next start. Survives: a kernel without it ([`Record::start`] says why).
use crate::cleanup::KernelDirectory;
use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where tracing is by custom; in the namespace of its own it is mounted there.
const TRACING: &str = "/sys/kernel/tracing";
/// Kibibytes of each processor's buffer: some 60,000 events.
const BUFFER_KIB: u32 = 4096;
/// A destination that has not run by then does not.
const PATIENCE: Duration = Duration::from_secs(2);

/// Names of instances: this and the number of the process.
const NAME: &str = "xtask-";

/// An instance of the kernel's tracing.
pub struct Record {
    /// Goes before what it is reached by.
    instance: KernelDirectory,
    _instances: File,
}

/// Threads of a process.
pub type Threads = HashSet<u32>;

/// The threads `pid` has now.
pub fn threads(pid: u32) -> Result<Threads> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} has gone"))?;
    Ok(tasks.filter_map(|t| t.ok()?.file_name().to_str()?.parse().ok()).collect())
}

impl Record {
    /// Begins. What is recorded is kept until [`Record::clear`].
    pub fn start() -> Result<Record> {
        // A thread's mount namespace ends with it; what it has opened stays.
        let opened = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNS).context("cannot have a mount namespace")?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
                .context("cannot keep mounts private")?;
            mount(Some("tracefs"), TRACING, Some("tracefs"), MsFlags::empty(), none)
                .with_context(|| format!("cannot mount tracefs on {TRACING}"))?;
            Ok(File::open(PathBuf::from(TRACING).join("instances"))?)
        });
        let instances = opened.join().map_err(|_| anyhow!("the thread that opens the kernel's tracing panicked"))??;
        // Reached by this, wherever it is mounted.
        let all = PathBuf::from(format!("/proc/self/fd/{}", instances.as_raw_fd()));
        remove_those_of_the_dead(&all)?;
        let instance = KernelDirectory::create(all.join(format!("{NAME}{}", std::process::id())))?;
        let record = Record { instance, _instances: instances };
        for (file, value) in
            [("trace_clock", "mono"), ("buffer_size_kb", &BUFFER_KIB.to_string()), ("events/kvm/kvm_fpu/enable", "1")]
        {
            fs::write(record.path(file), value).with_context(|| format!("the kernel's tracing: {file}"))?;
        }
        Ok(record)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.instance.path().join(file)
    }

    /// Forgets what was recorded.
    pub fn clear(&self) -> Result<()> {
        fs::write(self.path("trace"), "").context("cannot clear the kernel's record")
    }

    /// From the last time a vCPU of `source` stopped to the first time after it that one of `destination` ran, which may be yet to come:
    /// QEMU's source has ended when everything is sent.
    pub fn gap(&self, source: &Threads, destination: &Threads) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let record = fs::read_to_string(self.path("trace")).context("cannot read the kernel's record")?;
            if let Some(gap) = gap(&record, source, destination) {
                return Ok(gap);
            }
            if began.elapsed() > PATIENCE {
                bail!("the kernel's record has no end of the source's run with a begin of the destination's behind it");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What a run that was killed has left.
fn remove_those_of_the_dead(instances: &Path) -> Result<()> {
    for entry in fs::read_dir(instances).context("cannot read the instances of the kernel's tracing")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(NAME)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir(instances.join(name));
        }
    }
    Ok(())
}

/// A line: thread, time, and whether a vCPU runs from then on.
/// `          vcpu0-2627    [001] .....   612.345678: kvm_fpu: load`
fn event(line: &str) -> Option<(u32, Duration, bool)> {
    let (before, what) = line.split_once(": kvm_fpu: ")?;
    // A thread's name may hold anything but what follows it here.
    let (thread, at) = before.rsplit_once('[')?;
    let thread = thread.trim_end().rsplit_once('-')?.1.parse().ok()?;
    let (seconds, micros) = at.rsplit_once(' ')?.1.split_once('.')?;
    let at = Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    Some((thread, at, what.trim() == "load"))
}

fn gap(record: &str, source: &Threads, destination: &Threads) -> Option<Duration> {
    let events: Vec<_> = record.lines().filter_map(event).collect();
    let stopped =
        events.iter().filter(|(thread, _, runs)| source.contains(thread) && !runs).map(|(_, at, _)| *at).max()?;
    let begins = events.iter().filter(|(thread, at, runs)| destination.contains(thread) && *runs && *at > stopped);
    Some(begins.map(|(_, at, _)| *at).min()? - stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_between_the_last_stop_and_the_first_run_behind_it() {
        let record = "# tracer: nop\n\
            \x20          vcpu0-10      [000] .....   100.000100: kvm_fpu: load\n\
            \x20          vcpu0-10      [000] .....   100.000200: kvm_fpu: unload\n\
            \x20       CPU 1/KVM-20     [001] .....   100.000250: kvm_fpu: load\n\
            \x20       CPU 1/KVM-20     [001] .....   100.000260: kvm_fpu: unload\n\
            \x20          vcpu1-11      [000] .....   100.000300: kvm_fpu: unload\n\
            \x20          vcpu0-99      [000] .....   100.000400: kvm_fpu: load\n\
            \x20       a [b]-c-20       [001] .....   101.000000: kvm_fpu: load\n\
            \x20          vcpu0-10      [001] ..... nonsense: kvm_fpu: load\n";
        let (source, destination) = (Threads::from([10, 11]), Threads::from([20, 21]));
        assert_eq!(gap(record, &source, &destination), Some(Duration::from_micros(999_700)));
        assert_eq!(gap(record, &destination, &source), None);
    }
}
