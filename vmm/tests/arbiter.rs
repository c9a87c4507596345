//! `vmm arbiter`: the ownership records of VMs without a D-module, as a real process that VMMs ask.
#![allow(clippy::unwrap_used, clippy::panic)]

mod port_support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use fabric::id::VmId;
use fabric::wire::{Farewell, Frame, FrameReader, owner_get};
use migration::ownership::{Epoch, OwnerId};
use port_support::{Echo, Lab, PATIENCE, eventually, vmm};
use vmm::port::arbiter::{Arbiter, ArbiterError};
use vmm::records::CONNECTIONS_MAX;

/// The process. Killed when dropped.
struct Records {
    child: Child,
    directory: PathBuf,
    address: SocketAddr,
}

impl Records {
    fn start(directory: &Path, listen: &str) -> Records {
        let mut child = command(directory, listen).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().and_then(|a| a.parse().ok());
        let address = address.unwrap_or_else(|| panic!("the arbiter does not start: {line}"));
        Records { child, directory: directory.into(), address }
    }

    /// Killed, and started again in the same place.
    fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let next = Records::start(&self.directory, &self.address.to_string());
        drop(std::mem::replace(self, next));
    }

    fn epoch(&self, vm_id: u64) -> u64 {
        Arbiter::new(self.address, vm_id, OwnerId::default()).record().unwrap().epoch.0
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(directory: &Path, listen: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["arbiter", "--listen", listen, "--dir"]).arg(directory);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: prctl is async-signal-safe and touches no memory. A test that dies takes its children along.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command
}

#[test]
fn a_vm_without_a_dmodule_is_ported_by_the_records_of_a_host() {
    let lab = Lab::new(2);
    let mut records = Records::start(&lab.dir.path().join("records"), "127.0.0.1:0");
    let address = records.address.to_string();
    let mut here = lab.boot("echo", &["--arbiter", &address, "--vm-id", "9"]);
    let mut echo = Echo::new(&lab);
    for turn in 0..3u16 {
        let there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        let status = here.wait_port(here.port_to(4000 + turn));
        assert_eq!(status["state"], "completed", "{status}");
        assert!(here.wait().success());
        // Taken by the first source with 1.
        assert_eq!(records.epoch(9), u64::from(turn) + 2);
        assert_eq!(there.api("GET", "/v1/vm", None)["epoch"], u64::from(turn) + 2);
        echo.turns(3);
        // What has been answered outlives the process.
        records.restart();
        assert_eq!(records.epoch(9), u64::from(turn) + 2);
        here = there;
    }
    // Who has the VM is told, and a VM that has ended has no record.
    let shown = vmm(&["release", "--arbiter", &address, "--vm-id", "9"]);
    assert!(shown.starts_with("VM 9: epoch 4, owner "), "{shown}");
    here.api("PUT", "/v1/vm/shutdown", None);
    here.wait();
    eventually("the record is released", || (records.epoch(9) == 0).then_some(()));
}

#[test]
fn who_answers_is_confined() {
    let directory = tempfile::tempdir().unwrap();
    let records = Records::start(&directory.path().join("records"), "127.0.0.1:0");
    let mut asking = Arbiter::new(records.address, 5, OwnerId([1, 2]));
    // Its thread and that of this connection.
    assert_eq!(asking.take().unwrap(), Epoch(1));
    let tasks = std::fs::read_dir(format!("/proc/{}/task", records.child.id())).unwrap();
    let status = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()
    };
    let all: Vec<_> = tasks.map(status).collect();
    assert!(all.len() >= 2);
    for status in all {
        for (field, value) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("CapBnd", "0000000000000000")] {
            let line = status.lines().find(|l| l.starts_with(&format!("{field}:"))).unwrap();
            assert_eq!(line.split_once(':').unwrap().1.trim(), value, "{field}");
        }
    }
}

#[test]
fn what_cannot_be_written_is_not_said_to_be_so() {
    let directory = tempfile::tempdir().unwrap();
    let mut records = Records::start(&directory.path().join("records"), "127.0.0.1:0");
    let mut asking = Arbiter::new(records.address, 5, OwnerId([1, 2]));
    // In the place of the file that is to become the next.
    let place = records.directory.join("owners.next");
    std::fs::create_dir(&place).unwrap();
    assert!(matches!(asking.take(), Err(ArbiterError::Undecided(_))));
    assert_eq!(records.epoch(5), 0);
    std::fs::remove_dir(&place).unwrap();
    assert_eq!(asking.take().unwrap(), Epoch(1));
    records.restart();
    assert_eq!(records.epoch(5), 1);
}

#[test]
fn what_is_no_question_ends_the_connection_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let records = Records::start(&directory.path().join("records"), "127.0.0.1:0");
    let hello = fabric::wire::encode(Frame::Hello(fabric::wire::Hello {
        vm_id: VmId(3),
        epoch: fabric::id::Epoch(1),
        owner: fabric::id::Owner([1, 2]),
        nonce: 1,
        version_min: fabric::wire::VERSION,
        version_max: fabric::wire::VERSION,
        capabilities: 0,
    }));
    for wrong in
        [b"GET / HTTP/1.1\r\n\r\nsome more, as a frame is longer than that".to_vec(), hello.unwrap().into_vec()]
    {
        let mut stream = TcpStream::connect(records.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&wrong).unwrap();
        let mut answer = Vec::new();
        // What was not read makes it a reset.
        let _ = stream.read_to_end(&mut answer);
        let said = FrameReader::new().push(&mut &answer[..]).unwrap();
        assert_eq!(said, Some(Frame::Goodbye { reason: Farewell::Protocol }));
    }
    assert_eq!(records.epoch(3), 0);
}

#[test]
fn one_connection_more_ends_the_one_that_was_silent_longest() {
    let directory = tempfile::tempdir().unwrap();
    let records = Records::start(&directory.path().join("records"), "127.0.0.1:0");
    let connect = || {
        let stream = TcpStream::connect(records.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let ask = |mut stream: &TcpStream| {
        stream.write_all(&owner_get(VmId(3)).unwrap()).ok()?;
        let (mut reader, mut buffer) = (FrameReader::new(), [0; 512]);
        let n = stream.read(&mut buffer).ok()?;
        reader.push(&mut &buffer[..n]).unwrap()
    };
    let mut all: Vec<_> = (0..CONNECTIONS_MAX).map(|_| connect()).collect();
    // So all are known there; the first is not the one that was silent longest.
    for stream in all.iter().rev() {
        assert!(matches!(ask(stream), Some(Frame::OwnerRecord(_))));
    }
    let last = connect();
    assert!(matches!(ask(&last), Some(Frame::OwnerRecord(_))));
    let mut said = Vec::new();
    all.pop().unwrap().read_to_end(&mut said).unwrap();
    let said = FrameReader::new().push(&mut &said[..]).unwrap();
    assert_eq!(said, Some(Frame::Goodbye { reason: Farewell::Full }));
    assert!(matches!(ask(&all[0]), Some(Frame::OwnerRecord(_))));
}

#[test]
fn a_directory_that_is_in_use_or_damaged_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("records");
    let records = Records::start(&path, "127.0.0.1:0");
    let refused = |listen: &str| {
        let output = command(&path, listen).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("127.0.0.1:0").contains("another process keeps the records in this directory"));
    drop(records);
    let bytes = b"OROF\x01\0\0\0 and so on, but no checksum".to_vec();
    std::fs::write(path.join("owners"), &bytes).unwrap();
    let said = refused("127.0.0.1:0");
    assert!(said.contains("owners: it is damaged or cut off"), "{said}");
    assert_eq!(std::fs::read(path.join("owners")).unwrap(), bytes, "it is left as it is");
    std::fs::remove_file(path.join("owners")).unwrap();
    let said = refused("192.0.2.1:1");
    assert!(said.contains("cannot listen on 192.0.2.1:1"), "{said}");
}
