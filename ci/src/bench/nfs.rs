//! NFS throughput and latency against nfs-ganesha: the same client, load generator, network and disk, the sides taking
//! turns.
use super::{Better, Row};
use crate::lab::{Host, Lab};
use crate::load::{Load, Mode, Report};
use crate::report::{Progress, median};
use anyhow::{Context, Result};
use std::path::Path;

/// Size of the file read and written: it fits the caches of both sides, so that software is compared, not the disk.
pub const FILE_BYTES: u64 = 256 << 20;

/// A server under load.
pub trait Server {
    /// NFS URL of a file.
    fn url(&self, file: &str) -> String;
    /// User and system time of all its processes so far, in seconds.
    fn cpu_seconds(&self) -> Result<f64>;
}

impl Server for crate::ganesha::Ganesha {
    fn url(&self, file: &str) -> String {
        self.url(file)
    }

    fn cpu_seconds(&self) -> Result<f64> {
        self.cpu_seconds()
    }
}

/// A load and its name in the results.
struct Case {
    name: &'static str,
    load: Load,
}

fn cases(seconds: f64) -> [Case; 3] {
    let sequential = |mode| Load { mode, request_bytes: 1 << 20, depth: 8, seconds, file_bytes: FILE_BYTES };
    [
        Case { name: "sequential write 1 MiB", load: sequential(Mode::Write) },
        Case { name: "sequential read 1 MiB", load: sequential(Mode::Read) },
        Case {
            name: "random read 4 KiB",
            load: Load { mode: Mode::RandomRead, request_bytes: 4096, depth: 16, ..sequential(Mode::Read) },
        },
    ]
}

/// One measurement: the client's report and the server's CPU time per request, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    report: Report,
    cpu_us: f64,
}

fn measure(server: &dyn Server, client: &Host, program: &Path, load: &Load) -> Result<Sample> {
    let before = server.cpu_seconds()?;
    let report = load.run(program, client, &server.url("load"))?;
    let cpu = server.cpu_seconds()? - before;
    Ok(Sample { report, cpu_us: cpu * 1e6 / report.operations.max(1.0) })
}

/// Measures `ours` and, if given, `peer`, `rounds` times `seconds` a case.
pub fn compare(
    lab: &Lab,
    program: &Path,
    ours: &dyn Server,
    peer: Option<&dyn Server>,
    rounds: usize,
    seconds: f64,
) -> Result<Vec<Row>> {
    let client = &lab.client1;
    let sides: Vec<&dyn Server> = std::iter::once(ours).chain(peer).collect();
    let fill = Load { mode: Mode::Fill, request_bytes: 1 << 20, depth: 8, seconds: 0.0, file_bytes: FILE_BYTES };
    for side in &sides {
        fill.run(program, client, &side.url("load")).context("writing the file to measure with")?;
    }
    let mut rows = Vec::new();
    for case in cases(seconds) {
        let mut progress = Progress::start(&format!("nfs: {}", case.name));
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); sides.len()];
        for round in 0..rounds {
            for (i, side) in sides.iter().enumerate() {
                samples[i].push(measure(*side, client, program, &case.load)?);
                progress.update(&format!("round {} of {rounds}", round + 1));
            }
        }
        progress.done("");
        rows.extend(case_rows(&case, &samples, rounds));
    }
    Ok(rows)
}

fn case_rows(case: &Case, samples: &[Vec<Sample>], rounds: usize) -> Vec<Row> {
    let of =
        |side: usize, f: fn(&Sample) -> f64| samples.get(side).map(|s| median(&s.iter().map(f).collect::<Vec<_>>()));
    let row = |what: &str, unit, better, f: fn(&Sample) -> f64| Row {
        name: format!("{} {what}", case.name),
        unit,
        ours: of(0, f).unwrap_or(0.0),
        peer: of(1, f),
        better,
        samples: rounds,
    };
    vec![
        row("throughput", "MB/s", Better::More, |s| s.report.mb_s),
        row("rate", "IOPS", Better::More, |s| s.report.iops),
        row("p50", "µs", Better::Less, |s| s.report.p50_us),
        row("p99", "µs", Better::Less, |s| s.report.p99_us),
        row("server CPU", "µs/op", Better::Less, |s| s.cpu_us),
    ]
}
