//! `GET /v1/metrics` is what Prometheus' text form (version 0.0.4) and its naming rules ask for: read by a parser of the
//! test's own.

#![allow(clippy::unwrap_used)]

mod control;
mod guest;

use std::collections::{BTreeMap, HashSet};

use control::{Process, park_for_ever};

type Labels = BTreeMap<String, String>;

#[derive(Debug)]
struct Family {
    name: String,
    kind: String,
    samples: Vec<(String, Labels, f64)>,
}

fn is_name(s: &str) -> bool {
    let first = s.chars().next().unwrap_or('0');
    (first.is_ascii_alphabetic() || first == '_') && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// `name{key="value",…} number`
fn sample(line: &str) -> (String, Labels, f64) {
    let (head, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
    let number = match value {
        "+Inf" => f64::INFINITY,
        value => value.parse().unwrap_or_else(|e| panic!("{line}: {e}")),
    };
    let Some((name, rest)) = head.split_once('{') else {
        assert!(is_name(head), "{line}");
        return (head.into(), Labels::new(), number);
    };
    assert!(is_name(name), "{line}");
    let mut labels = Labels::new();
    let mut rest = rest.strip_suffix('}').unwrap_or_else(|| panic!("{line}"));
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
        assert!(is_name(key), "{line}");
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next().unwrap_or_else(|| panic!("{line}")) {
                (i, '"') => break i + 1,
                (_, '\\') => match chars.next().unwrap().1 {
                    'n' => value.push('\n'),
                    c @ ('\\' | '"') => value.push(c),
                    c => panic!("{line}: \\{c}"),
                },
                (_, c) => value.push(c),
            }
        };
        assert!(labels.insert(key.into(), value).is_none(), "{line}: {key} twice");
        rest = after[end..].strip_prefix(',').unwrap_or(&after[end..]);
    }
    (name.into(), labels, number)
}

/// Reads all of it; panics at what is not allowed.
fn parse(text: &str) -> Vec<Family> {
    assert!(text.ends_with('\n'));
    let mut families: Vec<Family> = Vec::new();
    let mut names = HashSet::new();
    let mut seen = HashSet::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}: no text"));
            assert!(is_name(name) && names.insert(name.to_owned()), "{line}: twice");
            assert!(help.ends_with('.') && help.starts_with(char::is_uppercase), "{line}: a sentence");
            let kind = lines.next().and_then(|l| l.strip_prefix(&format!("# TYPE {name} ")));
            let kind = kind.unwrap_or_else(|| panic!("{line}: TYPE must follow"));
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}: {kind}");
            families.push(Family { name: name.into(), kind: kind.into(), samples: Vec::new() });
            continue;
        }
        assert!(!line.starts_with('#'), "{line}");
        let (name, labels, value) = sample(line);
        let family = families.last_mut().unwrap_or_else(|| panic!("{line}: before any HELP"));
        let allowed: &[&str] = if family.kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        let suffix = name.strip_prefix(&family.name).unwrap_or_else(|| panic!("{line}: stands under {}", family.name));
        assert!(allowed.contains(&suffix), "{line}: stands under {}", family.name);
        assert!(seen.insert((name.clone(), labels.clone())), "{line}: twice");
        family.samples.push((name, labels, value));
    }
    families.iter().for_each(check);
    families
}

/// What must hold of a metric of its kind.
fn check(family: &Family) {
    let Family { name, kind, samples } = family;
    assert!(!samples.is_empty(), "{name}");
    assert!(name.starts_with("vmm_"), "{name}");
    for unit in ["_ms", "_us", "_ns", "_milliseconds", "_microseconds", "_kib", "_mib", "_kilobytes"] {
        assert!(!name.contains(unit), "{name}: base units are seconds and bytes");
    }
    assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
    if kind == "counter" {
        assert!(samples.iter().all(|s| s.2 >= 0.0 && s.2.fract() == 0.0), "{name}");
    }
    if kind != "histogram" {
        return;
    }
    assert!(name.ends_with("_seconds"), "{name}");
    let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    let mut counts = BTreeMap::new();
    let mut sums = BTreeMap::new();
    for (sample, labels, value) in samples {
        let mut labels = labels.clone();
        match &sample[name.len()..] {
            "_bucket" => {
                let le = labels.remove("le").unwrap();
                let le = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
                series.entry(labels).or_default().push((le, *value));
            }
            "_count" => drop(counts.insert(labels, *value)),
            _ => drop(sums.insert(labels, *value)),
        }
    }
    assert_eq!((series.len(), series.len()), (counts.len(), sums.len()), "{name}");
    for (labels, buckets) in series {
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name} {labels:?}");
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, counts[&labels])), "{name} {labels:?}");
    }
}

#[test]
fn the_parser_can_fail() {
    let good = "# HELP vmm_a_total A.\n# TYPE vmm_a_total counter\nvmm_a_total{x=\"\\\"\"} 1\n";
    assert_eq!(parse(good)[0].samples[0].1["x"], "\"");
    for bad in [
        "vmm_a 1\n",
        "# HELP vmm_a A.\nvmm_a 1\n",
        "# HELP vmm_a A.\n# TYPE vmm_a counter\nvmm_a 1\n",
        "# HELP vmm_a A.\n# TYPE vmm_a gauge\nvmm_a 1\nvmm_a 2\n",
        "# HELP vmm_a A.\n# TYPE vmm_a gauge\nvmm_b 1\n",
        "# HELP vmm_a_ms A.\n# TYPE vmm_a_ms gauge\nvmm_a_ms 1\n",
        "# HELP vmm_a A.\n# TYPE vmm_a gauge\nvmm_a{x=y} 1\n",
        "# HELP vmm_a A.\n# TYPE vmm_a gauge\nvmm_a one\n",
        "# HELP vmm_a_seconds A.\n# TYPE vmm_a_seconds histogram\nvmm_a_seconds_bucket{le=\"+Inf\"} 2\n\
         vmm_a_seconds_sum 1\nvmm_a_seconds_count 1\n",
    ] {
        assert!(std::panic::catch_unwind(|| parse(bad)).is_err(), "{bad}");
    }
}

#[test]
fn metrics_keep_to_the_form() {
    let dir = tempfile::tempdir().unwrap();
    let mut disks = Vec::new();
    for n in 0..2 {
        let path = dir.path().join(format!("disk{n}.img"));
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        disks.push(format!("path={}", path.display()));
    }
    let mut p = Process::start(dir.path(), park_for_ever(), &["--disk", &disks[0], "--disk", &disks[1]]);
    p.serving();
    let (status, text) = p.ask("GET", "/v1/metrics", "");
    assert_eq!(status, 200);
    let families = parse(&text);
    let family = |name: &str| families.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("{name} in {text}"));
    let devices: HashSet<&str> = family("vmm_blk_reads_total").samples.iter().map(|s| s.1["device"].as_str()).collect();
    assert_eq!(devices, HashSet::from(["disk0", "disk1"]));
    for name in ["vmm_queue_depth", "vmm_migrations", "vmm_boot_seconds", "vmm_resident_bytes"] {
        assert_eq!(family(name).kind, "gauge");
    }
    assert_eq!(family("vmm_guest_memory_bytes").samples[0].2, f64::from(8 << 20));
    assert_eq!(family("vmm_blk_read_seconds").kind, "histogram");
    let exits = family("vmm_vcpu_exits_total");
    assert!(exits.samples.iter().all(|s| s.1["vcpu"] == "0"));
    let platform = exits.samples.iter().find(|s| s.1["reason"] == "platform").unwrap();
    assert!(platform.2 >= 2.0, "{text}");
    // a process without a VM has metrics too
    let empty = tempfile::tempdir().unwrap();
    let mut p = Process::empty(empty.path());
    parse(&p.ask("GET", "/v1/metrics", "").1);
}
