//! The main job, shown: files served from two VMs, and the N-module ported to another host and back under load, then saved, restored and
//! doubled ([`saved`]).
//!
//! Always true: what is printed was measured in this run; a difference in the bytes, another connection or a port that did not
//! complete is an error.
mod saved;

use crate::artifacts::{self, Artifacts};
use crate::copy::{self, Copy};
use crate::lab::{self, Host, Lab};
use crate::modules::{self, MIGRATIONS, Module, NFS, Ported};
use crate::probe::Prober;
use crate::report::{self, Progress};
use crate::setup::{self, Need};
use crate::tcp::{self, Connection};
use crate::throughput::{Sampler, Series};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Smallest `--size`: less is copied before a port can happen.
pub const MIN_SIZE: u64 = 16 << 20;
/// Largest `--size`.
pub const MAX_SIZE: u64 = 64 << 30;
/// How long the second copy should last, by the speed of the first.
const LONG_COPY_SECONDS: f64 = 8.0;
/// The second copy is at most this, and never less than the first.
const LONG_COPY_MAX: u64 = 2 << 30;
/// Memory of the D-module.
const DMODULE_MEMORY: &str = "256M";
/// The port begins when this much of the copy is through.
const PORT_AFTER: f64 = 0.35;
/// What a copy needs to reach its speed is not part of "before".
const RAMP_UP: Duration = Duration::from_millis(300);
/// What is sent again because of a port is sent again within this time.
const AFTER_EFFECTS: Duration = Duration::from_millis(500);
/// Disk of a lab that is kept.
const LAB_DISK: u64 = 2 << 30;
/// How often the client's connection is looked at after a port.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the first file.
    pub size: u64,
    /// Where the results go as JSON.
    pub json: Option<PathBuf>,
}

/// One port under load, as seen from all sides.
struct PortResult {
    to: &'static str,
    ported: Ported,
    blackout_client: Duration,
    longest_wait: Duration,
    asked: usize,
    /// Around the port, and in the whole copy.
    retransmits: [u64; 2],
    same_connection: bool,
    before: f64,
    during: f64,
    after: f64,
    series: Series,
    copy_began: Instant,
    bytes: u64,
}

/// Runs it.
pub fn run(options: &Options) -> Result<()> {
    if !(MIN_SIZE..=MAX_SIZE).contains(&options.size) {
        bail!("--size must be from {} MiB to {} GiB", MIN_SIZE >> 20, MAX_SIZE >> 30);
    }
    let size = options.size.next_multiple_of(MIB);
    let long_max = LONG_COPY_MAX.max(size);
    let disk_bytes = disk_size(size, long_max);
    let data = artifacts::data_dir()?;
    // The disk image, and on the client: both files, and one of them read back.
    setup::prepare(Need::Demo, &data, disk_bytes + size + 2 * long_max)?;
    lab::clean()?;
    let artifacts = Artifacts::build()?;

    let progress = Progress::start("making a lab: hosts node1 and client1, a switch");
    let lab = Lab::create(&data)?;
    let disk = lab.data_dir().join("disk0.img");
    modules::create_disk(&disk, disk_bytes)?;
    progress.done(&format!("disk image of {} GiB", disk_bytes >> 30));

    let progress = Progress::start("starting the D-module on node1");
    let (_dmodule, dmodule_boot) = modules::start_dmodule(&lab, &artifacts, &disk, modules::Disk::New, DMODULE_MEMORY)?;
    progress.done(&format!("serves after {:.0} ms", ms(dmodule_boot)));
    let progress = Progress::start("starting the N-module on node1");
    let (mut source, nmodule_boot) = modules::start_nmodule(&lab, &artifacts, &lab.node1)?;
    progress.done(&format!("answers NFS after {:.0} ms", ms(nmodule_boot)));

    let first = first_copy(&lab, size)?;
    let long = long_size(size, first.mb_s, long_max);
    let file = lab.data_dir().join("second");
    let progress = Progress::start(&format!("making a second file of {} MiB", long >> 20));
    copy::random_file(&file, long)?;
    let sum = copy::sha256(&file)?;
    progress.done("");

    let text = |p: &Path| p.display().to_string();
    let back = lab.data_dir().join("second-back");
    let away =
        port_under_load(&lab, &artifacts, &mut source, &lab.client1, (&text(&file), &copy::url("second")), long)?;
    let mut there = away.1;
    source.daemon.wait(Duration::from_secs(10)).context("the source's vmm must end after a port")?;
    let home = port_under_load(&lab, &artifacts, &mut there, &lab.node1, (&copy::url("second"), &text(&back)), long)?;
    there.daemon.wait(Duration::from_secs(10)).context("the source's vmm must end after a port")?;
    let (away, (home, nmodule)) = (away.0, home);

    let progress = Progress::start("comparing SHA-256 of the second file");
    let ok = first.ok && copy::sha256(&back)? == sum;
    progress.done(if ok { "the same" } else { "DIFFERENT" });
    let saved = saved::run(&lab, &artifacts, nmodule)?;
    let ok = ok && saved.ok;
    let verified = size + long;

    show(&away, &home, ok, verified);
    let boot = json!({"dmodule": round(ms(dmodule_boot)), "nmodule": round(ms(nmodule_boot))});
    if let Some(path) = &options.json {
        let mut all = result_json(&away);
        let head = json!({"bytes_verified": verified, "sha256_ok": ok});
        let mut out = head.as_object().cloned().unwrap_or_default();
        out.append(all.as_object_mut().context("not an object")?);
        out.insert("boot_ms".into(), boot);
        out.insert("port_back".into(), result_json(&home));
        out.insert("saved".into(), saved.json());
        let text = serde_json::to_string_pretty(&Value::Object(out))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !ok {
        bail!("the bytes read back differ from the bytes written");
    }
    if !(away.same_connection && home.same_connection) {
        bail!("the client had to make a new connection");
    }
    Ok(())
}

/// Starts a lab with both modules, says how to get at them, and waits for an interrupt.
pub fn keep_lab() -> Result<()> {
    let data = artifacts::data_dir()?;
    setup::prepare(Need::Demo, &data, LAB_DISK)?;
    lab::clean()?;
    let mut cluster = modules::Cluster::start(&data, Artifacts::build()?, LAB_DISK, DMODULE_MEMORY)?;
    let (client, node) = (cluster.lab.client1.namespace(), cluster.lab.node1.namespace());
    println!("NFS from client1:   ip netns exec {client} nfs-ls {}", copy::url(""));
    println!("a shell on node1:   ip netns exec {node} bash");
    for module in [&cluster.dmodule, &cluster.nmodule] {
        println!("{}:", module.daemon.name());
        println!("  control socket:   {}", module.api.curl("GET", "/v1/vm", None));
        println!("  console:          {}", module.console.display());
        println!("  process:          {}", module.daemon.pid());
    }
    println!("Ctrl-C ends it");
    loop {
        for module in [&mut cluster.dmodule, &mut cluster.nmodule] {
            if let Some(status) = module.daemon.ended()? {
                bail!("{} has ended with {status}{}", module.daemon.name(), module.quote());
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Room for both files, the data layout's own blocks, and free space to write to, since nothing live is overwritten.
fn disk_size(size: u64, long: u64) -> u64 {
    ((size + long) / 4 * 5 + (1 << 30)).next_multiple_of(1 << 30)
}

/// As long as [`LONG_COPY_SECONDS`] at the speed seen.
fn long_size(size: u64, mb_s: f64, max: u64) -> u64 {
    let wanted = (mb_s * 1e6 * LONG_COPY_SECONDS) as u64;
    wanted.clamp(size, max).next_multiple_of(MIB)
}

struct FirstCopy {
    ok: bool,
    mb_s: f64,
}

/// Copies a file in and out and compares it.
fn first_copy(lab: &Lab, size: u64) -> Result<FirstCopy> {
    let (file, back) = (lab.data_dir().join("first"), lab.data_dir().join("first-back"));
    let progress = Progress::start(&format!("making a file of {} MiB of random bytes", size >> 20));
    copy::random_file(&file, size)?;
    progress.done("");
    let url = copy::url("first");
    let text = |p: &Path| p.display().to_string();
    let write = timed_copy(lab, "copying it in with nfs-cp", &text(&file), &url, size)?;
    let read = timed_copy(lab, "reading it back with nfs-cp", &url, &text(&back), size)?;
    let progress = Progress::start("comparing SHA-256");
    let (a, b) = (copy::sha256(&file)?, copy::sha256(&back)?);
    let ok = a == b;
    progress.done(&if ok { format!("the same, {a}") } else { format!("DIFFERENT: {a} and {b}") });
    for path in [&file, &back] {
        std::fs::remove_file(path)?;
    }
    Ok(FirstCopy { ok, mb_s: write.max(read) })
}

fn timed_copy(lab: &Lab, what: &str, from: &str, to: &str, size: u64) -> Result<f64> {
    let mut progress = Progress::start(what);
    let begin = Instant::now();
    Copy::start(&lab.client1, from, to, size, &lab.state_dir().join("nfs-cp.log"))?.finish(&mut progress)?;
    let mb_s = size as f64 / 1e6 / begin.elapsed().as_secs_f64();
    progress.done(&format!("{mb_s:.0} MB/s"));
    Ok(mb_s)
}

/// Ports `source`'s VM to `to` in the middle of a copy; returns what was seen and the `vmm` that runs it now.
fn port_under_load(
    lab: &Lab,
    artifacts: &Artifacts,
    source: &mut Module,
    to: &Host,
    (from_file, to_file): (&str, &str),
    bytes: u64,
) -> Result<(PortResult, Module)> {
    let client = &lab.client1;
    let receiver = modules::receive(lab, artifacts, to)?;
    let prober = Prober::start(client, NFS.into())?;
    let sampler = Sampler::start(client);

    let mut progress = Progress::start("a long copy");
    let mut copy = Copy::start(client, from_file, to_file, bytes, &lab.state_dir().join("nfs-cp.log"))?;
    let copy_began = Instant::now();
    while copy.copied() < (bytes as f64 * PORT_AFTER) as u64 {
        if !copy.runs()? {
            break;
        }
        progress.update(&copy.how_far());
        std::thread::sleep(Duration::from_millis(5));
    }
    let connection = nfs_connection(client, copy.pid())?;
    let body = modules::port_request(to);
    eprintln!(
        "\nporting the N-module to {} with the request\n  {}",
        to.name,
        source.api.curl("POST", MIGRATIONS, Some(&body))
    );
    let ported = modules::port(source, to)?;
    eprintln!("ported after {:.0} ms", ms(ported.ended - ported.asked));
    let again = nfs_connection(client, copy.pid());
    if !copy.runs()? {
        bail!("the copy ended before the port did: ask for more with --size");
    }
    let again = again?;
    // Of this connection alone: the port's own connection may start or end at the same host.
    let (mut around, mut in_all) = (again.retransmits, again.retransmits);
    while copy.runs()? {
        progress.update(&copy.how_far());
        let Ok(now) = nfs_connection(client, copy.pid()) else { break };
        in_all = now.retransmits;
        if Instant::now() < ported.ended + AFTER_EFFECTS {
            around = now.retransmits;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    copy.finish(&mut progress)?;
    let copy_ended = Instant::now();
    progress.done("finished");
    let series = sampler.finish()?;
    let log = prober.finish()?;
    if log.unanswered() > 0 {
        bail!("{} of {} questions of the prober were never answered", log.unanswered(), log.questions());
    }
    let result = PortResult {
        to: to.name,
        blackout_client: log.longest_silence(ported.asked, ported.ended).unwrap_or_default(),
        longest_wait: log.longest_wait(ported.asked, ported.ended).unwrap_or_default(),
        asked: log.questions(),
        retransmits: [around.saturating_sub(connection.retransmits), in_all],
        same_connection: connection.is_same(&again),
        before: series.mb_s(copy_began + RAMP_UP, ported.asked)?,
        during: series.mb_s(ported.asked, ported.ended.max(ported.asked + 3 * crate::throughput::PERIOD))?,
        after: series.mb_s(ported.ended, copy_ended)?,
        series,
        copy_began,
        bytes,
        ported,
    };
    Ok((result, receiver))
}

/// The connection over which `nfs-cp` copies.
fn nfs_connection(client: &Host, pid: u32) -> Result<Connection> {
    let all = tcp::connections(client, pid, *NFS.ip())?;
    all.into_iter()
        .next()
        .context("nfs-cp has no connection to the N-module: the copy has ended, ask for more with --size")
}

fn result_json(r: &PortResult) -> Value {
    let blackout = r.ported.blackout().map(ms).unwrap_or(f64::NAN);
    json!({
        "ported_to": r.to,
        "blackout_ms": {"vmm": round(blackout), "client": round(ms(r.blackout_client))},
        "client_retransmits": r.retransmits[0],
        "client_retransmits_in_whole_copy": r.retransmits[1],
        "same_connection": r.same_connection,
        "throughput_mb_s": {"before": round(r.before), "during": round(r.during), "after": round(r.after)},
        "port_ms": round(ms(r.ported.ended - r.ported.asked)),
        "probes": r.asked,
    })
}

fn show(away: &PortResult, home: &PortResult, ok: bool, verified: u64) {
    for (what, r) in [("copy in, N-module ported to client1", away), ("copy out, N-module ported back to node1", home)]
    {
        let at = |t: Instant| t.saturating_duration_since(r.copy_began).as_secs_f64();
        let end = r.series.points(r.copy_began);
        println!("\n{}", report::plot(&format!("MB/s, {what}"), &end, &[(at(r.ported.asked), "port")]));
    }
    let row = |name: &str, f: &dyn Fn(&PortResult) -> String| vec![name.to_owned(), f(away), f(home)];
    let rows = vec![
        vec![String::new(), "to client1".into(), "back to node1".into()],
        row("file copied meanwhile, MiB", &|r| (r.bytes >> 20).to_string()),
        row("blackout measured by the VMMs, ms", &|r| {
            r.ported.blackout().map_or("?".into(), |d| format!("{:.2}", ms(d)))
        }),
        row("longest silence seen by the client, ms", &|r| format!("{:.2}", ms(r.blackout_client))),
        row("longest wait for a reply, ms", &|r| format!("{:.2}", ms(r.longest_wait))),
        row("client's TCP retransmits around the port", &|r| r.retransmits[0].to_string()),
        row("  in the whole copy", &|r| r.retransmits[1].to_string()),
        row("same TCP connection", &|r| if r.same_connection { "yes".into() } else { "NO".into() }),
        row("throughput before, MB/s", &|r| format!("{:.0}", r.before)),
        row("throughput during, MB/s", &|r| format!("{:.0}", r.during)),
        row("throughput after, MB/s", &|r| format!("{:.0}", r.after)),
        row("request to end of the port, ms", &|r| format!("{:.0}", ms(r.ported.ended - r.ported.asked))),
    ];
    println!("{}", report::table(&rows));
    println!("{} MiB written, read back and compared: {}", verified >> 20, if ok { "the same" } else { "DIFFERENT" });
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_long_copy_lasts_long_enough_within_bounds() {
        assert_eq!(long_size(64 * MIB, 100.0, LONG_COPY_MAX), 763 * MIB);
        assert_eq!(long_size(1 << 30, 1.0, LONG_COPY_MAX), 1 << 30);
        assert_eq!(long_size(MIB, 1e6, LONG_COPY_MAX), LONG_COPY_MAX);
        assert!(disk_size(1 << 30, 2 << 30) >= 4 << 30);
    }
}
