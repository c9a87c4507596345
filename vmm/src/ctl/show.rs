//! How answers look to people.

use std::fmt::Write as _;
use std::io::{Write as _, stdout};

use serde_json::Value;

use super::http::Failure;

/// Writes to standard output; a reader that went away is no accident.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
}

/// JSON to read.
pub fn pretty(value: &Value) -> String {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}

/// A size in the largest unit that leaves a number to read.
pub fn bytes(n: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| n >= *unit) {
        Some((unit, name)) if n.is_multiple_of(*unit) => format!("{} {name}", n / unit),
        Some((unit, name)) => format!("{:.1} {name}", n as f64 / *unit as f64),
        None => format!("{n} B"),
    }
}

/// A string, or a value as JSON; nothing for what is missing.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(s) if s.is_empty() => None,
        Value::String(s) => Some(s.clone()),
        value => Some(value.to_string()),
    }
}

fn size(value: &Value) -> Option<String> {
    value.as_u64().map(bytes)
}

/// `GET /v1/vm`.
pub fn info(vm: &Value) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = writeln!(out, "{name:<12} {value}");
        }
    };
    let (memory, boot) = (&vm["memory"], &vm["boot_ms"]);
    row("state", plain(&vm["state"]));
    row("end", plain(&vm["end"]));
    row("name", plain(&vm["name"]));
    row("process", plain(&vm["pid"]).map(|pid| format!("{pid}, vmm {}", vm["version"].as_str().unwrap_or("?"))));
    row("image", plain(&vm["config"]["image"]));
    row("vm id", vm["vm_id"].as_u64().filter(|n| *n != 0).map(|n| n.to_string()));
    row("epoch", plain(&vm["epoch"]));
    row(
        "memory",
        size(&memory["guest_bytes"])
            .map(|all| format!("{all}, of which {} in use", size(&memory["guest_resident_bytes"]).unwrap_or_default())),
    );
    row("overhead", size(&memory["overhead_bytes"]));
    row("booted in", boot["run"].as_f64().map(|ms| format!("{ms:.1} ms")));
    row("serving in", boot["serving"].as_f64().map(|ms| format!("{ms:.1} ms")));
    row("arrival", arrival(&vm["arrival"]));
    for net in vm["nets"].as_array().into_iter().flatten() {
        row("network", Some(format!("{} {}", net["id"].as_str().unwrap_or("?"), net["mac"].as_str().unwrap_or("?"))));
    }
    for disk in vm["config"]["disks"].as_array().into_iter().flatten() {
        let readonly = if disk["readonly"] == true { ", read-only" } else { "" };
        let path = disk["path"].as_str().unwrap_or("?");
        row("disk", Some(format!("{} {path}{readonly}", disk["id"].as_str().unwrap_or("?"))));
    }
    out
}

fn arrival(arrival: &Value) -> Option<String> {
    let phase = plain(&arrival["phase"]).unwrap_or_else(|| "nobody is connected".into());
    let from = plain(&arrival["from"]).map(|from| format!(", from {from}")).unwrap_or_default();
    let failed = arrival["failed"]
        .as_u64()
        .filter(|n| *n > 0)
        .map(|n| format!("; {n} failed, last: {}", arrival["last_error"].as_str().unwrap_or("?")));
    arrival.is_object().then(|| format!("{phase}{from}{}", failed.unwrap_or_default()))
}

/// Rows under a heading, columns as wide as they need to be.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let heading: Vec<String> = heading.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&heading).chain(rows) {
        let mut text = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(text, "{cell:<width$}  ");
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
    out
}

/// `GET /v1/devices`.
pub fn devices(all: &[Value]) -> String {
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|d| {
            let queues = d["queues"].as_array().map_or(&[][..], Vec::as_slice);
            let waiting: u64 = queues.iter().filter_map(|q| q["depth"].as_u64()).sum();
            let text = |name: &str| plain(&d[name]).unwrap_or_default();
            vec![text("id"), text("kind"), text("driver"), queues.len().to_string(), waiting.to_string(), detail(d)]
        })
        .collect();
    table(&["ID", "KIND", "DRIVER", "QUEUES", "WAITING", ""], &rows)
}

/// What is special about a device.
fn detail(device: &Value) -> String {
    let balloon = &device["balloon"];
    match (size(&balloon["actual"]), size(&balloon["target"])) {
        (Some(actual), Some(target)) => format!("holds {actual} of {target}"),
        _ => size(&device["bytes"]).unwrap_or_default(),
    }
}

/// `GET /v1/devices/{id}`: field by field, what is below a field indented.
pub fn device(device: &Value) -> String {
    fn rows(out: &mut String, value: &Value, indent: usize) {
        for (name, value) in value.as_object().into_iter().flatten() {
            match value {
                Value::Object(_) => {
                    let _ = writeln!(out, "{:indent$}{name}", "");
                    rows(out, value, indent + 2);
                }
                Value::Array(all) => {
                    for (i, one) in all.iter().enumerate() {
                        let text: Vec<String> = one
                            .as_object()
                            .into_iter()
                            .flatten()
                            .filter_map(|(k, v)| Some(format!("{k} {}", plain(v)?)))
                            .collect();
                        let _ = writeln!(out, "{:indent$}{:<14} {}", "", format!("{name}[{i}]"), text.join(", "));
                    }
                }
                value => {
                    let text = plain(value).unwrap_or_else(|| "-".into());
                    let _ = writeln!(out, "{:indent$}{name:<14} {text}", "");
                }
            }
        }
    }
    let mut out = String::new();
    rows(&mut out, device, 0);
    out
}

/// The answer to `POST /v1/vm/checkpoint`.
pub fn checkpoint(done: &Value) -> String {
    let ms = |us: &Value| us.as_f64().map(|us| format!("{:.1} ms", us / 1000.0));
    let stood = match ms(&done["pause_us"]) {
        Some(pause) => format!(", the guest stood still for {pause}"),
        None if done["stopped"] == true => ", the VM has ended".into(),
        None => String::new(),
    };
    let (path, written) = (plain(&done["path"]).unwrap_or_default(), size(&done["bytes"]).unwrap_or_default());
    let elapsed = ms(&done["elapsed_us"]).unwrap_or_default();
    format!("{path}: {} pages, {written} in {elapsed}{stood}\n", done["pages"])
}

/// `GET /v1/migrations`.
pub fn migrations(all: &Value) -> String {
    let rows: Vec<Vec<String>> = all["migrations"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|job| {
            let ms = |us: &Value| us.as_f64().map_or_else(|| "-".into(), |us| format!("{:.1} ms", us / 1000.0));
            vec![
                job["id"].to_string(),
                plain(&job["to"]).unwrap_or_default(),
                plain(&job["state"]).unwrap_or_default(),
                plain(&job["phase"]).unwrap_or_default(),
                bytes(job["bytes"].as_u64().unwrap_or(0)),
                ms(&job["total_us"]),
                ms(&job["blackout_us"]),
                plain(&job["error"]).unwrap_or_default(),
            ]
        })
        .collect();
    table(&["ID", "TO", "STATE", "PHASE", "SENT", "TIME", "BLACKOUT", "ERROR"], &rows)
}

/// One event.
pub fn event(name: &str, data: &Value) -> String {
    let time = data["time_ms"].as_u64().map_or_else(|| "now".to_owned(), clock);
    let fields: Vec<String> = data
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != "time_ms")
        .filter_map(|(key, value)| Some(format!("{key}={}", plain(value)?)))
        .collect();
    format!("{time:<12} {name:<10} {}\n", fields.join(" "))
}

/// Time of day, UTC.
fn clock(ms: u64) -> String {
    let s = ms / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", s / 3600 % 24, s / 60 % 60, s % 60, ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_are_readable() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1.5 GiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn columns_are_as_wide_as_needed() {
        let rows = [vec!["1".into(), "10.77.0.2:7000".into()], vec!["23".into(), "x".into()]];
        assert_eq!(table(&["ID", "TO"], &rows), "ID  TO\n1   10.77.0.2:7000\n23  x\n");
    }

    #[test]
    fn events_are_one_line() {
        let data = json!({ "time_ms": 86_399_001, "state": "paused" });
        assert_eq!(event("state", &data), "23:59:59.001 state      state=paused\n");
    }
}
