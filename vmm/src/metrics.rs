//! Prometheus' text form (version 0.0.4).
//!
//! Owns the order of the text: the samples of a metric stand together after one HELP and one TYPE line, whichever devices
//! they come from and in whatever order these were asked. Names and help texts are constants of the code; label values are
//! escaped. Counters end in `_total`, everything is in base units: seconds and bytes.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::stats::{Counter, Histogram};

/// Labels of one sample.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

#[derive(Debug)]
struct Family {
    kind: Kind,
    help: &'static str,
    samples: String,
}

/// Metrics on their way into text.
#[derive(Debug, Default)]
pub struct Exposition {
    families: BTreeMap<&'static str, Family>,
}

impl Exposition {
    /// The samples of a metric so far. One name has one kind: anything else is a mistake in this program.
    fn family(&mut self, name: &'static str, help: &'static str, kind: Kind) -> &mut String {
        let family = self.families.entry(name).or_insert_with(|| Family { kind, help, samples: String::new() });
        debug_assert_eq!(family.kind, kind, "{name}");
        &mut family.samples
    }

    /// A number that only grows; `name` ends in `_total`.
    pub fn counter(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, value: &Counter) {
        self.count(name, help, labels, value.get());
    }

    /// As [`Exposition::counter`], for a number that is counted elsewhere.
    pub fn count(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, value: u64) {
        debug_assert!(name.ends_with("_total"), "{name}");
        sample(self.family(name, help, Kind::Counter), name, "", labels, None, value);
    }

    /// A number that comes and goes.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, value: f64) {
        sample(self.family(name, help, Kind::Gauge), name, "", labels, None, value);
    }

    /// Latencies; `name` ends in `_seconds`.
    pub fn histogram(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, value: &Histogram) {
        debug_assert!(name.ends_with("_seconds"), "{name}");
        let out = self.family(name, help, Kind::Histogram);
        let shown = value.read();
        for (bound, count) in &shown.cumulative {
            sample(out, name, "_bucket", labels, Some(*bound), count);
        }
        sample(out, name, "_sum", labels, None, shown.sum_seconds);
        sample(out, name, "_count", labels, None, shown.count);
    }

    /// The text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for (name, family) in &self.families {
            let help = family.help.replace('\\', "\\\\").replace('\n', "\\n");
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {}", family.kind.name());
            out.push_str(&family.samples);
        }
        out
    }
}

fn sample(
    out: &mut String,
    name: &str,
    suffix: &str,
    labels: Labels<'_>,
    le: Option<f64>,
    value: impl std::fmt::Display,
) {
    out.push_str(name);
    out.push_str(suffix);
    let mut separator = '{';
    for (key, value) in labels {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(out, "{separator}{key}=\"{value}\"");
        separator = ',';
    }
    if let Some(le) = le {
        let _ = match le.is_infinite() {
            true => write!(out, "{separator}le=\"+Inf\""),
            false => write!(out, "{separator}le=\"{le}\""),
        };
        separator = ',';
    }
    if separator == ',' {
        out.push('}');
    }
    let _ = writeln!(out, " {value}");
}

#[cfg(test)]
mod tests;
