//! Processor time the host of this machine gave to others: what a measurement could not help.
use anyhow::{Context, Result};

/// The machine's processor time so far, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    all: u64,
    stolen: u64,
}

/// Now.
pub fn now() -> Result<Ticks> {
    let stat = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    read(&stat).context("/proc/stat has no processor times")
}

/// The first line: user, nice, system, idle, iowait, irq, softirq, steal; what follows is in the first two already.
fn read(stat: &str) -> Option<Ticks> {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
    Some(Ticks { all: ticks.iter().sum(), stolen: *ticks.get(7)? })
}

impl Ticks {
    /// Stolen time as a share of all from here to `later`.
    pub fn share_until(&self, later: &Ticks) -> f64 {
        let all = later.all.saturating_sub(self.all);
        if all == 0 { 0.0 } else { later.stolen.saturating_sub(self.stolen) as f64 / all as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_a_share_of_all() {
        let a = read("cpu  10 0 10 70 0 0 0 10 5 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n").unwrap();
        assert_eq!(a, Ticks { all: 100, stolen: 10 });
        let b = read("cpu  20 0 10 120 0 0 0 50 5 0\n").unwrap();
        assert!((a.share_until(&b) - 0.4).abs() < 1e-9);
        assert!(now().is_ok());
    }
}
