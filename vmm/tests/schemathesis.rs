//! The control interface against its own description: schemathesis, from PyPI, makes requests out of docs/openapi.json and
//! checks the answers of real `vmm` processes, one that waits for its configuration and one whose VM runs.
//!
//! This is a program of its own and no `#[test]`: whether it can run is known only when it runs. Without Python or, before
//! schemathesis is installed below the target directory, without the network, it counts as ignored and says why. The requests are
//! made in a network namespace of its own: an address that schemathesis makes up for a port leads nowhere.

#![allow(clippy::unwrap_used)]

mod control;
mod guest;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use control::{Process, park_for_ever};
use serde_json::json;

const NAME: &str = "the_control_interface_keeps_to_its_description";
const VERSION: &str = "4.32.5";
/// Requests made up for each operation and phase.
const EXAMPLES: &str = "12";
/// What would end the process under test, or not end itself.
const LEFT_OUT: [&str; 3] = ["/v1/vm/kill", "/v1/vm/shutdown", "/v1/events"];

/// The program, installed below the target directory once; or why it cannot be had.
fn schemathesis() -> Result<PathBuf, String> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("schemathesis-{VERSION}"));
    let program = venv.join("bin/schemathesis");
    if program.exists() {
        return Ok(program);
    }
    let run = |command: &mut Command| {
        let out = command.stdin(Stdio::null()).output().map_err(|e| format!("{command:?}: {e}"))?;
        match out.status.success() {
            true => Ok(()),
            false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim())),
        }
    };
    // What is left of an attempt that was broken off is cleared.
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
    let pip = ["install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"];
    let installed = run(Command::new(venv.join("bin/pip")).args(pip).arg(format!("schemathesis=={VERSION}")));
    if installed.is_err() {
        let _ = std::fs::remove_dir_all(&venv);
    }
    installed.map(|()| program)
}

/// Copies until the end of `from`, and tells `to`.
fn pump(mut from: impl Read, mut to: impl Write, end: impl Fn()) {
    let _ = io::copy(&mut from, &mut to);
    end();
}

/// Connections to a TCP port go to a unix socket. Gives the port.
fn proxy(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&socket));
            let Ok(server) = server else { continue };
            let (c, s): (TcpStream, UnixStream) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || pump(&c, &s, || drop(s.shutdown(Shutdown::Write))));
            std::thread::spawn(move || pump(&server, &client, || drop(client.shutdown(Shutdown::Write))));
        }
    });
    port
}

/// Tries everything on one process. True if all answers were as described and the process is as it was.
fn holds(program: &Path, process: &mut Process, dir: &Path, what: &str, left_out: &[&str]) -> bool {
    process.connect();
    let port = proxy(process.socket.clone());
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let mut command = Command::new(program);
    command.args(["--no-color", "run"]).arg(document.canonicalize().unwrap());
    command.args(["--url", &format!("http://127.0.0.1:{port}"), "--seed", "1", "--max-examples", EXAMPLES]);
    command.arg("--continue-on-failure");
    // What is right by its form may not be possible on this host: no image, no such tap, nobody at that address.
    // A port that is cancelled stays in the list, with what became of it.
    command.args(["--exclude-checks", "positive_data_acceptance,use_after_free"]);
    for path in left_out {
        command.args(["--exclude-path", path]);
    }
    let out = command.current_dir(dir).stdin(Stdio::null()).output().unwrap();
    if !out.status.success() {
        println!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        println!("{NAME}: {what}: schemathesis ended with {}", out.status);
    }
    let alive = process.json("GET", "/v1/vm", "").0 == 200;
    println!("{NAME}: {what}: {}", last_line(&out.stdout));
    out.status.success() && alive
}

fn last_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).lines().last().unwrap_or_default().trim_matches(['=', ' ']).to_owned()
}

fn test(program: &Path) -> bool {
    // SAFETY: no memory is involved; there are no other threads yet.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    let (waiting, running) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut process = Process::empty(waiting.path());
    let waits = holds(program, &mut process, waiting.path(), "waiting", &LEFT_OUT);
    let image = running.path().join("image");
    let disk = running.path().join("disk.img");
    std::fs::write(&image, guest::image(park_for_ever())).unwrap();
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let config = json!({
        "image": image, "memory": "8M", "serial": "none", "disks": [{ "path": disk }], "nets": [{ "tap": "tap0" }],
        "balloon": {}, "rng": {},
    });
    let mut process = Process::empty(running.path());
    let (status, answer) = process.json("PUT", "/v1/vm/config", &config.to_string());
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = process.json("PUT", "/v1/vm/boot", "");
    assert_eq!(status, 200, "{answer}");
    process.serving();
    // One that says "stop" would end this process.
    let left_out = [&LEFT_OUT[..], &["/v1/vm/checkpoint"]].concat();
    let runs = holds(program, &mut process, running.path(), "running", &left_out);
    waits && runs
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|a| a == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    let mut filters = arguments.iter().filter(|a| !a.starts_with('-')).peekable();
    let wanted = filters.peek().is_none() || filters.any(|f| NAME.contains(f.as_str()));
    println!("\nrunning {} test", u8::from(wanted));
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    if wanted {
        match schemathesis() {
            Err(why) => {
                ignored = 1;
                println!("test {NAME} ... ignored, schemathesis {VERSION} cannot be had: {why}");
            }
            Ok(program) if test(&program) => {
                passed = 1;
                println!("test {NAME} ... ok");
            }
            Ok(_) => {
                failed = 1;
                println!("test {NAME} ... FAILED");
            }
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    let out = u8::from(!wanted);
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; {out} filtered out\n"
    );
    ExitCode::from(failed)
}
