//! Disks of real `vmm` processes, worked by the test guest: every kind of image and back end, and what happens when one fails.

#![allow(clippy::unwrap_used)]

#[path = "guest/storage_daemon.rs"]
mod storage_daemon;
#[path = "guest/testguest.rs"]
mod testguest;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use storage_daemon::StorageDaemon;

const MIB: u64 = 1 << 20;

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Vmm {
    process: Process,
    dir: PathBuf,
}

impl Vmm {
    /// Runs the test guest with one disk; `before` are words before the command.
    fn start(dir: &Path, test: &str, disk: &str, before: &[&str]) -> Vmm {
        let mut words = before.iter().copied().chain([env!("CARGO_BIN_EXE_vmm")]);
        let mut command = Command::new(words.next().unwrap());
        let child = command
            .args(words)
            .args(["--memory", "64M", "--cmdline", &format!("test={test}"), "--disk", disk, "--image"])
            .arg(testguest::image())
            .arg("--api-sock")
            .arg(dir.join("api.sock"))
            .arg("--serial")
            .arg(dir.join("console"))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        Vmm { process: Process(child), dir: dir.to_owned() }
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join(name)).unwrap_or_default()).into_owned()
    }

    fn wait(&mut self) -> Option<i32> {
        self.process.0.wait().unwrap().code()
    }

    fn ended(&mut self) -> bool {
        self.process.0.try_wait().unwrap().is_some()
    }

    fn ends_well(mut self) {
        let status = self.wait();
        assert_eq!(status, Some(0), "{}\n{}", self.text("console"), self.text("log"));
        assert!(self.text("console").contains("errors are right"), "{}", self.text("console"));
    }

    fn ask(&mut self, method: &str, path: &str) -> String {
        let mut stream = loop {
            match UnixStream::connect(self.dir.join("api.sock")) {
                Ok(stream) => break stream,
                Err(_) => assert!(!self.ended(), "it has ended\n{}", self.text("log")),
            }
            std::thread::yield_now();
        };
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Asks for the metrics until they say this.
    fn metrics_say(&mut self, text: &str) {
        while !self.ask("GET", "/v1/metrics").contains(text) {
            assert!(!self.ended(), "it has ended\n{}", self.text("log"));
            std::thread::yield_now();
        }
    }
}

fn sparse(path: &Path, size: u64) -> String {
    File::create(path).unwrap().set_len(size).unwrap();
    path.to_str().unwrap().to_owned()
}

fn storage_daemon(dir: &Path, image: &str, queues: u16) -> (StorageDaemon, String) {
    let daemon = StorageDaemon::start(&dir.join("vhost-user.sock"), image, queues);
    let socket = daemon.socket.to_str().unwrap().to_owned();
    (daemon, socket)
}

/// What the test guest writes first.
fn guest_wrote(path: &str) -> bool {
    let bytes = std::fs::read(path).unwrap();
    bytes[8..16] == 8u64.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

#[test]
fn raw_images() {
    for options in ["", ",direct=false", ",queues=4,bytes=4G,ops=1M"] {
        let dir = tempfile::tempdir().unwrap();
        let image = sparse(&dir.path().join("disk"), 16 * MIB);
        Vmm::start(dir.path(), "block", &format!("path={image}{options}"), &[]).ends_well();
        assert!(guest_wrote(&image));
    }
}

#[test]
fn qcow2_images() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let qemu_img = |args: &[&str]| {
        let status = Command::new("qemu-img").args(args).status().expect("qemu-img (Debian: qemu-utils)");
        assert!(status.success(), "qemu-img {args:?}");
    };
    qemu_img(&["create", "-q", "-f", "qcow2", &at("disk"), "16M"]);
    Vmm::start(dir.path(), "block", &format!("path={},format=qcow2", at("disk")), &[]).ends_well();
    qemu_img(&["check", "-q", "-f", "qcow2", &at("disk")]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &at("disk"), &at("raw")]);
    assert!(guest_wrote(&at("raw")));
}

#[test]
fn a_vhost_user_back_end() {
    for queues in [1, 4] {
        let dir = tempfile::tempdir().unwrap();
        let image = sparse(&dir.path().join("disk"), 16 * MIB);
        let (daemon, socket) = storage_daemon(dir.path(), &image, queues);
        Vmm::start(dir.path(), "block", &format!("vhost_user={socket},queues={queues}"), &[]).ends_well();
        drop(daemon);
        assert!(guest_wrote(&image));
    }
}

#[test]
fn a_back_end_that_dies_costs_only_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let image = sparse(&dir.path().join("disk"), 16 * MIB);
    let (daemon, socket) = storage_daemon(dir.path(), &image, 1);
    let mut vmm = Vmm::start(dir.path(), "block-loop", &format!("vhost_user={socket}"), &[]);
    vmm.metrics_say("vmm_vhost_user_connected{device=\"disk0\"} 1");
    while !vmm.text("console").contains("reading") {
        assert!(!vmm.ended(), "{}", vmm.text("log"));
        std::thread::yield_now();
    }
    drop(daemon);
    vmm.metrics_say("vmm_vhost_user_lost_total{device=\"disk0\"} 1");
    vmm.metrics_say("vmm_vhost_user_connected{device=\"disk0\"} 0");
    assert!(vmm.ask("GET", "/v1/vm").contains("running"));
    assert!(vmm.text("log").contains("its back end is gone"), "{}", vmm.text("log"));
    vmm.ask("PUT", "/v1/vm/shutdown");
    assert_eq!(vmm.wait(), Some(0));
}

#[test]
fn a_back_end_that_does_not_answer_or_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent.sock");
    // It accepts, and says nothing.
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut vmm = Vmm::start(dir.path(), "block", &format!("vhost_user={}", socket.display()), &[]);
    assert_eq!(vmm.wait(), Some(1));
    assert!(vmm.text("log").contains("silent.sock"), "{}", vmm.text("log"));
    let mut vmm = Vmm::start(dir.path(), "block", "vhost_user=/nonexistent", &[]);
    assert_eq!(vmm.wait(), Some(2));
    assert!(vmm.text("log").contains("disks[0].vhost_user"), "{}", vmm.text("log"));
    // more queues than the back end has
    let image = sparse(&dir.path().join("disk"), 16 * MIB);
    let (_daemon, socket) = storage_daemon(dir.path(), &image, 1);
    let mut vmm = Vmm::start(dir.path(), "block", &format!("vhost_user={socket},queues=2"), &[]);
    assert_eq!(vmm.wait(), Some(1));
    assert!(vmm.text("log").contains("it has 1 queues, 2 are configured"), "{}", vmm.text("log"));
}

/// A tmpfs of one MiB.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new() -> Tmpfs {
        let dir = tempfile::tempdir().unwrap();
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(dir.path()).status().unwrap();
        assert!(status.success());
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn no_room_on_the_host_is_an_error_to_the_guest_and_nobody_else() {
    let (dir, mount) = (tempfile::tempdir().unwrap(), Tmpfs::new());
    let full = sparse(&mount.0.path().join("disk"), 16 * MIB);
    let limited = sparse(&dir.path().join("disk"), 16 * MIB);
    // A full file system, and a limit on the size of files: the signal that comes with it must not end the process.
    for (image, before) in [(full, &[][..]), (limited, &["prlimit", "--fsize=1048576", "--"][..])] {
        let mut vmm = Vmm::start(dir.path(), "block", &format!("path={image}"), before);
        let status = vmm.wait();
        let (console, log) = (vmm.text("console"), vmm.text("log"));
        assert_eq!(status, Some(guest_abi::exit_status::FAILED as i32), "{console}\n{log}");
        assert!(console.contains("the device reports an I/O error"), "{console}");
        assert!(log.contains("disk0: write at sector"), "{log}");
        std::fs::remove_file(dir.path().join("console")).unwrap();
    }
}
