//! The main job once on AMD-V: inside a Linux machine that QEMU emulates in software, with a KVM of its own.
//!
//! The emulated machine boots from memory only: both module images, the `vmm`, `nfs-cp` and `curl` with their libraries. Its init
//! script starts both modules, copies a file in, ports the N-module to a second `vmm` process, reads the file back, and prints
//! a line for every step; the last one is the verdict. Always true: no verdict is a failure, and the console is quoted then.
use crate::artifacts::Artifacts;
use crate::cleanup::Temporary;
use crate::modules::{self, FABRIC, NMODULE_MAC, NMODULE_MEMORY, NMODULE_VM_ID, RECEIVE_PORT};
use crate::process::{self, Daemon};
use crate::{copy, lab};
use anyhow::{Context, Result, bail};
use images::linux::{self, Contents};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Software emulation is slow, and a busy machine makes it slower.
const LIMIT: Duration = Duration::from_secs(600);
const MODULES: [&str; 7] = ["irqbypass", "kvm", "kvm-amd", "tun", "llc", "stp", "bridge"];
/// Bytes copied: the emulated machine is a hundred times slower than a real one.
const FILE_MIB: u32 = 4;
const DISK_MIB: u32 = 256;
const VERDICT: &str = "NESTED VERDICT: ";

/// The kernel of the emulated machine: downloaded the first time.
pub fn kernel(target: &Path) -> Result<linux::Kernel> {
    linux::kernel(&target.join("nested")).context("the Linux kernel of the nested test")
}

/// Runs it; the console as evidence, or why it failed.
pub fn run(artifacts: &Artifacts) -> Result<String> {
    let cache = artifacts.target.join("nested");
    let kernel = kernel(&artifacts.target)?;
    let work = Temporary::directory(cache.join(format!("run-{}", std::process::id())))?;
    let initrd = work.path().join("initrd");
    linux::initrd(&kernel, &contents(artifacts), &work.path().join("root"), &initrd)?;
    let console = work.path().join("console");
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "EPYC,+svm,+npt"]);
    // One CPU is a must: with two the emulated machine loses wake-ups between them.
    qemu.args(["-smp", "1", "-m", "2048", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]);
    qemu.args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"]);
    qemu.arg("-kernel").arg(&kernel.vmlinuz).arg("-initrd").arg(&initrd);
    let mut machine = Daemon::start("the emulated machine", &mut qemu, &console)?;
    let ended = machine.wait(LIMIT);
    let text = String::from_utf8_lossy(&std::fs::read(&console).unwrap_or_default()).into_owned();
    let verdict = text.lines().find_map(|l| l.trim().strip_prefix(VERDICT));
    match (ended, verdict) {
        (Ok(_), Some("ok")) => Ok(text),
        (Ok(_), verdict) => bail!("verdict: {}; {}", verdict.unwrap_or("none"), process::log_tail(&console)),
        (Err(e), _) => Err(e),
    }
}

fn contents(artifacts: &Artifacts) -> Contents {
    let program = |host: &str, inside: &str| (PathBuf::from(host), inside.to_owned());
    Contents {
        programs: vec![
            (artifacts.vmm.clone(), "/bin/vmm".into()),
            program("/usr/bin/nfs-cp", "/bin/nfs-cp"),
            program("/usr/bin/curl", "/bin/curl"),
        ],
        files: vec![
            (artifacts.images.nmodule.clone(), "/images/nmodule".into()),
            (artifacts.images.dmodule.clone(), "/images/dmodule".into()),
        ],
        modules: MODULES.map(str::to_owned).to_vec(),
        init: init(),
    }
}

/// The init script. Both `vmm` processes of the N-module are in one network here: what is tested is KVM on AMD-V.
fn init() -> String {
    let client = lab::CLIENT1_IP;
    let dmodule_cmdline = modules::dmodule_cmdline(modules::Disk::New);
    let nmodule_cmdline = modules::nmodule_cmdline();
    let (dmodule_mac, url, modules) = (modules::DMODULE_MAC, copy::url("file"), MODULES.join(" "));
    format!(
        r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
end() {{
    echo "{VERDICT}$1"
    [ "$1" = ok ] || for f in /tmp/*.console /tmp/*.log; do echo "-- $f"; tail -n 30 $f; done
    sync; poweroff -f
}}
# wait_for SECONDS COMMAND…
wait_for() {{
    left=$1; shift
    until "$@" </dev/null >/dev/null 2>&1; do left=$((left - 1)); [ $left -gt 0 ] || return 1; sleep 1; done
}}
for m in {modules}; do insmod /modules/$m.ko || end "no kernel module $m"; done
[ -e /dev/kvm ] || end "no /dev/kvm"
echo "NESTED: $(grep -o -m 1 -w svm /proc/cpuinfo) machine is up"
ip link set lo up
brctl addbr br0; echo 0 > /sys/class/net/br0/bridge/multicast_snooping
ip addr add {client}/24 dev br0; ip link set br0 up
for t in tapd tapn tapm; do tunctl -t $t >/dev/null; brctl addif br0 $t; ip link set $t up; done
dd if=/dev/zero of=/tmp/disk bs=1M count=0 seek={DISK_MIB} 2>/dev/null
dd if=/dev/urandom of=/tmp/in bs=1M count={FILE_MIB} 2>/dev/null

vmm --image /images/dmodule --name dmodule --memory 128M --cmdline "{dmodule_cmdline}" --disk id=disk0,path=/tmp/disk \
    --net id=net0,tap=tapd,mac={dmodule_mac} --serial /tmp/dmodule.console --api-sock /tmp/d.sock >/tmp/dmodule.log 2>&1 &
wait_for 60 nc -w 2 {fabric_ip} {fabric_port} || end "the D-module does not serve"
echo "NESTED: D-module serves"
vmm --image /images/nmodule --name nmodule --memory {NMODULE_MEMORY} --cmdline "{nmodule_cmdline}" --vm-id {NMODULE_VM_ID} \
    --arbiter {FABRIC} --net id=net0,tap=tapn,mac={NMODULE_MAC} --serial /tmp/nmodule.console --api-sock /tmp/n.sock \
    >/tmp/nmodule.log 2>&1 &
wait_for 60 nc -w 2 {nfs_ip} {nfs_port} || end "the N-module does not serve"
echo "NESTED: N-module serves"
timeout 120 nfs-cp /tmp/in "{url}" || end "copying in failed"
echo "NESTED: copied in"

vmm --receive 127.0.0.1:{RECEIVE_PORT} --net id=net0,tap=tapm --serial /tmp/received.console --api-sock /tmp/m.sock \
    >/tmp/received.log 2>&1 &
listening() {{ netstat -ltn | grep -q ":{RECEIVE_PORT} "; }}
wait_for 30 listening || end "no receiving vmm"
curl -sS --fail-with-body --unix-socket /tmp/n.sock -H 'Content-Type: application/json' \
    -d '{{"to":"127.0.0.1:{RECEIVE_PORT}"}}' http://vmm{migrations} || end "the port was refused"
runs_there() {{ curl -sS --unix-socket /tmp/m.sock http://vmm/v1/vm | grep -q '"state": *"running"'; }}
wait_for 60 runs_there || end "the N-module was not ported"
echo; echo "NESTED: ported"
timeout 120 nfs-cp "{url}" /tmp/out || end "reading back after the port failed"
cmp /tmp/in /tmp/out || end "the bytes differ"
echo "NESTED: read back and compared after the port"
end ok
"#,
        fabric_ip = FABRIC.ip(),
        fabric_port = FABRIC.port(),
        nfs_ip = modules::NFS.ip(),
        nfs_port = modules::NFS.port(),
        migrations = modules::MIGRATIONS,
    )
}
