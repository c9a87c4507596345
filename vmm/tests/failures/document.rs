//! docs/failure-matrix.md: written from what the tests found, held against what they find.
//!
//! With `FAILURES=DIR` each column leaves its cells in a file there and is not held against the document.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::world::{Outcome, Survivor};
use crate::{Course, Fault, Ownership, SELDOM, is_optional};

/// What happened at one point of one port.
pub struct Cell {
    pub course: Course,
    pub point: String,
    pub outcome: Outcome,
}

const HEAD: &str = "\
# Failures of a port

What becomes of a VM when something fails while it is ported. The protocol, and what source, destination and arbiter are, is in
[migration-protocol.md](migration-protocol.md). Written by `cargo xtask test failures` from what its tests found (`vmm/tests/failures`); not
edited by hand. Two hosts on a switch, real processes, the D-module's server as the arbiter.

## How to read it

A row is a **point** at which `--port-faults` holds a port: before a frame is sent (`send`), when one has come (`receive`), before a step of the
protocol is carried out (`do`), before an event counts (`on`). First come the source's points and then the destination's, each in the order in which
they are passed. A column is what **fails** there. A cell says which single copy of the VM was left, and how long after the fault that was
decided:

- **source**, **destination**: it runs there and nowhere else; its clients' connections are the same and have lost nothing; with an
  arbiter the ownership record is its, and the D-module refuses the epoch before.
- **unknown**: without an arbiter only. The source stands still and shows `unknown`; the operator has said who runs, which one does.
- **nobody**: the VM was on the host that died.
- Two of them: it depends on which of two that raced was first.
- Nothing: the ports of that column do not come to the point. Only what is to be done (`do`) can fail as a step. A port ends in one of two
  ways: with DONE, when the source has forwarded late frames for long enough; or the destination's patience is over first, as it
  mostly is where a fault lasts, because there the destination's limit is divided by ten.

Points behind which a port does not take place have rows of their own: it is cancelled by the operator, refused (the destination cannot make the VM), or
given back (it cannot load the state).

## Faults

**Killed**: SIGKILL. **Cancelled**: by the operator. **Step fails**: whoever carries it out reports that it has failed. **Out of memory**: the process
gets no more. **Stopped**, **silent** (the arbiter): SIGSTOP. **Cable pulled**: nothing comes or goes. **Not heard**: what the host sends is lost,
what it is sent arrives.

The last three, and the arbiter's full disk, last for 1.3 s. All time limits of a port are divided by ten there, so each has passed by then; the time in a
cell is those 1.3 s and what was left to be done after their end. Faults that last, full disks, and no memory, race with the limits and the allocations of a
port: another run may find the other host in a cell, never both and, while a host has it, never none.

A source that has lost to the destination, and whose connection has ended before RUNNING, watches the ownership record: the destination gives the VM
back there if it cannot load the state, as in the row `destination send ABORTED (given back)`, where it has won and said nothing yet. With its
limits divided that takes up to 3 s (30 s in everyday life) where the VM runs at the destination; beside a destination that was killed it is ended after
0.5 s, since nobody is left who could give anything back.

Not in the tables: a destination that has won, cannot load the state, and reaches neither the source nor the arbiter until the source has watched for 30 s.
The source ends then: **the VM is lost**.

**Disk full**: a file system without a block or an inode left. The destination's stays so until the VM has gone on. It writes its
log, the guest's console, and sockets (control, console, vsock), all when it makes the VM or later; memory and all that is taken over it has in
memory. So up to `destination do Prepare` it refuses, naming the file it cannot make; from then on a port is done, and what there was to be written is
lost. (Images of disks are the guest's, and the same for both hosts.) The arbiter writes the ownership record. Up to `source do StartDirtyLog`,
where the heir is named, the source gives the port up with that as the reason, as it does when the arbiter is silent there; from then on the answer does not wait for the disk.

**Arbiter's disk full, and restarted**: the disk gets full when the heir has been named (at the point, where that is before), and at the point the arbiter is killed and
started again. If that is behind the compare-and-swap the arbiter has forgotten its answer, which was never written. It gives the epoch to nobody
but the heir then, so the destination goes on; a source that is given the VM back stands still until there is room.
";

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/failure-matrix.md")
}

/// Where columns are left to be written, if they are.
fn results() -> Option<PathBuf> {
    std::env::var_os("FAILURES").map(PathBuf::from)
}

/// How often a cell is tried: when the document is written, outcomes that depend on a race should show.
pub fn repeats(fault: Fault) -> usize {
    if results().is_some() && !fault.lasts() { 2 } else { 1 }
}

fn title(ownership: Ownership) -> &'static str {
    match ownership {
        Ownership::Arbiter => "With an arbiter",
        Ownership::Stream => "Without an arbiter",
    }
}

fn label(course: Course, point: &str) -> String {
    match course {
        Course::Straight => point.into(),
        Course::Cancelled => format!("{point} (cancelled)"),
        Course::Refused => format!("{point} (refused)"),
        Course::GivenBack => format!("{point} (given back)"),
        Course::Declined => format!("{point} (declined)"),
    }
}

fn word(survivor: Survivor) -> &'static str {
    match survivor {
        Survivor::Source => "source",
        Survivor::Destination => "destination",
        Survivor::Unknown => "unknown",
        Survivor::Nobody => "nobody",
    }
}

/// Compares a column with the document, or leaves it to be written.
pub fn hold(ownership: Ownership, fault: Fault, cells: &[Cell]) {
    if let Some(dir) = results() {
        let mut text = String::new();
        for c in cells {
            let (label, word, ms) = (label(c.course, &c.point), word(c.outcome.survivor), c.outcome.after.as_millis());
            writeln!(text, "{label}\t{word}\t{ms}").unwrap();
        }
        std::fs::create_dir_all(&dir).unwrap();
        return std::fs::write(dir.join(format!("{ownership:?}-{fault:?}")), text).unwrap();
    }
    let document = std::fs::read_to_string(path()).unwrap_or_default();
    let section = document.split("\n## ").find(|s| s.starts_with(title(ownership))).unwrap_or_default();
    let rows: Vec<Vec<&str>> =
        section.lines().filter(|l| l.starts_with('|')).map(|l| l.split('|').map(str::trim).collect()).collect();
    let column = rows.first().and_then(|head| head.iter().position(|name| *name == fault.name()));
    let column = column.unwrap_or_else(|| panic!("docs/failure-matrix.md has no column for {}", fault.name()));
    for c in cells {
        let label = label(c.course, &c.point);
        let row = rows.iter().find(|r| r.get(1) == Some(&&*label));
        let said = row.and_then(|r| r.get(column)).copied().unwrap_or_default();
        // Of two ways to go on this column went the other one when the document was written.
        if said.is_empty() && (SELDOM.contains(&&*c.point) || row.is_some() && is_optional(&c.point)) {
            continue;
        }
        assert!(!said.is_empty(), "docs/failure-matrix.md has nothing for {label}, {}", fault.name());
        if !fault.decides(&c.point) {
            continue;
        }
        let found = word(c.outcome.survivor);
        assert!(said.contains(found), "{label}, {}: {found}; docs/failure-matrix.md: {said}", fault.name());
    }
}

/// Every point the code has is in the document: in a table, or named as one behind a fault.
pub fn has_every_point() {
    let document = std::fs::read_to_string(path()).unwrap();
    let mut missing = vmm::port::faults::points();
    missing.retain(|point| !document.contains(&format!("| {point} ")) && !document.contains(&format!("- {point}\n")));
    assert!(missing.is_empty(), "docs/failure-matrix.md does not know {missing:?}");
}

/// Puts the columns together.
pub fn write() {
    let dir = results().expect("FAILURES=DIR says where the columns are");
    let mut text = HEAD.to_owned();
    let mut reached = BTreeSet::new();
    for ownership in [Ownership::Arbiter, Ownership::Stream] {
        let mut columns = Vec::new();
        let mut labels: Vec<String> = Vec::new();
        for fault in Fault::ALL {
            let Ok(file) = std::fs::read_to_string(dir.join(format!("{ownership:?}-{fault:?}"))) else { continue };
            let cells: Vec<(String, String, u64)> = file
                .lines()
                .map(|line| {
                    let fields: Vec<&str> = line.split('\t').collect();
                    (fields[0].into(), fields[1].into(), fields[2].parse().unwrap())
                })
                .collect();
            for (place, (label, ..)) in cells.iter().enumerate() {
                if !labels.contains(label) {
                    // Behind what this column has it behind.
                    let before = cells[..place].iter().rev().find_map(|(l, ..)| labels.iter().position(|k| k == l));
                    labels.insert(before.map_or(labels.len(), |b| b + 1), label.clone());
                }
            }
            columns.push((fault, cells));
        }
        writeln!(text, "\n## {}\n", title(ownership)).unwrap();
        let heads: Vec<&str> = columns.iter().map(|(fault, _)| fault.name()).collect();
        writeln!(text, "| point | {} |", heads.join(" | ")).unwrap();
        writeln!(text, "|---|{}", "---|".repeat(heads.len())).unwrap();
        for label in &labels {
            let cells: Vec<String> = columns.iter().map(|(_, cells)| cell(cells, label)).collect();
            writeln!(text, "| {label} | {} |", cells.join(" | ")).unwrap();
            reached.insert(label.split(" (").next().unwrap().to_owned());
        }
    }
    text.push_str("\n## Points without a row\n\n");
    text.push_str("Only a fault leads there, as in many a cell above, or a guest that is slowed down.\n\n");
    for point in vmm::port::faults::points().iter().filter(|p| !reached.contains(*p)) {
        writeln!(text, "- {point}").unwrap();
    }
    std::fs::write(path(), text).unwrap();
}

fn cell(cells: &[(String, String, u64)], label: &str) -> String {
    let here: Vec<_> = cells.iter().filter(|(l, ..)| l == label).collect();
    let words: BTreeSet<&str> = here.iter().map(|(_, word, _)| &**word).collect();
    let longest = here.iter().map(|(.., ms)| *ms).max();
    match longest {
        None => String::new(),
        Some(ms) => format!("{}, {}", Vec::from_iter(words).join(" or "), time(Duration::from_millis(ms))),
    }
}

fn time(after: Duration) -> String {
    match after.as_millis() {
        0..1000 => format!("{} ms", after.as_millis()),
        _ => format!("{:.1} s", after.as_secs_f64()),
    }
}
