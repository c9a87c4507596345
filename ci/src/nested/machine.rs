//! The outer machine: what goes into it, how QEMU is started, and how its console is followed.
//!
//! Always true: it has one CPU (with two, QEMU's emulation loses wake-ups between them and hangs) and no disk; it is killed when
//! it says nothing of what is expected within the limits; whatever it ends by, the scenario that was running gets a verdict.
use super::scenario::{JOBS, Scenario};
use super::verdict::{Event, Verdict, event};
use super::{Parts, Report, first_steps};
use crate::process::{self, Daemon};
use crate::qmp::Qmp;
use crate::{copy, lab, modules};
use anyhow::{Result, bail};
use images::linux::{self, Contents};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const OUTER_MODULES: &[&str] = &["kvm-amd", "tun", "bridge", "vhost_net"];
const INNER_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];
/// With AMD-V; without what the emulation says it does not have.
const CPU: &str =
    "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec";
/// Memory of the outer machine in MiB.
const MEMORY_MIB: u32 = 3072;
/// Time to boot it on a busy machine; an idle one takes 4 s.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Beyond a scenario's own limit, which its init watches.
const GRACE: Duration = Duration::from_secs(60);
/// See [`Nudge`].
const NUDGE_EVERY: Duration = Duration::from_secs(1);
/// How often its console is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Lines of each log that a failed scenario quotes.
const QUOTE: u32 = 40;

/// How scenarios are run.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Show everything that is printed, with the consoles of the guests.
    pub live: bool,
    /// End in a shell.
    pub shell: bool,
}

/// What an outer machine is started from.
pub struct Machine {
    kernel: linux::Kernel,
    initrd: PathBuf,
    work: PathBuf,
    mode: Mode,
    started: AtomicU32,
}

impl Machine {
    /// Builds the initial RAM disks in `work`; what does not change is kept in `cache`.
    pub fn build(
        kernel: linux::Kernel,
        parts: &Parts,
        scenarios: &[&Scenario],
        mode: Mode,
        cache: &Path,
        work: &Path,
    ) -> Result<Self> {
        let vmlinux = cache.join("vmlinux");
        linux::vmlinux(&kernel, &vmlinux)?;
        let (root, inner) = (work.join("root"), work.join("inner"));
        linux::initrd(&kernel, &inner_contents(), &root, &inner)?;
        let mut contents = Contents {
            programs: vec![
                (parts.vmm.clone(), "/bin/vmm".into()),
                program("/usr/bin/curl"),
                program("/usr/bin/nfs-cp"),
                program("/usr/bin/socat"),
                program("/usr/bin/qemu-storage-daemon"),
                // As a reader of the documentation has them: called by bash, which has no programs of its own.
                program("/usr/bin/bash"),
                ("/usr/sbin/ip".into(), "/usr/sbin/ip".into()),
                ("/usr/sbin/e2fsck".into(), "/usr/sbin/fsck.ext4".into()),
            ],
            files: vec![
                (kernel.vmlinuz.clone(), "/guest/vmlinuz".into()),
                (vmlinux, "/guest/vmlinux".into()),
                (inner, "/guest/initrd".into()),
            ],
            texts: vec![("/lib.sh".into(), include_str!("lib.sh").into()), ("/env.sh".into(), environment(mode))],
            modules: OUTER_MODULES.iter().map(|m| m.to_string()).collect(),
            init: include_str!("outer.sh").into(),
        };
        if let Some(images) = &parts.images {
            contents.files.push((images.nmodule.clone(), "/images/nmodule".into()));
            contents.files.push((images.dmodule.clone(), "/images/dmodule".into()));
        }
        if mode.shell || scenarios.iter().any(|s| s.first_steps) {
            let parts = first_steps::parts(cache)?;
            contents.files.extend(parts.files);
            contents.texts.extend(parts.texts);
        }
        for scenario in scenarios {
            contents.texts.push((format!("/scenarios/{}.sh", scenario.name), scenario.script.into()));
            contents.texts.push((format!("/scenarios/{}.limit", scenario.name), scenario.limit_seconds().to_string()));
        }
        let initrd = work.join("initrd");
        linux::initrd(&kernel, &contents, &root, &initrd)?;
        Ok(Machine { kernel, initrd, work: work.to_owned(), mode, started: AtomicU32::new(0) })
    }

    /// Runs scenarios in a new machine until it ends. Reports at least one, or fails.
    pub fn run(&self, scenarios: &[&'static Scenario], mut report: impl FnMut(Report)) -> Result<()> {
        let nth = self.started.fetch_add(1, Ordering::Relaxed);
        let [log, monitor] = ["console", "monitor"].map(|f| self.work.join(format!("{f}{nth}")));
        let mut qemu = self.qemu(scenarios);
        qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        let mut nudge = Nudge::new(self.work.join(format!("nudge{nth}")), &mut qemu);
        let mut machine = Daemon::start("the emulated machine", &mut qemu, &log)?;
        let mut follow = Follow::new(scenarios, self.mode.live);
        let mut file = std::fs::File::open(&log)?;
        loop {
            let ended = machine.ended()?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            follow.feed(&text, &mut report)?;
            nudge.turn();
            if let Some(status) = ended {
                return follow.ended(&format!("the emulated machine ended with {status}"), &mut report);
            }
            if follow.late() {
                follow.console.push_str(&processor(&monitor));
                machine.kill()?;
                return follow.ended("the emulated machine hangs", &mut report);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Runs a machine with its console on this terminal until it ends.
    pub fn interactive(&self, scenarios: &[&'static Scenario]) -> Result<()> {
        let mut qemu = self.qemu(scenarios);
        let mut nudge = Nudge::new(self.work.join("nudge"), &mut qemu);
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    nudge.turn();
                    std::thread::sleep(POLL);
                }
            });
            let outcome = process::run(&mut qemu);
            ended.store(true, Ordering::Relaxed);
            outcome
        })
    }

    fn qemu(&self, scenarios: &[&Scenario]) -> Command {
        let names: Vec<&str> = scenarios.iter().map(|s| s.name).collect();
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", CPU]);
        qemu.args(["-smp", "1", "-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-nographic"]);
        qemu.args(["-no-reboot", "-serial", if self.mode.shell { "mon:stdio" } else { "stdio" }]);
        // Words with a `=` that the kernel does not know become variables of its init.
        qemu.args(["-append", &format!("console=ttyS0 quiet panic=-1 SCENARIOS={}", names.join(","))]);
        qemu.arg("-kernel").arg(&self.kernel.vmlinuz).arg("-initrd").arg(&self.initrd);
        qemu
    }
}

/// The console of a machine that runs scenarios.
struct Follow<'a> {
    scenarios: &'a [&'static Scenario],
    live: bool,
    /// The beginning of a line.
    partial: Vec<u8>,
    running: Option<&'static Scenario>,
    notes: Vec<String>,
    /// What was printed since the last verdict.
    console: String,
    deadline: Instant,
    reported: usize,
}

impl<'a> Follow<'a> {
    fn new(scenarios: &'a [&'static Scenario], live: bool) -> Self {
        let deadline = Instant::now() + BOOT_LIMIT;
        Follow {
            scenarios,
            live,
            partial: Vec::new(),
            running: None,
            notes: Vec::new(),
            console: String::new(),
            deadline,
            reported: 0,
        }
    }

    fn late(&self) -> bool {
        Instant::now() > self.deadline
    }

    fn feed(&mut self, text: &[u8], report: &mut impl FnMut(Report)) -> Result<()> {
        if self.live {
            // Nobody may be there to see it.
            let _ = std::io::stdout().write_all(text).and_then(|()| std::io::stdout().flush());
        }
        self.partial.extend_from_slice(text);
        while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(&String::from_utf8_lossy(&line), report)?;
        }
        Ok(())
    }

    fn line(&mut self, line: &str, report: &mut impl FnMut(Report)) -> Result<()> {
        match event(line) {
            Some(Event::Up) => self.deadline = Instant::now() + GRACE,
            Some(Event::Broken(why)) => bail!("the emulated machine cannot run scenarios: {why}"),
            Some(Event::Begin(name)) => {
                self.running = self.scenarios.iter().copied().find(|s| s.name == name);
                self.notes.clear();
                self.console.clear();
                let limit = self.running.map_or(0, Scenario::limit_seconds);
                self.deadline = Instant::now() + Duration::from_secs(limit.into()) + GRACE;
            }
            Some(Event::Note(note)) => self.notes.push(note),
            Some(Event::End(name, verdict, took)) if self.running.is_some_and(|s| s.name == name) => {
                self.verdict(verdict, took, report);
                self.deadline = Instant::now() + GRACE;
            }
            _ => self.console.push_str(line),
        }
        Ok(())
    }

    fn verdict(&mut self, verdict: Verdict, took: Duration, report: &mut impl FnMut(Report)) {
        if let Some(scenario) = self.running.take() {
            self.reported += 1;
            let (notes, console) = (std::mem::take(&mut self.notes), std::mem::take(&mut self.console));
            report(Report { name: scenario.name, verdict, took, notes, console });
        }
    }

    /// The machine is gone: the scenario that was running has failed.
    fn ended(mut self, why: &str, report: &mut impl FnMut(Report)) -> Result<()> {
        self.verdict(Verdict::Failed(why.to_owned()), Duration::ZERO, report);
        if self.reported == 0 {
            bail!(
                "{why} before the first verdict; its console:\n{}{}",
                self.console,
                String::from_utf8_lossy(&self.partial)
            );
        }
        Ok(())
    }
}

/// A byte now and then on the machine's second serial line.
///
/// QEMU 7.2 writes the word of pending interrupts in VMRUN and at a guest's exit without a lock (svm_helper.c): a timer that
/// expires just then is forgotten, and the one-shot timer of the machine with it, for ever. Any later interrupt makes the
/// emulated APIC look again and deliver both. Without this one in three machines hung when the host was busy.
struct Nudge {
    path: PathBuf,
    line: Option<UnixStream>,
    next: Instant,
}

impl Nudge {
    /// Gives the machine that line, by way of a socket at `path`.
    fn new(path: PathBuf, qemu: &mut Command) -> Self {
        qemu.arg("-chardev").arg(format!("socket,id=nudge,path={},server=on,wait=off", path.display()));
        qemu.args(["-serial", "chardev:nudge"]);
        Nudge { path, line: None, next: Instant::now() }
    }

    fn turn(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + NUDGE_EVERY;
        let Some(line) = &mut self.line else {
            // Not there yet: next time.
            self.line = UnixStream::connect(&self.path).and_then(|l| l.set_nonblocking(true).map(|()| l)).ok();
            return;
        };
        // A machine that has not opened its side takes no more than a few.
        let _ = line.write(b".");
    }
}

/// What the processor of a machine that hangs is doing, for the report: twice, to see whether it moves.
fn processor(monitor: &Path) -> String {
    let look = |qmp: &mut Qmp, command: &str| {
        let said = qmp.execute("human-monitor-command", json!({ "command-line": command }));
        said.map_or_else(|e| format!("{e:#}\n"), |text| text.as_str().unwrap_or_default().replace('\r', ""))
    };
    match Qmp::connect(monitor) {
        Ok(mut qmp) => {
            ["info registers", "info lapic", "info registers", "info pic"].map(|c| look(&mut qmp, c)).concat()
        }
        Err(e) => format!("{e:#}\n"),
    }
}

fn program(path: &str) -> (PathBuf, String) {
    let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
    (PathBuf::from(path), format!("/bin/{name}"))
}

/// The guest's initial RAM disk.
fn inner_contents() -> Contents {
    Contents {
        // Called by their whole paths: busybox prefers its own.
        programs: ["/usr/sbin/mke2fs", "/usr/sbin/e2fsck", "/usr/bin/socat"].map(|p| (p.into(), p.into())).to_vec(),
        files: Vec::new(),
        texts: JOBS.iter().map(|(name, script)| (format!("/jobs/{name}"), (*script).into())).collect(),
        modules: INNER_MODULES.iter().map(|m| m.to_string()).collect(),
        init: include_str!("inner.sh").into(),
    }
}

/// Variables of the outer machine's scripts: what this crate and the kernel's command line know.
fn environment(mode: Mode) -> String {
    let variables = [
        ("SCENARIOS", "$(echo $SCENARIOS | tr , ' ')".to_owned()),
        ("VERBOSE", if mode.live { "1" } else { "" }.into()),
        ("SHELL_AT_END", if mode.shell { "1" } else { "" }.into()),
        ("KERNEL_WORDS", if mode.live { "earlyprintk=ttyS0,115200" } else { "quiet" }.into()),
        ("QUOTE", QUOTE.to_string()),
        ("CLIENT_IP", lab::CLIENT1_IP.to_string()),
        ("DMODULE_CMDLINE", modules::dmodule_cmdline(modules::Disk::New)),
        ("DMODULE_MAC", modules::DMODULE_MAC.into()),
        ("FABRIC_IP", modules::FABRIC.ip().to_string()),
        ("FABRIC_PORT", modules::FABRIC.port().to_string()),
        ("NMODULE_CMDLINE", modules::nmodule_cmdline()),
        ("NMODULE_MAC", modules::NMODULE_MAC.into()),
        ("NMODULE_MEMORY", modules::NMODULE_MEMORY.into()),
        ("NMODULE_VM_ID", modules::NMODULE_VM_ID.to_string()),
        ("NFS_IP", modules::NFS.ip().to_string()),
        ("NFS_PORT", modules::NFS.port().to_string()),
        ("NFS_URL", copy::url("file")),
    ];
    variables.iter().map(|(name, value)| format!("export {name}=\"{value}\"\n")).collect()
}
