//! Benchmarks: measured rows, printed, written as JSON and into docs/benchmarks.md. Nothing here passes or fails by time.
//!
//! Always true: a row says how many samples it stands on; a comparison runs both sides in the same run, alternating; a ratio
//! above one means that ours is better.
pub mod boot;
pub mod nfs;
pub mod page;
pub mod port;
pub mod restore;
pub mod soak;
pub mod spawn;
pub mod vmm;

use crate::artifacts::{self, Artifacts};
use crate::ganesha::Ganesha;
use crate::modules::Cluster;
use crate::setup::{self, Need};
use crate::{copy, lab, report};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Disk of the D-module.
const DISK_BYTES: u64 = 1 << 30;
/// Memory of the D-module: its cache holds the file of the NFS benchmark, as the peer's page cache does.
const DMODULE_MEMORY_MIB: u64 = 1024;
const NMODULE_MEMORY_MIB: u64 = 32;

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bench {
    /// Process start to first answer.
    Boot,
    /// The same from a checkpoint.
    Restore,
    /// Blackout and retransmits.
    Port,
    /// NFS against nfs-ganesha.
    Nfs,
    /// Instances of a template.
    Spawn,
    /// `vmm` against QEMU's microvm, and against no VM at all.
    Vmm,
    /// Many ports under verified load.
    Soak,
}

impl Bench {
    /// All of them, in the order they are run and listed.
    pub const ALL: [Bench; 7] =
        [Bench::Boot, Bench::Restore, Bench::Port, Bench::Nfs, Bench::Spawn, Bench::Vmm, Bench::Soak];

    /// Its name on the command line and in the page.
    pub fn name(self) -> &'static str {
        match self {
            Bench::Boot => "boot",
            Bench::Restore => "restore",
            Bench::Port => "port",
            Bench::Nfs => "nfs",
            Bench::Spawn => "spawn",
            Bench::Vmm => "vmm",
            Bench::Soak => "soak",
        }
    }
}

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which.
    pub benches: Vec<Bench>,
    /// Fewer samples.
    pub quick: bool,
    /// Where the rows go as JSON.
    pub json: Option<PathBuf>,
}

/// Runs them.
pub fn run(options: &Options) -> Result<()> {
    let data = artifacts::data_dir()?;
    setup::prepare(Need::Bench, &data, DISK_BYTES + 2 * nfs::FILE_BYTES)?;
    lab::clean()?;
    let artifacts = Artifacts::build()?;
    let program = setup::load_generator(&artifacts.root, &data)?;
    let mut all = Vec::new();
    for bench in &options.benches {
        // A fresh lab each: no bench finds what another has left in caches and on the disk.
        let memory = format!("{DMODULE_MEMORY_MIB}M");
        let mut cluster = Cluster::start(&data, artifacts.clone(), DISK_BYTES, &memory)?;
        let pick = |quick, full| if options.quick { quick } else { full };
        let rows = match bench {
            Bench::Boot => boot::run(&mut cluster, &memory, pick(7, 31))?,
            Bench::Restore => restore::run(&mut cluster, &program, pick(7, 31))?,
            Bench::Port => {
                let samples = port::Samples { ours: pick(10, 200), qemu: pick(4, 50) };
                port::run(&mut cluster, &program, samples)?
            }
            Bench::Nfs => {
                let ganesha = Ganesha::start(&cluster.lab)?;
                let (rounds, seconds) = if options.quick { (3, 1.5) } else { (7, 4.0) };
                nfs::compare(&cluster.lab, &program, &Ours(&cluster), Some(&ganesha), rounds, seconds)?
            }
            Bench::Spawn => spawn::run(&mut cluster, pick(7, 31), 100)?,
            Bench::Vmm => vmm::run(cluster, [NMODULE_MEMORY_MIB, DMODULE_MEMORY_MIB], options.quick)?,
            Bench::Soak => soak::run(&mut cluster, &program, pick(40, 1000))?,
        };
        println!("{}:\n{}", bench.name(), table(&rows));
        page::write(&artifacts.root.join("docs/benchmarks.md"), bench.name(), &rows, options.quick)?;
        all.extend(rows);
    }
    if let Some(path) = &options.json {
        let rows: Vec<Value> = all.iter().map(Row::json).collect();
        let text = serde_json::to_string_pretty(&json!({ "rows": rows }))? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Both modules as one server.
struct Ours<'a>(&'a Cluster);

impl nfs::Server for Ours<'_> {
    fn url(&self, file: &str) -> String {
        copy::url(file)
    }

    fn cpu_seconds(&self) -> Result<f64> {
        Ok(self.0.nmodule.daemon.cpu_seconds()? + self.0.dmodule.daemon.cpu_seconds()?)
    }
}

/// Which way a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Less is better.
    Less,
    /// More is better.
    More,
}

/// A measured figure.
#[derive(Clone, Debug)]
pub struct Row {
    /// What.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// Ours.
    pub ours: f64,
    /// The other side, where there is one.
    pub peer: Option<f64>,
    /// Which way it is better.
    pub better: Better,
    /// Measurements of each side that it is the median (or what the name says) of.
    pub samples: usize,
}

impl Row {
    /// A figure without another side.
    pub fn alone(name: impl Into<String>, unit: &'static str, better: Better, ours: f64, samples: usize) -> Row {
        Row { name: name.into(), unit, ours, peer: None, better, samples }
    }

    /// How many times better ours is.
    pub fn ratio(&self) -> Option<f64> {
        let peer = self.peer?;
        let (over, under) = if self.better == Better::More { (self.ours, peer) } else { (peer, self.ours) };
        (under != 0.0).then(|| over / under)
    }

    /// As in `--json`.
    pub fn json(&self) -> Value {
        let round = |x: f64| (x * 1000.0).round() / 1000.0;
        json!({
            "name": self.name, "unit": self.unit, "ours": round(self.ours), "peer": self.peer.map(round),
            "ratio": self.ratio().map(round), "samples": self.samples,
        })
    }
}

fn cells(row: &Row) -> Vec<String> {
    let number = |x: f64| if x.abs() >= 100.0 { format!("{x:.0}") } else { format!("{x:.2}") };
    let or_dash = |x: Option<f64>| x.map_or("-".to_owned(), number);
    let ratio = row.ratio().map_or("-".to_owned(), |r| format!("{r:.2}"));
    let name = row.name.clone();
    vec![name, row.unit.into(), number(row.ours), or_dash(row.peer), ratio, row.samples.to_string()]
}

const HEAD: [&str; 6] = ["name", "unit", "ours", "peer", "ratio", "samples"];

/// For the terminal.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned).to_vec()];
    lines.extend(rows.iter().map(cells));
    report::table(&lines)
}

/// For docs/benchmarks.md.
pub fn markdown(rows: &[Row]) -> String {
    let mut out = format!("| {} |\n|---|---|---:|---:|---:|---:|\n", HEAD.join(" | "));
    for row in rows {
        out += &format!("| {} |\n", cells(row).join(" | "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_better() {
        let row = |better, ours, peer| Row { name: "x".into(), unit: "u", ours, peer, better, samples: 3 };
        assert_eq!(row(Better::More, 200.0, Some(100.0)).ratio(), Some(2.0));
        assert_eq!(row(Better::Less, 200.0, Some(100.0)).ratio(), Some(0.5));
        assert_eq!(row(Better::Less, 0.0, Some(100.0)).ratio(), None);
        let alone = row(Better::Less, 1.23456, None).json();
        let expected = json!({"name":"x","unit":"u","ours":1.235,"peer":null,"ratio":null,"samples":3});
        assert_eq!(alone, expected);
        assert!(markdown(&[row(Better::More, 200.0, Some(100.0))]).ends_with("| x | u | 200 | 100 | 2.00 | 3 |\n"));
    }
}
