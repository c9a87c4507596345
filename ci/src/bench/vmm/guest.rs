//! The benchmark's guest in either monitor.
//!
//! Always true: both monitors get the same image, memory, disk file and tap; what comes on the console is stamped when it
//! comes.
use crate::lab::Host;
use crate::process::Daemon;
use anyhow::{Context, Result, anyhow, bail};
use std::io::Read;
use std::path::Path;
use std::process::{ChildStdout, Command};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Memory of the guest.
pub const MEMORY_MIB: u64 = 128;
/// How long a line may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// MAC address of the guest.
pub const MAC: &str = "02:00:00:00:0b:01";
/// The image's first character, printed in ring 3.
const EARLY_MARK: u8 = b'^';
/// Longest line of the guest.
const LINE_MAX: usize = 4096;
/// QEMU's status when the guest ends with 0 (isa-debug-exit).
const QEMU_SUCCESS: i32 = 1;
/// How long the guest polls before it halts. Under QEMU it has to poll all the time: no device interrupts it, so a halt ends by
/// its timer only, up to 1 ms late.
pub const SPIN_FOREVER_US: u64 = 1_000_000;

/// Who runs the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// Our `vmm`.
    Ours = 0,
    /// QEMU's microvm.
    Qemu = 1,
}

/// What all guests of a run share.
pub struct Machine<'a> {
    /// Our monitor.
    pub vmm: &'a Path,
    /// The image.
    pub image: &'a Path,
    /// Where the tap is.
    pub host: &'a Host,
    /// For logs.
    pub state: &'a Path,
}

/// A guest that runs.
pub struct Guest {
    monitor: Monitor,
    daemon: Daemon,
    said: Receiver<(Instant, String)>,
}

impl Guest {
    /// Starts one; `words` go on its command line.
    pub fn start(
        machine: &Machine,
        monitor: Monitor,
        disk: Option<&Path>,
        tap: Option<&str>,
        words: &str,
    ) -> Result<Guest> {
        let mut command = match monitor {
            Monitor::Ours => ours(machine, disk, tap, words),
            Monitor::Qemu => qemu(machine, disk, tap, words),
        };
        let log = machine.state.join(format!("bench-{monitor:?}.log"));
        let name = format!("{monitor:?}");
        let (daemon, stdout) = machine.host.enter(|| Daemon::piped(&name, &mut command, &log))?;
        let (sender, said) = channel();
        std::thread::spawn(move || listen(stdout, &sender));
        Ok(Guest { monitor, daemon, said })
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    fn next(&mut self) -> Result<(Instant, String)> {
        self.said.recv_timeout(PATIENCE).map_err(|_| anyhow!("{:?}: no line{}", self.monitor, self.daemon.quote_log()))
    }

    /// From before the start of the process to the first instruction in ring 3; the first question to be asked.
    pub fn ring_3_after(&mut self) -> Result<Duration> {
        let (at, line) = self.next()?;
        if line.as_bytes() != [EARLY_MARK] {
            bail!("{:?}: {line:?} instead of the first mark{}", self.monitor, self.daemon.quote_log());
        }
        Ok(at - self.daemon.started())
    }

    /// Waits for a line that begins so; when it came, and the rest of it.
    pub fn line(&mut self, begin: &str) -> Result<(Instant, String)> {
        loop {
            let (at, line) = self.next().with_context(|| format!("waiting for {begin:?}"))?;
            if let Some(rest) = line.strip_prefix(begin) {
                return Ok((at, rest.trim().to_owned()));
            }
            if line.starts_with("failed") || line.starts_with("FAULT") || line.starts_with("panic") {
                bail!("{:?}: {line}", self.monitor);
            }
        }
    }

    /// Waits for its orderly end.
    pub fn end(mut self) -> Result<()> {
        let status = self.daemon.wait(PATIENCE)?;
        let wanted = if self.monitor == Monitor::Qemu { QEMU_SUCCESS } else { 0 };
        if status.code() != Some(wanted) {
            bail!("{:?} ended with {status}{}", self.monitor, self.daemon.quote_log());
        }
        Ok(())
    }
}

/// Stamps what comes: the early mark by itself, then lines.
fn listen(mut stdout: ChildStdout, to: &Sender<(Instant, String)>) {
    let (mut chunk, mut line) = ([0; 512], Vec::new());
    while let Ok(n @ 1..) = stdout.read(&mut chunk) {
        let at = Instant::now();
        for &byte in &chunk[..n] {
            match byte {
                EARLY_MARK | b'\n' => {
                    if byte == EARLY_MARK {
                        line.push(byte);
                    }
                    // Nobody listens any more: the guest is being ended.
                    let _ = to.send((at, String::from_utf8_lossy(&line).into_owned()));
                    line.clear();
                }
                b'\r' => {}
                _ if line.len() < LINE_MAX => line.push(byte),
                _ => {}
            }
        }
    }
}

fn ours(machine: &Machine, disk: Option<&Path>, tap: Option<&str>, words: &str) -> Command {
    let mut command = Command::new(machine.vmm);
    command.arg("--image").arg(machine.image).args(["--memory", &format!("{MEMORY_MIB}M"), "--serial", "stdout"]);
    command.args(["--cmdline", &format!("early_mark log=warn {words}")]);
    if let Some(disk) = disk {
        command.args(["--disk", &format!("id=disk0,path={}", disk.display())]);
    }
    if let Some(tap) = tap {
        command.args(["--net", &format!("id=net0,tap={tap},mac={MAC}")]);
    }
    command
}

/// As good as QEMU can be set: no firmware but its own PVH loader, no devices that are not needed, O_DIRECT by io_uring in a thread
/// of its own, all offloads of the tap (there is no vhost-net on the test machine, and none is used).
fn qemu(machine: &Machine, disk: Option<&Path>, tap: Option<&str>, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm,x-option-roms=off,acpi=off,isa-serial=on,rtc=on", "-accel", "kvm"]);
    command.args(["-cpu", "host,-arch-capabilities", "-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-serial", "stdio", "-no-reboot", "-global", "virtio-mmio.force-legacy=off"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    let words = format!("early_mark log=warn debug_exit=0xf4 spin_us={SPIN_FOREVER_US} {words}");
    command.arg("-kernel").arg(machine.image).args(["-append", &words]);
    if let Some(disk) = disk {
        let drive = format!("if=none,id=d0,file={},format=raw,cache=none,aio=io_uring", disk.display());
        command.args(["-object", "iothread,id=io0", "-drive", &drive]);
        command.args(["-device", "virtio-blk-device,drive=d0,iothread=io0"]);
    }
    if let Some(tap) = tap {
        let net = format!("tap,id=n0,ifname={tap},script=no,downscript=no,vnet_hdr=on");
        command.args(["-netdev", &net, "-device", &format!("virtio-net-device,netdev=n0,mac={MAC}")]);
    }
    command
}
