//! Reads and writes of one file: by a guest of each monitor, and by the host itself.
use super::guest::{Guest, Machine, Monitor, SPIN_FOREVER_US};
use crate::bench::{Better, Row};
use crate::process;
use crate::report::{Progress, median};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Kind, bytes, depth, and what the row is called.
const JOBS: [(&str, u64, u64, &str); 6] = [
    ("randread", 4096, 1, "4 KiB random read, depth 1"),
    ("randread", 4096, 32, "4 KiB random read, depth 32"),
    ("randwrite", 4096, 1, "4 KiB random write, depth 1"),
    ("randwrite", 4096, 32, "4 KiB random write, depth 32"),
    ("seqread", 1 << 20, 4, "1 MiB sequential read, depth 4"),
    ("seqwrite", 1 << 20, 4, "1 MiB sequential write, depth 4"),
];
/// Operations of a job at most.
const OPERATIONS: u64 = 1_000_000;
/// How far the guest's clock may be from the host's: a part of the time, and the lateness of the two lines.
const CLOCK_ERROR: f64 = 0.05;
const LATE: Duration = Duration::from_millis(20);

fn job(index: usize, time: Duration) -> String {
    let (kind, bytes, depth, _) = JOBS[index];
    format!("{kind}:{bytes}:{depth}:{OPERATIONS}:{}", time.as_millis())
}

/// All jobs `rounds` times on each side.
pub fn run(machine: &Machine, disk: &Path, program: &Path, rounds: usize, time: Duration) -> Result<Vec<Row>> {
    let jobs: Vec<String> = (0..JOBS.len()).map(|i| job(i, time)).collect();
    // By side (ours, QEMU, host) and job.
    let mut rates: [Vec<Vec<f64>>; 3] = std::array::from_fn(|_| vec![Vec::new(); JOBS.len()]);
    let mut progress = Progress::start("vmm: disk");
    for round in 0..rounds {
        let mut order = [0, 1, 2];
        order.rotate_left(round % 3);
        for side in order {
            let measured = match side {
                0 => by_guest(machine, Monitor::Ours, disk, &jobs)?,
                1 => by_guest(machine, Monitor::Qemu, disk, &jobs)?,
                _ => by_host(program, disk, &jobs)?,
            };
            for (rates, rate) in rates[side].iter_mut().zip(measured) {
                rates.push(rate);
            }
        }
        progress.update(&format!("{} of {rounds}", round + 1));
    }
    progress.done("");
    let mut rows = Vec::new();
    for (i, (_, bytes, _, name)) in JOBS.into_iter().enumerate() {
        let (unit, scale) = if bytes == 4096 { ("IOPS", 1.0) } else { ("MB/s", bytes as f64 / 1e6) };
        let of = |side: usize| median(&rates[side][i]) * scale;
        for (peer, side) in [("", 1), (", beside the host without a VM", 2)] {
            let name = format!("{name}{peer}");
            rows.push(Row { name, unit, ours: of(0), peer: Some(of(side)), better: Better::More, samples: rounds });
        }
    }
    Ok(rows)
}

/// Operations a second of each job, by the guest's clock.
fn by_guest(machine: &Machine, monitor: Monitor, disk: &Path, jobs: &[String]) -> Result<Vec<f64>> {
    let mut words: Vec<String> = jobs.iter().map(|j| format!("job={j}")).collect();
    // In both the guest waits for an answer without halting: what is compared is the device.
    words.push(format!("spin_us={SPIN_FOREVER_US}"));
    let mut guest = Guest::start(machine, monitor, Some(disk), None, &words.join(" "))?;
    let mut rates = Vec::new();
    for job in jobs {
        let (begin, _) = guest.line(&format!("begin {job}"))?;
        let (end, numbers) = guest.line(&format!("result {job}"))?;
        let (operations, taken) = numbers_of(&numbers)?;
        let here = end - begin;
        if here.abs_diff(taken) > here.mul_f64(CLOCK_ERROR) + LATE {
            bail!("{monitor:?}: {job} took {taken:?} by the guest's clock and {here:?} by the host's");
        }
        rates.push(operations / taken.as_secs_f64());
    }
    guest.end()?;
    Ok(rates)
}

/// Operations a second of each job.
fn by_host(program: &Path, disk: &Path, jobs: &[String]) -> Result<Vec<f64>> {
    let said = process::output(Command::new(program).arg(disk).args(jobs))?;
    let result = |job: &String| {
        let numbers = said.lines().find_map(|l| l.strip_prefix("result ")?.strip_prefix(job.as_str()));
        let (operations, taken) = numbers_of(numbers.with_context(|| format!("no result of {job}"))?)?;
        Ok(operations / taken.as_secs_f64())
    };
    jobs.iter().map(result).collect()
}

/// Operations and time of a result.
fn numbers_of(text: &str) -> Result<(f64, Duration)> {
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(operations)), Some(Ok(ns @ 1..))) => Ok((operations as f64, Duration::from_nanos(ns))),
        _ => bail!("{text:?} is no result"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read() {
        assert_eq!(numbers_of(" 12 3000000000").unwrap(), (12.0, Duration::from_secs(3)));
        assert!(numbers_of("12 0").is_err());
        assert!(numbers_of("12").is_err());
        assert_eq!(job(1, Duration::from_millis(250)), "randread:4096:32:1000000:250");
    }
}
