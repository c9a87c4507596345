//! docs/benchmarks.md: a section for each benchmark, with the machine and the commit it was measured on.
//!
//! Always true: a section is replaced as a whole, the others stay as they are.
use super::{Row, markdown};
use crate::process;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

const HEAD: &str = "# Benchmarks\n\n\
    Written by `cargo xtask bench`. *ours*: Outrigger; *peer*: what is compared with in the same run; *ratio*: how many times better\n\
    ours is. The peer of `nfs` is nfs-ganesha (Debian's, VFS FSAL, the same disk, network and client); of `vmm` it is Debian's QEMU\n\
    (machine microvm, KVM, the same guest image, disk file and tap), or, where a row says so, the host without a VM;\n\
    of `port` it is QEMU's live migration.\n";

/// Replaces the section of a benchmark.
pub fn write(path: &Path, bench: &str, rows: &[Row], quick: bool) -> Result<()> {
    let old = std::fs::read_to_string(path).unwrap_or_default();
    let root = path.parent().unwrap_or(Path::new("."));
    let samples = if quick { ", few samples (`--quick`)" } else { "" };
    let section = format!("## {bench}\n\n{}, commit {}{samples}.\n\n{}", machine(), commit(root), markdown(rows));
    std::fs::write(path, replace(&old, bench, &section)).with_context(|| format!("cannot write {}", path.display()))
}

/// The page with one section new, sections in the order of their names.
fn replace(old: &str, bench: &str, section: &str) -> String {
    let begin = |s: &str| s.lines().next().unwrap_or("").trim_start_matches("## ").to_owned();
    let mut sections: Vec<String> =
        old.split("\n## ").skip(1).map(|s| format!("## {}\n", s.trim_end())).filter(|s| begin(s) != bench).collect();
    sections.push(format!("{}\n", section.trim_end()));
    sections.sort();
    format!("{HEAD}\n{}", sections.join("\n"))
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines().find(|l| l.starts_with(name)).and_then(|l| l.split_once(':')).map(|(_, v)| v.trim().to_owned())
    };
    let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown processor".into());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|m| m.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()))
        .unwrap_or(0);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cpu}, {cores} cores, {} GiB, Linux {}", memory.div_ceil(1 << 20), kernel.trim())
}

fn commit(dir: &Path) -> String {
    let git = |args: &[&str]| process::succeed(Command::new("git").arg("-C").arg(dir).args(args));
    let Ok(id) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    // The page itself is being changed by the measurement.
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs/benchmarks.md"]);
    let changed = changed.is_ok_and(|c| !c.trim().is_empty());
    format!("{}{}", id.trim(), if changed { " with changes" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_section_is_replaced_and_the_others_stay() {
        let first = replace("", "port", "## port\n\nold\n");
        let both = replace(&first, "boot", "## boot\n\nb\n");
        let again = replace(&both, "port", "## port\n\nnew\n");
        assert_eq!(again, format!("{HEAD}\n## boot\n\nb\n\n## port\n\nnew\n"));
        assert_eq!(replace(&again, "port", "## port\n\nnew\n"), again);
    }
}
