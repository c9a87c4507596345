//! Builds the image and runs it.
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A VM that has not ended by itself after this time hangs.
const PATIENCE: Duration = Duration::from_secs(120);

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Cargo's target directory, as of the build of this test.
fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

fn build(arguments: &[&str]) {
    let mut cargo = images::cargo(workspace());
    cargo.env("CARGO_TARGET_DIR", target()).args(["build", "--locked", "--quiet"]).args(arguments);
    let status = cargo.status().expect("cargo");
    assert!(status.success(), "cargo build {arguments:?}: {status}");
}

/// The test image; `TESTGUEST_IMAGE` names one that is built already.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        if let Some(path) = std::env::var_os("TESTGUEST_IMAGE") {
            return path.into();
        }
        build(&["--package", "testguest", "--profile", "guest"]);
        target().join("guest/testguest")
    })
}

/// Our VMM.
pub fn vmm() -> &'static Path {
    static VMM: OnceLock<PathBuf> = OnceLock::new();
    VMM.get_or_init(|| {
        assert!(Path::new("/dev/kvm").exists(), "no /dev/kvm");
        build(&["--package", "vmm", "--bin", "vmm", "--release"]);
        target().join("release/vmm")
    })
}

/// How a VM ended.
#[derive(Debug)]
pub struct Ended {
    /// What it printed.
    pub console: String,
    /// The guest's own status, if it could tell one.
    pub status: Option<u32>,
}

impl Ended {
    /// Fails unless the guest ended well and printed all of these.
    #[track_caller]
    pub fn is_well(&self, lines: &[&str]) {
        assert_eq!(self.status, Some(0), "{self}");
        self.says(lines);
    }

    #[track_caller]
    pub fn says(&self, lines: &[&str]) {
        for line in lines {
            assert!(self.console.contains(line), "no {line:?} in\n{self}");
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:?}\n{}", self.status, self.console)
    }
}

/// Who runs the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// QEMU microvm, emulated.
    Tcg,
    /// QEMU microvm on KVM.
    QemuKvm,
    /// Ours, direct start in ring 3.
    Direct,
    /// Ours, PVH start.
    Pvh,
}

impl Monitor {
    pub fn is_qemu(self) -> bool {
        matches!(self, Monitor::Tcg | Monitor::QemuKvm)
    }
}

/// A VM to be started.
pub struct Vm {
    monitor: Monitor,
    command: Command,
}

impl Vm {
    pub fn new(monitor: Monitor, memory_mib: u32, cmdline: &str) -> Vm {
        let mut command;
        if monitor.is_qemu() {
            command = Command::new("qemu-system-x86_64");
            // acpi=off: only then does QEMU announce its virtio devices on the command line.
            command.args(["-M", "microvm,x-option-roms=off,isa-serial=on,rtc=on,acpi=off"]);
            match monitor {
                Monitor::Tcg => command.args(["-accel", "tcg"]),
                _ => command.args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"]),
            };
            command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
            command.args(["-global", "virtio-mmio.force-legacy=off"]);
            command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
            command.args(["-m", &memory_mib.to_string()]).arg("-kernel").arg(image());
            command.args(["-append", &format!("debug_exit=0xf4 {cmdline}")]);
        } else {
            command = Command::new(vmm());
            command.arg("--image").arg(image()).args(["--memory", &format!("{memory_mib}M"), "--cmdline", cmdline]);
            command.args(["--boot", if monitor == Monitor::Direct { "direct" } else { "pvh" }]);
        }
        Vm { monitor, command }
    }

    /// Further arguments.
    pub fn args(mut self, arguments: &[&str]) -> Vm {
        self.command.args(arguments);
        self
    }

    /// A disk on a file.
    pub fn disk(self, file: &Path, read_only: bool) -> Vm {
        let file = file.to_str().unwrap();
        if self.monitor.is_qemu() {
            let drive =
                format!("if=none,id=d,file={file},format=raw,read-only={}", if read_only { "on" } else { "off" });
            self.args(&["-drive", &drive, "-device", "virtio-blk-device,drive=d,serial=test-disk"])
        } else {
            self.args(&[
                "--disk",
                &format!("path={file},id=test-disk{}", if read_only { ",readonly=true" } else { "" }),
            ])
        }
    }

    /// Inside a network namespace.
    pub fn in_namespace(mut self, name: &str) -> Vm {
        let mut outer = Command::new("ip");
        outer.args(["netns", "exec", name]).arg(self.command.get_program()).args(self.command.get_args());
        self.command = outer;
        self
    }

    pub fn start(mut self) -> Running {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let child = self.command.spawn().unwrap_or_else(|e| panic!("{:?}: {e}", self.command.get_program()));
        let mut running = Running { monitor: self.monitor, child, console: None };
        let mut out = running.child.stdout.take().unwrap();
        running.console = Some(std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = out.read_to_end(&mut text);
            String::from_utf8_lossy(&text).replace('\r', "")
        }));
        running
    }

    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

/// A VM that runs; killed when dropped.
pub struct Running {
    monitor: Monitor,
    child: Child,
    console: Option<std::thread::JoinHandle<String>>,
}

impl Running {
    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break Some(status);
            }
            if start.elapsed() > PATIENCE {
                let _ = self.child.kill();
                let _ = self.child.wait();
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let console = self.console.take().unwrap().join().unwrap();
        let status = status.unwrap_or_else(|| panic!("the VM hangs; it printed:\n{console}"));
        let code = status.code().unwrap_or_else(|| panic!("{status}; the VM printed:\n{console}"));
        let status = match self.monitor {
            // isa-debug-exit: 2 × status + 1, cut to a byte. 0 is a reset.
            Monitor::Tcg | Monitor::QemuKvm => (code & 1 == 1).then_some(code as u32 >> 1),
            _ => Some(code as u32),
        };
        Ended { console, status }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
