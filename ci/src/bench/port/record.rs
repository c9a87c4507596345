//! The kernel's own record of when vCPUs ran: one ruler for both sides of a comparison, whatever they say of themselves.
//!
//! Owns an instance of the kernel's tracing with the event `kvm_fpu`, which KVM writes when KVM_RUN has taken a vCPU's registers over
//! (`load`) and before it gives them back (`unload`), on every kind of processor; and `tcp_retransmit_skb`, for each segment that is
//! sent again. Always true: the file system is mounted in
//! a mount namespace of its own and nowhere else; the instance goes with the value, and at an interrupt; what a
//! SIGKILL leaves goes at the next start. Survives: a kernel without it ([`Record::start`] says why).
use crate::cleanup::KernelDirectory;
use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::collections::HashSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
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

/// When no vCPU ran, by CLOCK_MONOTONIC: from the last one's stop at the source to the first one's begin at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// See above.
    pub from: Duration,
    /// See above.
    pub to: Duration,
}

impl Gap {
    /// How long it was.
    pub fn length(&self) -> Duration {
        self.to - self.from
    }
}

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
        for (file, value) in [
            ("trace_clock", "mono"),
            ("buffer_size_kb", &BUFFER_KIB.to_string()),
            ("events/kvm/kvm_fpu/enable", "1"),
            ("events/tcp/tcp_retransmit_skb/enable", "1"),
        ] {
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

    fn read(&self) -> Result<String> {
        fs::read_to_string(self.path("trace")).context("cannot read the kernel's record")
    }

    /// How many segments to `server` were sent again by the host from `lead` before a gap until `trail` after it.
    pub fn resent(&self, server: Ipv4Addr, gap: Gap, lead: Duration, trail: Duration) -> Result<usize> {
        Ok(resent(&self.read()?, server)
            .filter(|at| (gap.from.saturating_sub(lead)..=gap.to + trail).contains(at))
            .count())
    }

    /// The gap between the vCPUs of `source` and those of `destination`, whose end may be yet to come: QEMU's source has ended when
    /// everything is sent.
    pub fn gap(&self, source: &Threads, destination: &Threads) -> Result<Gap> {
        let began = Instant::now();
        loop {
            let record = self.read()?;
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
    Some((thread, time(at)?, what.trim() == "load"))
}

/// What stands before the colon behind the time: `… [001] .....   612.345678`.
fn time(text: &str) -> Option<Duration> {
    let (seconds, micros) = text.rsplit_once(' ')?.1.split_once('.')?;
    Some(Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?))
}

/// When segments to `server` were sent again.
fn resent(record: &str, server: Ipv4Addr) -> impl Iterator<Item = Duration> {
    let to = format!(" daddr={server} ");
    record.lines().filter_map(move |line| {
        let (before, what) = line.split_once(": tcp_retransmit_skb: ")?;
        what.contains(&to).then(|| time(before)).flatten()
    })
}

fn gap(record: &str, source: &Threads, destination: &Threads) -> Option<Gap> {
    let events: Vec<_> = record.lines().filter_map(event).collect();
    let from =
        events.iter().filter(|(thread, _, runs)| source.contains(thread) && !runs).map(|(_, at, _)| *at).max()?;
    let begins = events.iter().filter(|(thread, at, runs)| destination.contains(thread) && *runs && *at > from);
    Some(Gap { from, to: begins.map(|(_, at, _)| *at).min()? })
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
        let found = gap(record, &source, &destination).expect("no gap is found");
        assert_eq!(found, Gap { from: Duration::from_micros(100_000_300), to: Duration::from_secs(101) });
        assert_eq!(found.length(), Duration::from_micros(999_700));
        assert_eq!(gap(record, &destination, &source), None);
    }

    #[test]
    fn segments_to_the_server_that_are_sent_again_are_found() {
        let record = "\
            \x20          <idle>-0       [000] ..s2.   100.000100: tcp_retransmit_skb: skbaddr=0000000000000001 \
            skaddr=0000000000000002 family=AF_INET sport=905 dport=2049 saddr=10.77.0.2 daddr=10.77.0.10 \
            saddrv6=::ffff:10.77.0.2 daddrv6=::ffff:10.77.0.10 state=TCP_ESTABLISHED\n\
            \x20          <idle>-0       [000] ..s2.   100.000200: tcp_retransmit_skb: skbaddr=0000000000000001 \
            skaddr=0000000000000002 family=AF_INET sport=905 dport=7000 saddr=10.77.0.2 daddr=10.77.0.1 \
            saddrv6=::ffff:10.77.0.2 daddrv6=::ffff:10.77.0.1 state=TCP_ESTABLISHED\n";
        let times: Vec<_> = resent(record, Ipv4Addr::new(10, 77, 0, 10)).collect();
        assert_eq!(times, [Duration::from_micros(100_000_100)]);
    }
}
