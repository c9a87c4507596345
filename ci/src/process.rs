//! Child processes: run to the end with a readable error, or kept as a [`Daemon`] that is killed with the value.
//!
//! Always true: every child is known to [`crate::cleanup`] until it has been waited for.
use crate::cleanup;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How much of a log an error quotes, from its end.
const LOG_TAIL: u64 = 3000;
/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(2);
/// Clock ticks a second in /proc/PID/stat (USER_HZ, the same on every x86 Linux).
const TICKS_PER_SECOND: f64 = 100.0;

/// `program arg arg` for messages.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a short tool without output of its own; its standard error becomes the error. Not registered for clean-up.
pub fn succeed(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", describe(command)))?;
    if !out.status.success() {
        bail!("{} failed: {}", describe(command), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs a tool to its end with its output on the terminal.
pub fn run(command: &mut Command) -> Result<()> {
    let status = Guard(spawn(command)?).wait()?;
    if !status.success() {
        bail!("{} ended with {status}", describe(command));
    }
    Ok(())
}

/// As [`run`], and shows each line of the standard output to `seen` as well as to the terminal.
pub fn run_and_see(command: &mut Command, mut seen: impl FnMut(&str)) -> Result<()> {
    let mut child = Guard(spawn(command.stdout(Stdio::piped()))?);
    if let Some(stdout) = child.0.stdout.take() {
        let mut lines = BufReader::new(stdout);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            std::io::stdout().write_all(&line)?;
            seen(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{} ended with {status}", describe(command));
    }
    Ok(())
}

/// Runs a tool to its end and returns its standard output; standard error becomes the error.
pub fn output(command: &mut Command) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Guard(spawn(command)?);
    let (stdout, stderr) = (child.0.stdout.take(), child.0.stderr.take());
    let reader = std::thread::spawn(move || read_all(stderr));
    let stdout = read_all(stdout);
    let stderr = reader.join().unwrap_or_default();
    let status = child.wait()?;
    if !status.success() {
        bail!(
            "{} ended with {status}: {}{}",
            describe(command),
            stderr.trim(),
            if stderr.trim().is_empty() { stdout.trim() } else { "" }
        );
    }
    Ok(stdout)
}

fn read_all(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // A pipe that breaks is the same as one that ends.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn spawn(command: &mut Command) -> Result<Child> {
    cleanup::spawn(command).with_context(|| format!("cannot run {}", describe(command)))
}

/// A child that does not outlive the value.
struct Guard(Child);

impl Guard {
    fn wait(&mut self) -> Result<ExitStatus> {
        let status = self.0.wait()?;
        cleanup::reaped(self.0.id());
        Ok(status)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Both fail only where the child has already been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
        cleanup::reaped(self.0.id());
    }
}

/// A child in the background with its output in a log file; killed with the value.
pub struct Daemon {
    name: String,
    child: Guard,
    log: PathBuf,
    started: Instant,
}

impl Daemon {
    /// Starts it; standard output and error are appended to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let started = Instant::now();
        let child = Guard(spawn(command).with_context(|| format!("cannot start {name}"))?);
        Ok(Daemon { name: name.to_owned(), child, log: log.to_owned(), started })
    }

    /// As [`Daemon::start`], but its standard output is for the caller to read.
    pub fn piped(name: &str, command: &mut Command, log: &Path) -> Result<(Self, ChildStdout)> {
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let started = Instant::now();
        let mut child = Guard(spawn(command).with_context(|| format!("cannot start {name}"))?);
        let stdout = child.0.stdout.take().with_context(|| format!("{name} has no standard output"))?;
        Ok((Daemon { name: name.to_owned(), child, log: log.to_owned(), started }, stdout))
    }

    /// The moment before it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.0.try_wait()?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if begin.elapsed() > limit {
                bail!("{} has not ended after {limit:?}{}", self.name, self.quote_log());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until `ready` says so; fails if the process ends first or `limit` passes.
    pub fn wait_until(&mut self, what: &str, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !ready() {
            if let Some(status) = self.ended()? {
                bail!("{} ended with {status} before {what}{}", self.name, self.quote_log());
            }
            if begin.elapsed() > limit {
                bail!("{}: no {what} after {limit:?}{}", self.name, self.quote_log());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// SIGKILL, as a power cut would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.0.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The end of its log, for messages.
    pub fn quote_log(&self) -> String {
        let tail = log_tail(&self.log);
        if tail.trim().is_empty() { String::new() } else { format!("; its log ends:\n{}", tail.trim_end()) }
    }

    /// User and system time used so far, in seconds, all threads.
    pub fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(self.pid())
    }
}

/// The last [`LOG_TAIL`] bytes of a file, or nothing.
pub fn log_tail(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let len = file.metadata().map(|m| m.len()).unwrap_or(0);
        if file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL))).is_ok() {
            let _ = file.take(LOG_TAIL).read_to_end(&mut bytes);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// User and system time of a process (all threads, also those that have ended), in seconds.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    // The command name in parentheses may hold spaces.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok());
    match (ticks(11), ticks(12)) {
        (Some(user), Some(system)) => Ok((user + system) / TICKS_PER_SECOND),
        _ => bail!("cannot read the CPU time of process {pid}"),
    }
}
