//! Runs the NFS load generator (`ci/loadgen/nfs_load.c`) in the lab and reads its report.
use crate::lab::Host;
use crate::process::Daemon;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Write the file once.
    Fill,
    /// Sequential writes for a time.
    Write,
    /// Sequential reads for a time.
    Read,
    /// Random reads for a time.
    RandomRead,
    /// Write the file once with FILE_SYNC, see [`SyncFill`].
    SyncFill,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Mode::Fill => "fill",
            Mode::Write => "write",
            Mode::Read => "read",
            Mode::RandomRead => "randread",
            Mode::SyncFill => "syncfill",
        }
    }
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// What.
    pub mode: Mode,
    /// Bytes of a request.
    pub request_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// How long.
    pub seconds: f64,
    /// Size of the file.
    pub file_bytes: u64,
}

/// What it gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Requests answered.
    pub operations: f64,
    /// Seconds it took.
    pub seconds: f64,
    /// Requests a second.
    pub iops: f64,
    /// Megabytes (10^6) a second.
    pub mb_s: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
}

impl Load {
    /// The command, with the file at `url`.
    pub fn command(&self, program: &Path, url: &str) -> Command {
        let mut command = Command::new(program);
        command.args([url, self.mode.word()]);
        command.args([self.request_bytes.to_string(), self.depth.to_string()]);
        command.args([format!("{:.3}", self.seconds), self.file_bytes.to_string()]);
        command
    }

    /// Runs it on `host`.
    pub fn run(&self, program: &Path, host: &Host, url: &str) -> Result<Report> {
        read(&host.output(&mut self.command(program, url))?)
    }
}

/// A writer in the background whose every WRITE is FILE_SYNC: what it was told is stable must be there for good.
pub struct SyncFill {
    daemon: Daemon,
    load: Load,
    program: PathBuf,
    url: String,
    pass: u64,
    log: PathBuf,
}

impl SyncFill {
    /// Starts it on `host`, with a log of its own in `dir`. What it writes depends on `pass`.
    pub fn start(program: &Path, host: &Host, url: &str, file_bytes: u64, pass: u64, dir: &Path) -> Result<Self> {
        let load = Load { mode: Mode::SyncFill, request_bytes: 64 << 10, depth: 8, seconds: 0.0, file_bytes };
        // One for each: what an earlier pass was told is not this one's.
        let log = dir.join(format!("syncfill{pass}.log"));
        let daemon = host.daemon("nfs_load", load.command(program, url).arg(pass.to_string()), &log)?;
        Ok(SyncFill { daemon, load, program: program.to_owned(), url: url.to_owned(), pass, log })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Whether it has ended, in whichever way.
    pub fn is_over(&mut self) -> Result<bool> {
        Ok(self.daemon.ended()?.is_some())
    }

    /// Its pass.
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// Offsets of the pieces acknowledged so far.
    pub fn acknowledged(&self) -> Vec<u64> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.split_inclusive('\n').filter_map(|l| l.strip_suffix('\n')?.parse().ok()).collect()
    }

    /// Waits until so many pieces are acknowledged; it must still be writing then.
    pub fn wait_for(&mut self, pieces: usize) -> Result<()> {
        let log = self.log.clone();
        let lines = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
        self.daemon.wait_until("progress of the writer", Duration::from_secs(60), || lines() >= pieces)
    }

    /// Waits for its end without an error; returns what was acknowledged.
    pub fn finish(mut self) -> Result<Vec<u64>> {
        let status = self.daemon.wait(Duration::from_secs(120))?;
        if !status.success() {
            bail!("the writer ended with {status}{}", self.daemon.quote_log());
        }
        let acknowledged = self.acknowledged();
        let pieces = self.load.file_bytes / self.load.request_bytes;
        if acknowledged.len() as u64 != pieces {
            bail!("{} of {pieces} pieces were acknowledged", acknowledged.len());
        }
        Ok(acknowledged)
    }

    /// Ends it in the middle; returns what was acknowledged.
    pub fn abandon(mut self) -> Result<Vec<u64>> {
        self.daemon.kill()?;
        Ok(self.acknowledged())
    }

    /// Reads the pieces of a pass back and compares them.
    pub fn verify(program: &Path, host: &Host, url: &str, pass: u64, acknowledged: &[u64], dir: &Path) -> Result<()> {
        let list = dir.join("acknowledged");
        std::fs::write(&list, acknowledged.iter().map(|a| format!("{a}\n")).collect::<String>())?;
        let end = acknowledged.iter().max().map_or(0, |a| a + (64 << 10));
        let script = format!("{} {url} verify 65536 8 0 {end} {pass} < {}", program.display(), list.display());
        let report = read(&host.output(Command::new("sh").args(["-c", &script]))?)?;
        if report.operations != acknowledged.len() as f64 {
            bail!("{} of {} pieces were compared", report.operations, acknowledged.len());
        }
        Ok(())
    }

    /// Where it writes.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The program it runs.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// Reads the report the load generator prints.
pub fn read(text: &str) -> Result<Report> {
    let report: Value = serde_json::from_str(text.trim()).with_context(|| format!("not a report: {text}"))?;
    let number = |name: &str| report[name].as_f64().with_context(|| format!("the report has no {name}: {text}"));
    if number("errors")? != 0.0 {
        bail!("the load met errors: {text}");
    }
    Ok(Report {
        operations: number("operations")?,
        seconds: number("seconds")?,
        iops: number("iops")?,
        mb_s: number("mb_s")?,
        p50_us: number("p50_us")?,
        p99_us: number("p99_us")?,
    })
}
