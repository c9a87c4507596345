//! `vmm ctl`: the control interface for people.
//!
//! Every command is one or a few requests of the control interface, so what it can do any program can do. With `--json` the
//! answers are printed as they came.

mod http;
mod migrate;
mod show;
mod spawn;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use http::{Client, Failure};
use migrate::Migrate;
use spawn::Spawn;
use vmm::config::TlsConfig;

/// Largest configuration read from a file.
const CONFIG_MAX: u64 = 1 << 20;

/// Tell a running vmm what to do.
#[derive(Debug, Args)]
#[command(after_help = STATUS_HELP, arg_required_else_help = true)]
pub struct Ctl {
    /// Control socket of the vmm (its --api-sock).
    #[arg(long, value_name = "PATH", env = "VMM_API_SOCK", global = true)]
    sock: Option<PathBuf>,
    /// Print answers as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const STATUS_HELP: &str = "Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no vmm answers at the socket, \
    4 in doubt (see docs/vmm.md), 130 cancelled with Ctrl-C.";

#[derive(Debug, Subcommand)]
enum Command {
    /// State, memory, boot times and devices of the VM.
    Info,
    /// Print the configuration, or set it from a file.
    Config {
        /// JSON file; - is standard input.
        file: Option<PathBuf>,
    },
    /// Set single fields of the configuration, as JSON or text: memory=64M nets='[{"tap":"tap0"}]'.
    Set {
        /// Field and value.
        #[arg(value_name = "FIELD=VALUE", required = true)]
        fields: Vec<String>,
    },
    /// List the devices, or show one.
    Devices {
        /// Its id.
        id: Option<String>,
    },
    /// Set how much memory the guest is to give back, like 64M.
    Balloon {
        /// Size.
        size: String,
        /// Id of the balloon.
        #[arg(long, default_value = "balloon0")]
        id: String,
    },
    /// Make a disk larger, like 10G; without a size: take over what its image has become.
    Resize {
        /// Its id.
        id: String,
        /// New size.
        size: Option<String>,
    },
    /// Change the rate limits of a device; with neither --ops nor --bytes there is none from now on.
    Limit {
        /// Its id.
        id: String,
        /// Of a network device: only what the guest receives (rx) or sends (tx).
        #[arg(long, value_parser = ["rx", "tx"])]
        only: Option<String>,
        /// Operations a second, and how many can be saved up.
        #[arg(long, value_name = "RATE[:BURST]")]
        ops: Option<String>,
        /// Bytes a second, and how many can be saved up, like 10M:50M.
        #[arg(long, value_name = "RATE[:BURST]")]
        bytes: Option<String>,
    },
    /// Start the VM that was configured.
    Boot,
    /// Go on with the VM of a checkpoint, in a vmm that has no configuration; devices as the checkpoint says.
    Restore {
        /// Its directory.
        dir: PathBuf,
        /// Map the memory file copy-on-write (map), or read all of it first (read).
        #[arg(long, value_name = "HOW", value_parser = ["map", "read"], default_value = "map")]
        memory: String,
        /// Do not check a memory file that is mapped before the guest runs.
        #[arg(long)]
        unverified: bool,
        /// A tap for a network device of the checkpoint.
        #[arg(long, value_name = "ID=TAP")]
        net: Vec<String>,
        /// A raw image for a disk of the checkpoint.
        #[arg(long, value_name = "ID=PATH")]
        disk: Vec<String>,
    },
    /// Save the VM in a directory while it goes on running.
    Checkpoint {
        /// Directory to be made.
        path: PathBuf,
        /// Only what has changed since this one, the last.
        #[arg(long, value_name = "DIR")]
        parent: Option<PathBuf>,
        /// The VM ends with it.
        #[arg(long)]
        stop: bool,
        /// Do not go on recording what changes: the next one cannot have this one as its parent.
        #[arg(long)]
        no_track: bool,
    },
    /// Stop all vCPUs.
    Pause,
    /// Let the vCPUs run again.
    Resume,
    /// Begin the VM again, as if it had been switched off and on.
    Reset,
    /// Start instances of a template, a vmm for each, and say when each serves.
    Spawn(Spawn),
    /// Press the ACPI power button: a guest that heeds it powers off by itself.
    PowerButton,
    /// End the VM and the process in order; the guest is not asked.
    Shutdown,
    /// End the process at once.
    Kill,
    /// Port the VM to another vmm; Ctrl-C cancels.
    Migrate(Migrate),
    /// List the ports of this process.
    Migrations,
    /// Cancel a port.
    Cancel {
        /// Its number.
        id: u64,
    },
    /// Say who runs a VM whose port broke at the hand-over.
    Resolve {
        /// Number of the port.
        id: u64,
        /// The VM runs here.
        #[arg(long, required_unless_present = "there")]
        here: bool,
        /// The VM runs at the destination.
        #[arg(long, conflicts_with = "here")]
        there: bool,
    },
    /// Read keys for ports anew: cert=FILE,key=FILE,ca=FILE[,issuer=FILE]; or off. Without: what is set.
    Tls {
        /// As after --tls.
        setting: Option<String>,
    },
    /// Print what happens, until Ctrl-C or the end of the VM.
    Events,
    /// Print the metrics.
    Metrics,
}

/// Does what was asked for; exit status.
pub fn run(ctl: &Ctl) -> u8 {
    // What it speaks to it starts itself.
    let none = matches!(ctl.command, Command::Spawn(_)).then(PathBuf::new);
    let Some(sock) = ctl.sock.as_ref().or(none.as_ref()) else {
        eprintln!("vmm ctl: which vmm? Give --sock PATH or set VMM_API_SOCK");
        return 2;
    };
    match execute(&Client::new(sock), &ctl.command, ctl.json) {
        Ok(()) => 0,
        Err(e) => {
            match &e {
                Failure::Refused(problem) if ctl.json => eprint!("{}", show::pretty(problem)),
                e if e.status() == 0 => {}
                e => e.to_string().lines().for_each(|line| eprintln!("vmm ctl: {line}")),
            }
            e.status()
        }
    }
}

fn execute(client: &Client, command: &Command, raw: bool) -> Result<(), Failure> {
    let order = |method: &str, path: &str, body: Option<&Value>| {
        let answer = client.json(method, path, body)?;
        if raw { show::print(&show::pretty(&answer)) } else { Ok(()) }
    };
    match command {
        Command::Info => {
            let vm = client.json("GET", "/v1/vm", None)?;
            show::print(&if raw { show::pretty(&vm) } else { show::info(&vm) })
        }
        Command::Config { file: None } => show::print(&show::pretty(&client.json("GET", "/v1/vm/config", None)?)),
        Command::Config { file: Some(file) } => order("PUT", "/v1/vm/config", Some(&read(file)?)),
        Command::Set { fields } => order("PATCH", "/v1/vm/config", Some(&patch(fields)?)),
        Command::Devices { id } => {
            let path =
                id.as_ref().map_or_else(|| "/v1/devices".to_owned(), |id| format!("/v1/devices/{}", segment(id)));
            let answer = client.json("GET", &path, None)?;
            show::print(&match (raw, id) {
                (true, _) => show::pretty(&answer),
                (false, None) => show::devices(answer["devices"].as_array().map_or(&[], Vec::as_slice)),
                (false, Some(_)) => show::device(&answer),
            })
        }
        Command::Balloon { size, id } => {
            order("PUT", &format!("/v1/devices/{}/target", segment(id)), Some(&json!({ "target": number(size) })))
        }
        Command::Resize { id, size } => {
            let body = size.as_deref().map_or_else(|| json!({}), |size| json!({ "size": number(size) }));
            order("PUT", &format!("/v1/devices/{}/size", segment(id)), Some(&body))
        }
        Command::Limit { id, only, ops, bytes } => {
            let path = format!("/v1/devices/{}", segment(id));
            let device = client.json("GET", &path, None)?;
            let limits = json!({ "ops": ops.as_deref().map(rate), "bytes": bytes.as_deref().map(rate) });
            let mut change = Map::new();
            let fields: &[&str] = match (device["kind"].as_str(), only.as_deref()) {
                (Some("network"), Some("rx")) => &["rx_limits"],
                (Some("network"), Some(_)) => &["tx_limits"],
                (Some("network"), None) => &["rx_limits", "tx_limits"],
                _ => &["limits"],
            };
            for field in fields {
                change.insert((*field).to_owned(), limits.clone());
            }
            order("PUT", &format!("{path}/limits"), Some(&change.into()))
        }
        Command::Boot => order("PUT", "/v1/vm/boot", None),
        Command::Restore { dir, memory, unverified, net, disk } => {
            let body = json!({
                "path": absolute(dir)?,
                "memory": memory,
                "verify": !unverified,
                "nets": given(net, "tap")?,
                "disks": given(disk, "path")?,
            });
            order("PUT", "/v1/vm/restore", Some(&body))
        }
        Command::Checkpoint { path, parent, stop, no_track } => {
            let parent = parent.as_deref().map(absolute).transpose()?;
            let body = json!({ "path": absolute(path)?, "parent": parent, "stop": stop, "track": !no_track });
            let done = client.patient().json("POST", "/v1/vm/checkpoint", Some(&body))?;
            show::print(&if raw { show::pretty(&done) } else { show::checkpoint(&done) })
        }
        Command::Pause => order("PUT", "/v1/vm/pause", None),
        Command::Resume => order("PUT", "/v1/vm/resume", None),
        Command::Reset => order("PUT", "/v1/vm/reset", None),
        Command::Spawn(order) => spawn::run(order, raw),
        Command::PowerButton => order("PUT", "/v1/vm/power-button", None),
        Command::Shutdown => order("PUT", "/v1/vm/shutdown", None),
        Command::Kill => order("PUT", "/v1/vm/kill", None),
        Command::Migrate(order) => migrate::run(client, order, raw),
        Command::Migrations => {
            let all = client.json("GET", "/v1/migrations", None)?;
            show::print(&if raw { show::pretty(&all) } else { show::migrations(&all) })
        }
        Command::Cancel { id } => order("DELETE", &format!("/v1/migrations/{id}"), None),
        Command::Resolve { id, here, .. } => {
            order("PUT", &format!("/v1/migrations/{id}/resolve"), Some(&json!({ "here": here })))
        }
        Command::Tls { setting: None } => show::print(&show::pretty(&client.json("GET", "/v1/tls", None)?)),
        Command::Tls { setting: Some(setting) } => {
            let tls =
                TlsConfig::from_flag(setting).map_err(|e| Failure::Failed(format!("{}: {}", e.field, e.message)))?;
            order("PUT", "/v1/tls", Some(&json!({ "tls": tls })))
        }
        Command::Events => events(client, raw),
        Command::Metrics => show::print(&client.text("GET", "/v1/metrics", None)?),
    }
}

/// A part of a path, with what may not stand there encoded.
fn segment(id: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    id.bytes().map(|b| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A size as JSON: a number stays one.
fn number(size: &str) -> Value {
    size.parse::<u64>().map_or_else(|_| size.into(), Value::from)
}

/// RATE[:BURST] as JSON. What is wrong with it the vmm says, by its field.
fn rate(text: &str) -> Value {
    match text.split_once(':') {
        Some((rate, burst)) => json!({ "rate": number(rate), "burst": number(burst) }),
        None => json!({ "rate": number(text) }),
    }
}

/// A path as the vmm, which may be in another directory, has to be told it.
fn absolute(path: &std::path::Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))
}

/// ID=VALUE as a list of devices.
fn given(devices: &[String], field: &str) -> Result<Vec<Value>, Failure> {
    let device = |text: &String| match text.split_once('=') {
        Some((id, value)) => Ok(json!({ "id": id, field: value })),
        None => Err(Failure::Failed(format!("{text:?} is not ID=VALUE"))),
    };
    devices.iter().map(device).collect()
}

fn events(client: &Client, raw: bool) -> Result<(), Failure> {
    let mut reader = client.open("GET", "/v1/events", None)?;
    let mut name = String::new();
    while let Some(line) = http::line(&mut reader).map_err(|e| Failure::Unreachable(format!("events: {e}")))? {
        match line.split_once(": ") {
            Some(("event", value)) => value.clone_into(&mut name),
            Some(("data", text)) => {
                let data: Value = serde_json::from_str(text).unwrap_or(Value::Null);
                let raw_line = || format!("{}\n", json!({ "event": name, "data": data }));
                show::print(&if raw { raw_line() } else { show::event(&name, &data) })?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A configuration from a file or standard input. Its fields are checked by the vmm.
fn read(file: &std::path::Path) -> Result<Value, Failure> {
    use std::io::Read;
    let wrong = |e: &dyn std::fmt::Display| Failure::Failed(format!("{}: {e}", file.display()));
    let mut text = String::new();
    let size = match file.as_os_str() == "-" {
        true => std::io::stdin().take(CONFIG_MAX).read_to_string(&mut text),
        false => std::fs::File::open(file).and_then(|f| f.take(CONFIG_MAX).read_to_string(&mut text)),
    };
    size.map_err(|e| wrong(&e))?;
    serde_json::from_str(&text).map_err(|e| wrong(&e))
}

/// FIELD=VALUE, the value as JSON where it is some, else as text.
fn patch(fields: &[String]) -> Result<Value, Failure> {
    let mut out = Map::new();
    for field in fields {
        let Some((name, value)) = field.split_once('=') else {
            return Err(Failure::Failed(format!("{field:?} is not FIELD=VALUE")));
        };
        out.insert(name.into(), serde_json::from_str(value).unwrap_or_else(|_| value.into()));
    }
    Ok(Value::Object(out))
}
