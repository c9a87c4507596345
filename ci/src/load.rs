//! Runs the NFS load generator (`ci/loadgen/nfs_load.c`) in the lab and reads its report.
use crate::lab::Host;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

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
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Mode::Fill => "fill",
            Mode::Write => "write",
            Mode::Read => "read",
            Mode::RandomRead => "randread",
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
