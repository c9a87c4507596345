//! The nested test bed: our `vmm` with stock Linux as its guest, inside a Linux machine that QEMU emulates in software, with
//! an AMD-V KVM of its own.
//!
//! The emulated ("outer") machine boots from memory only ([`machine`]): `vmm`, tools, and Debian's cloud kernel once more as the
//! guest's. Its init (`outer.sh`) runs *scenarios* one after the other, each a shell script below `scenarios/` with the
//! functions of `lib.sh`, and prints a line for what became of each ([`verdict`]). Always true: every scenario that was asked for
//! gets exactly one verdict; one that hangs or takes the outer machine down fails, and the rest goes on in a new machine.
mod document;
mod first_steps;
pub mod machine;
pub mod report;
pub mod scenario;
mod verdict;

use crate::artifacts::{self, Artifacts};
use crate::cleanup::Temporary;
use anyhow::{Context, Result, bail};
use images::linux;
use machine::{Machine, Mode};
pub use scenario::{ALL, Scenario};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
pub use verdict::Verdict;

/// Outer machines at one time. Each has one CPU: see [`machine`].
const MACHINES: usize = 2;

/// What the emulated machine is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Cargo's target directory.
    pub target: PathBuf,
    /// The monitor.
    pub vmm: PathBuf,
    /// The module images, where a scenario needs them.
    pub images: Option<images::Images>,
}

impl Parts {
    /// Builds what these scenarios need.
    pub fn build(scenarios: &[&Scenario]) -> Result<Self> {
        if scenarios.iter().any(|s| s.images) {
            return Artifacts::build().map(Parts::from);
        }
        Ok(Parts { target: artifacts::target_dir()?, vmm: artifacts::build_vmm()?, images: None })
    }
}

impl From<Artifacts> for Parts {
    fn from(artifacts: Artifacts) -> Self {
        Parts { target: artifacts.target, vmm: artifacts.vmm, images: Some(artifacts.images) }
    }
}

/// What became of a scenario.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// How long it took inside the machine; zero if the machine did not say.
    pub took: Duration,
    /// Figures it printed.
    pub notes: Vec<String>,
    /// What the machine printed while it ran.
    pub console: String,
}

/// Gets what has to be downloaded, the first time: after this the tests need no network.
pub fn fetch(target: &Path) -> Result<()> {
    kernel(target)?;
    first_steps::parts(&directory(target)).map(drop)
}

/// The kernel of both machines.
fn kernel(target: &Path) -> Result<linux::Kernel> {
    linux::kernel(&directory(target)).context("the Linux kernel of the nested tests")
}

fn directory(target: &Path) -> PathBuf {
    target.join("nested")
}

/// The scenarios whose name contains `filter`.
pub fn matching(filter: Option<&str>) -> Vec<&'static Scenario> {
    // The exact name means that one alone, so that a name may begin with another.
    if let Some(exact) = ALL.iter().find(|s| Some(s.name) == filter) {
        return vec![exact];
    }
    ALL.iter().filter(|s| filter.is_none_or(|f| s.name.contains(f))).collect()
}

/// Runs the scenarios, on two machines where there are several, and shows each report when it is there, and with `live` all that the
/// machines print.
pub fn run(
    scenarios: &[&'static Scenario],
    parts: &Parts,
    live: bool,
    shown: impl Fn(&Report) + Send + Sync,
) -> Result<Vec<Report>> {
    let bed = Bed::prepare(parts, scenarios, Mode { live, shell: false })?;
    let reports = Mutex::new(Vec::new());
    let report = |report: Report| {
        shown(&report);
        reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(report);
    };
    let shares = share(scenarios, if live { 1 } else { MACHINES });
    std::thread::scope(|scope| -> Result<()> {
        let (bed, report) = (&bed, &report);
        let workers: Vec<_> = shares.into_iter().map(|share| scope.spawn(move || bed.run(share, report))).collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().unwrap_or_else(|_| bail!("a thread of the nested tests panicked")))
    })?;
    Ok(reports.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// One scenario with a shell behind it on this terminal, or the shell alone.
pub fn shell(scenarios: &[&'static Scenario], parts: &Parts) -> Result<()> {
    let bed = Bed::prepare(parts, scenarios, Mode { live: true, shell: true })?;
    bed.machine.interactive(scenarios)
}

/// Shares the scenarios out, the long ones first, each to whom has least to do.
fn share(scenarios: &[&'static Scenario], machines: usize) -> Vec<Vec<&'static Scenario>> {
    let mut shares = vec![(0, Vec::new()); machines.min(scenarios.len()).max(1)];
    let mut sorted = scenarios.to_vec();
    sorted.sort_by_key(|s| std::cmp::Reverse(s.seconds));
    for scenario in sorted {
        if let Some(least) = shares.iter_mut().min_by_key(|(seconds, _)| *seconds) {
            least.0 += scenario.seconds;
            least.1.push(scenario);
        }
    }
    shares.into_iter().map(|(_, share)| share).collect()
}

/// Everything that machines are started from.
struct Bed {
    machine: Machine,
    /// Removed with the value, and by an interrupt.
    _work: Temporary,
}

impl Bed {
    fn prepare(parts: &Parts, scenarios: &[&'static Scenario], mode: Mode) -> Result<Self> {
        let cache = directory(&parts.target);
        let kernel = kernel(&parts.target)?;
        let work = Temporary::directory(cache.join(format!("run-{}", std::process::id())))?;
        let machine = Machine::build(kernel, parts, scenarios, mode, &cache, work.path())?;
        Ok(Bed { machine, _work: work })
    }

    /// Runs scenarios until each has a verdict.
    fn run(&self, mut left: Vec<&'static Scenario>, report: &impl Fn(Report)) -> Result<()> {
        while !left.is_empty() {
            let mut done = Vec::new();
            self.machine.run(&left, |r: Report| {
                done.push(r.name);
                report(r);
            })?;
            // Machine::run reports at least one, or fails.
            left.retain(|s| !done.contains(&s.name));
        }
        Ok(())
    }
}
