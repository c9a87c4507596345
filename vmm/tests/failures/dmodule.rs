//! The arbiter: the D-module's server as a process of its own, with its records in a file, that can be killed and started again.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use fabric::id::{Epoch, Owner, VmId};
use fabric::owner::OwnerRecord;
use fabric::wire::{Frame, FrameReader, Hello, Refusal, VERSION, encode};

use crate::disk::Disk;
use crate::port_support::{PATIENCE, eventually, stop};

/// Size of its disk, in bytes; a hole but for a few blocks.
const DISK: u64 = 64 << 20;

/// See the module.
pub struct Dmodule {
    child: Child,
    disk: PathBuf,
    pub address: SocketAddr,
}

impl Dmodule {
    /// With a blank disk, at a free port of the switch's address.
    pub fn start(disk: &Path) -> Dmodule {
        let _ = std::fs::remove_file(disk);
        std::fs::File::create(disk).unwrap().set_len(DISK).unwrap();
        let (child, address) = spawn(disk, "10.77.0.1:0");
        Dmodule { child, disk: disk.into(), address }
    }

    /// SIGKILL, or any other.
    pub fn signal(&self, signal: i32) {
        // SAFETY: no memory is involved; the process is our own child and not waited for yet.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Killed, and started again with the disk as it was then.
    pub fn restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let (child, _) = spawn(&self.disk, &self.address.to_string());
        self.child = child;
    }

    /// Its disk's file system is full from now on.
    pub fn fill(&self, disk: &Disk) {
        stop(self.child.id());
        disk.fill_under(&self.disk);
        self.signal(libc::SIGCONT);
    }

    /// A VM's record.
    pub fn record(&self, vm_id: u64) -> OwnerRecord {
        match self.ask(Frame::OwnerGet { vm_id: VmId(vm_id) }) {
            Frame::OwnerRecord(record) => record,
            other => panic!("{other:?}"),
        }
    }

    /// What the CF client in a guest hears when it connects: the epoch, or the epoch that makes its own a stale one.
    pub fn hello(&self, vm_id: u64, epoch: u64, owner: Owner) -> Result<u64, u64> {
        let hello = Hello {
            vm_id: VmId(vm_id),
            epoch: Epoch(epoch),
            owner,
            nonce: 1,
            version_min: VERSION,
            version_max: VERSION,
            capabilities: 0,
        };
        match self.ask(Frame::Hello(hello)) {
            Frame::HelloAck(ack) => Ok(ack.epoch.0),
            Frame::HelloRefused(Refusal::StaleEpoch { current }) => Err(current.0),
            other => panic!("{other:?}"),
        }
    }

    fn ask(&self, question: Frame) -> Frame {
        let bytes = encode(question).unwrap().into_vec();
        eventually("the D-module answers", || {
            let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(1)).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&bytes).ok()?;
            let (mut reader, mut buffer) = (FrameReader::default(), [0; 4096]);
            loop {
                let n = stream.read(&mut buffer).ok().filter(|n| *n > 0)?;
                if let Some(frame) = reader.push(&mut &buffer[..n]).unwrap() {
                    return Some(frame);
                }
            }
        })
    }
}

impl Drop for Dmodule {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(disk: &Path, listen: &str) -> (Child, SocketAddr) {
    let mut command = Command::new(program());
    command.arg(disk).arg(listen).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    // SAFETY: prctl is async-signal-safe and touches no memory. A test that dies takes its children along.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().rsplit(' ').next().and_then(|a| a.parse().ok());
    (child, address.unwrap_or_else(|| panic!("the D-module does not start: {line}")))
}

/// Built once for this test program.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dmodule");
        let mut cargo = Command::new(env!("CARGO"));
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_") || ["RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER"].contains(&&*name) {
                cargo.env_remove(&*name);
            }
        }
        let status = cargo
            .args(["build", "-q", "-p", "dserver", "--example", "dmodule", "--target-dir"])
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(status.success(), "the D-module does not build");
        target.join("debug/examples/dmodule")
    })
}
