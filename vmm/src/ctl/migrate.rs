//! `vmm ctl migrate`: orders a port and shows how it gets on; Ctrl-C cancels it.

use std::io::{IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::http::{Client, Failure};
use super::show::{self, bytes};

/// How often the port is looked at.
const INTERVAL: Duration = Duration::from_millis(100);
/// Characters of the bar.
const BAR: usize = 24;

/// How often Ctrl-C was pressed.
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTS.fetch_add(1, Ordering::Relaxed);
}

/// What was ordered on the command line.
#[derive(Debug, clap::Args)]
pub struct Migrate {
    /// Where another vmm waits (vmm --receive IP:PORT).
    #[arg(long, value_name = "IP:PORT")]
    to: String,
    /// Aim at a pause of at most so many milliseconds.
    #[arg(long, value_name = "N")]
    blackout_ms: Option<u32>,
    /// Give up rather than pause for longer than so many milliseconds.
    #[arg(long, value_name = "N")]
    limit_ms: Option<u32>,
    /// Slow the guest down by at most so many percent when it writes faster than its memory can be sent; 0: never.
    #[arg(long, value_name = "PERCENT")]
    throttle_max: Option<u8>,
    /// Name in the destination's certificate, if not its address.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Ticket, as `vmm ticket` prints it.
    #[arg(long, value_name = "BASE64")]
    ticket: Option<String>,
    /// Compare all of memory on both sides before the VM goes on. Lengthens the pause.
    #[arg(long)]
    verify: bool,
    /// Do not wait for the end: print the number of the port.
    #[arg(long)]
    detach: bool,
}

/// Orders a port and waits for its end, unless told not to.
pub fn run(client: &Client, order: &Migrate, raw: bool) -> Result<(), Failure> {
    let mut body = json!({ "to": order.to, "verify": order.verify });
    let given = [
        ("blackout_ms", order.blackout_ms),
        ("limit_ms", order.limit_ms),
        ("throttle_max", order.throttle_max.map(u32::from)),
    ];
    for (name, value) in given {
        if let Some(value) = value {
            body[name] = value.into();
        }
    }
    for (field, value) in [("name", &order.name), ("ticket", &order.ticket)] {
        if let Some(value) = value {
            body[field] = value.trim().into();
        }
    }
    let before = client.json("GET", "/v1/vm", None)?;
    let job = client.json("POST", "/v1/migrations", Some(&body))?;
    let id = job["id"].as_u64().unwrap_or(0);
    if order.detach {
        return show::print(&if raw { show::pretty(&job) } else { format!("{id}\n") });
    }
    // What is not zero goes over the wire once, and what changes meanwhile again.
    let expected = before["memory"]["guest_resident_bytes"].as_u64().unwrap_or(0);
    let registered = vmm_sys_util::signal::register_signal_handler(libc::SIGINT, on_interrupt);
    if let Err(e) = registered {
        eprintln!("vmm ctl: Ctrl-C will not cancel: {e}");
    }
    let last = follow(client, id, expected, job)?;
    outcome(&last, order, raw)
}

/// Shows a port until it is over; what was known last.
fn follow(client: &Client, id: u64, expected: u64, mut job: Value) -> Result<Value, Failure> {
    let path = format!("/v1/migrations/{id}");
    let mut meter = Meter::new(expected);
    let mut asked = false;
    loop {
        meter.show(&job);
        if job["state"] != "running" {
            meter.end();
            return Ok(job);
        }
        match INTERRUPTS.load(Ordering::Relaxed) {
            0 => {}
            1 if asked => {}
            1 => {
                asked = true;
                meter.end();
                eprintln!("vmm ctl: cancelling; Ctrl-C again leaves the port to itself");
                client.json("DELETE", &path, None)?;
            }
            _ => {
                meter.end();
                return Err(Failure::Cancelled(format!("port {id} goes on by itself; see `vmm ctl migrations`")));
            }
        }
        std::thread::sleep(INTERVAL);
        job = match client.json("GET", &path, None) {
            Ok(job) => job,
            Err(Failure::Unreachable(why)) => {
                meter.end();
                return Err(Failure::InDoubt(format!(
                    "{why}\nthe vmm has ended meanwhile; ask the one at the other side"
                )));
            }
            Err(e) => return Err(e),
        };
    }
}

fn outcome(job: &Value, order: &Migrate, raw: bool) -> Result<(), Failure> {
    if raw {
        show::print(&show::pretty(job))?;
    }
    let error = job["error"].as_str().unwrap_or("no reason given");
    match job["state"].as_str().unwrap_or_default() {
        "completed" if raw => Ok(()),
        "completed" => {
            let ms = |name: &str| job[name].as_f64().map_or("?".into(), |us| format!("{:.1} ms", us / 1000.0));
            let sent = bytes(job["bytes"].as_u64().unwrap_or(0));
            let (total, blackout) = (ms("total_us"), ms("blackout_us"));
            show::print(&format!("the VM runs at {}: {sent} in {total}, it stood still for {blackout}\n", order.to))
        }
        "cancelled" => Err(Failure::Cancelled("cancelled; the VM runs here".into())),
        "unknown" => Err(Failure::InDoubt(format!(
            "{error}\nthe VM is paused here and may run at {}: find out, then `vmm ctl resolve {} --here` or `--there`",
            order.to, job["id"]
        ))),
        // A port that ends because its owner cancelled it is told as a failure with that reason.
        _ if INTERRUPTS.load(Ordering::Relaxed) > 0 => {
            Err(Failure::Cancelled(format!("cancelled; the VM runs here: {error}")))
        }
        _ => Err(Failure::Failed(format!("the port failed, the VM runs here: {error}"))),
    }
}

/// A line that is written over on a terminal, and a line for each phase elsewhere.
struct Meter {
    terminal: bool,
    expected: u64,
    shown: String,
    wrote: bool,
}

impl Meter {
    fn new(expected: u64) -> Meter {
        Meter { terminal: stderr().is_terminal(), expected, shown: String::new(), wrote: false }
    }

    fn show(&mut self, job: &Value) {
        let phase = job["phase"].as_str().unwrap_or_default();
        let (round, sent) = (job["round"].as_u64().unwrap_or(0), job["bytes"].as_u64().unwrap_or(0));
        if self.terminal {
            let bar = bar(sent, self.expected, job["state"] == "completed");
            eprint!("\r\x1b[K{bar} {phase}, round {round}, {} sent", bytes(sent));
            let _ = stderr().flush();
            self.wrote = true;
        } else {
            let now = format!("{phase}, round {round}");
            if now != self.shown {
                eprintln!("{now}, {} sent", bytes(sent));
                self.shown = now;
            }
        }
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.wrote) {
            eprintln!();
        }
    }
}

/// Full only when it is over: how much is sent again nobody knows before.
fn bar(sent: u64, expected: u64, over: bool) -> String {
    let full = match over {
        true => BAR,
        false => (u128::from(sent) * BAR as u128 / u128::from(expected.max(1))).min(BAR as u128 - 1) as usize,
    };
    format!("[{}{}]", "#".repeat(full), ".".repeat(BAR - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_full_only_at_the_end() {
        assert_eq!(bar(0, 100, false), format!("[{}]", ".".repeat(BAR)));
        assert_eq!(bar(50, 100, false).matches('#').count(), BAR / 2);
        assert_eq!(bar(u64::MAX, 1, false).matches('#').count(), BAR - 1);
        assert_eq!(bar(7, 0, false).matches('.').count(), 1);
        assert_eq!(bar(0, 100, true).matches('.').count(), 0);
    }
}
