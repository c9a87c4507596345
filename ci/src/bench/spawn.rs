//! Instances of a template of the N-module: from the request to the first answer, and many at once, each of which must read a file.
use super::{Better, Row};
use crate::instances::{COUNT_MAX, Instance, all_read, template, to_first_instruction};
use crate::modules::{self, Cluster, Module};
use crate::probe;
use crate::report::{Progress, median, percentile};
use anyhow::{Context, Result};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Longest wait for all of many instances.
const LIMIT: Duration = Duration::from_secs(120);

/// Starts one instance `samples` times, by a new process and by one that waits, a cold start beside each; then `many` at once.
pub fn run(cluster: &mut Cluster, samples: usize, many: u8) -> Result<Vec<Row>> {
    let many = many.min(COUNT_MAX);
    let template = template(&cluster.lab, &cluster.artifacts)?;
    let (lab, artifacts, host) = (&cluster.lab, &cluster.artifacts, &cluster.lab.node1);
    let one = Instance(0);
    one.prepare(lab, host)?;
    let (mut cold, mut fresh, mut shell, mut entry, mut own) = (vec![], vec![], vec![], vec![], vec![]);
    let mut progress = Progress::start("spawn: an instance to its first NFS reply");
    for i in 0..samples {
        cluster.nmodule.daemon.kill()?;
        let (module, took) = modules::start_nmodule(lab, artifacts, host)?;
        cluster.nmodule = module;
        cold.push(ms(took));
        let (mut module, took) = one.serve(lab, artifacts, host, &template)?;
        fresh.push(ms(took));
        entry.push(to_first_instruction(&module)?);
        module.daemon.kill()?;
        let waiting = one.shell(lab, artifacts, host)?;
        let (mut module, took) = one.fill(lab, waiting, &template)?;
        shell.push(ms(took));
        own.push(to_first_instruction(&module)?);
        module.daemon.kill()?;
        progress.update(&format!("{} of {samples}", i + 1));
    }
    progress.done(&format!("median {:.1} ms, cold {:.1} ms", median(&fresh), median(&cold)));
    let row = |name: &str, value| Row::alone(name, "ms", Better::Less, value, samples);
    let mut rows = vec![
        row("request to first instruction, median", median(&entry)),
        row("the same, worst", percentile(&entry, 100)),
        row("vmm start to first NFS NULL reply of an instance, median", median(&fresh)),
        row("the same, worst", percentile(&fresh, 100)),
        row("a cold start beside it, median", median(&cold)),
        row("the same, worst", percentile(&cold, 100)),
        row("request to a waiting vmm (PUT /v1/vm/spawn) to first instruction, median", median(&own)),
        row("the same to first NFS NULL reply, median", median(&shell)),
    ];
    rows.extend(at_once(cluster, &template, many)?);
    Ok(rows)
}

fn at_once(cluster: &Cluster, template: &std::path::Path, many: u8) -> Result<Vec<Row>> {
    let (lab, artifacts, host) = (&cluster.lab, &cluster.artifacts, &cluster.lab.node1);
    let mut progress = Progress::start("spawn: many at once");
    for i in 0..many {
        Instance(i).prepare(lab, host)?;
    }
    let before = available()?;
    let begin = Instant::now();
    let mut modules = Vec::new();
    for i in 0..many {
        modules.push(Instance(i).start(lab, artifacts, host, template)?);
        progress.update(&format!("{} of {many} started", i + 1));
    }
    let started = begin.elapsed();
    let never = AtomicBool::new(false);
    for i in 0..many {
        let left = LIMIT.saturating_sub(begin.elapsed());
        probe::first_reply(&lab.client1, Instance(i).nfs(), left, &never)
            .with_context(|| modules[usize::from(i)].quote())?;
        progress.update(&format!("{} of {many} answer", i + 1));
    }
    let all = begin.elapsed();
    let read = Instant::now();
    all_read(&cluster.lab, many, "many")?;
    let read = read.elapsed();
    let used = before.saturating_sub(available()?);
    let sum = |field: &str| modules.iter().map(|m| rollup(m, field)).sum::<Result<u64>>();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20) / f64::from(many);
    let row = |name: String, unit, value| Row::alone(name, unit, Better::Less, value, usize::from(many));
    let rows = vec![
        row(format!("{many} at once: all processes started"), "ms", ms(started)),
        row(format!("{many} at once: all have answered NFS NULL"), "ms", ms(all)),
        row(format!("{many} running: a file of 256 KiB read by NFS through each, four at a time"), "ms", ms(read)),
        row("memory of an instance among them, its share (PSS)".into(), "MiB", mib(sum("Pss:")?)),
        row("memory of an instance among them, its own (private dirty)".into(), "MiB", mib(sum("Private_Dirty:")?)),
        row("memory the host has less for each (MemAvailable)".into(), "MiB", mib(used)),
    ];
    progress.done(&format!("all answer after {:.0} ms", ms(all)));
    for mut module in modules {
        module.daemon.kill()?;
    }
    Ok(rows)
}

/// Bytes of a field of the kernel's account of a process's memory.
fn rollup(module: &Module, field: &str) -> Result<u64> {
    let path = format!("/proc/{}/smaps_rollup", module.daemon.pid());
    kib(&std::fs::read_to_string(&path).with_context(|| path.clone())?, field)
}

fn available() -> Result<u64> {
    kib(&std::fs::read_to_string("/proc/meminfo")?, "MemAvailable:")
}

fn kib(text: &str, field: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        let text = "Rss:  12 kB\nPss:               3 kB\nPss_Dirty:         1 kB\n";
        assert_eq!(kib(text, "Pss:").unwrap(), 3072);
        assert!(kib(text, "Swap:").is_err());
    }
}
