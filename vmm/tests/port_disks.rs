//! Ports of VMs with disks between real `vmm` processes that reach the same image, while the guest writes and verifies: exactly one
//! process runs the guest, and has the lock on the image.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use port_support::arbiter::Arbiter;
use port_support::puppet::{Puppet, Until};
use port_support::{Echo, Lab, Vmm, eventually};

const MIB: u64 = 1 << 20;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn sparse(path: PathBuf, size: u64) -> String {
    File::create(&path).unwrap().set_len(size).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A file as block device, as long as this lives.
struct Loop(String);

impl Loop {
    fn new(file: &str) -> Loop {
        Loop(run("losetup", &["--find", "--show", "--direct-io=on", file]))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.0]);
    }
}

/// A writer's lock on an image, as any other program takes it; `None`: somebody has one.
fn lock(path: &str) -> Option<File> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the call reads one flock.
    (unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0).then_some(file)
}

/// Rounds of the disk job that a guest has finished in this process.
fn rounds(vmm: &Vmm) -> usize {
    std::fs::read_to_string(&vmm.console).unwrap_or_default().matches("disk: round").count()
}

/// The guest verifies on here, and this process has the lock.
fn works(vmm: &mut Vmm, echo: &mut Echo, image: &str) {
    let before = rounds(vmm);
    eventually("the disk job goes on", || {
        assert!(vmm.is_alive(), "{}", std::fs::read_to_string(&vmm.console).unwrap());
        echo.turn();
        (rounds(vmm) > before + 4).then_some(())
    });
    assert!(lock(image).is_none(), "the image is locked");
}

fn boot(lab: &Lab, disk: &str, more: &[&str]) -> Vmm {
    lab.boot("disk", &[&["--disk", disk][..], more].concat())
}

/// To another process and back to a third, and what it cost.
fn to_and_fro(lab: &Lab, image: &str, options: &str, there_options: &str, more: &[&str]) {
    let mut here = boot(lab, &format!("path={image},{options}serial=travels"), more);
    let mut echo = Echo::new(lab);
    works(&mut here, &mut echo, image);
    for turn in 0..3u16 {
        let port = 4000 + turn;
        let mut there = lab.receive(
            usize::from((turn + 1) % 2),
            port,
            &["--disk", &format!("id=disk0,path={image}{there_options}")],
        );
        let status = here.wait_port(here.port_to(port));
        assert_eq!(status["state"], "completed", "{status}");
        assert!(here.wait().success());
        println!("{options}: blackout {} us, disks {} us", status["blackout_us"], status["breakdown"]["disks_us"]);
        works(&mut there, &mut echo, image);
        let devices = there.api("GET", "/v1/devices", None);
        assert!(devices.to_string().contains("disk0"), "{devices}");
        here = there;
    }
    assert_eq!(echo.retransmits(), 0, "no segment was lost");
    here.api("PUT", "/v1/vm/shutdown", None);
    assert!(here.wait().success());
    assert!(lock(image).is_some(), "the lock ends with the process");
}

#[test]
fn raw_past_the_page_cache() {
    let lab = Lab::new(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    to_and_fro(&lab, &image, "direct=true,", ",direct=true", &[]);
}

#[test]
fn raw_through_the_page_cache_with_an_arbiter() {
    let lab = Lab::new(2);
    let arbiter = Arbiter::start();
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let more = ["--arbiter", &arbiter.address.to_string(), "--vm-id", "9"];
    to_and_fro(&lab, &image, "direct=false,", ",direct=false", &more);
}

#[test]
fn qcow2_on_a_backing_file() {
    let lab = Lab::new(2);
    let at = |name: &str| lab.dir.path().join(name).to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &at("base"), "4M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &at("base"), "-F", "qcow2", &at("disk")]);
    to_and_fro(&lab, &at("disk"), "format=qcow2,", "", &[]);
    run("qemu-img", &["check", "-q", "-f", "qcow2", &at("disk")]);
}

#[test]
fn a_block_device() {
    let lab = Lab::new(2);
    let device = Loop::new(&sparse(lab.dir.path().join("disk"), 4 * MIB));
    to_and_fro(&lab, &device.0, "", "", &[]);
}

#[test]
fn without_a_word_the_image_is_where_it_was() {
    let lab = Lab::new(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let here = boot(&lab, &format!("path={image}"), &[]);
    let mut echo = Echo::new(&lab);
    let mut there = lab.receive(1, 4000, &[]);
    let status = here.wait_port(here.port_to(4000));
    assert_eq!(status["state"], "completed", "{status}");
    works(&mut there, &mut echo, &image);
}

#[test]
fn a_destination_without_the_image_refuses_by_name() {
    let lab = Lab::new(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let mut here = boot(&lab, &format!("path={image}"), &[]);
    let mut echo = Echo::new(&lab);
    let other = sparse(lab.dir.path().join("other"), 4 * MIB);
    let small = sparse(lab.dir.path().join("small"), MIB);
    let directory = lab.dir.path().to_str().unwrap();
    for (path, why) in [
        ("/nonexistent/disk", "/nonexistent/disk"),
        (&other, "another image than at the source"),
        (&small, "has 1048576 bytes here, 4194304 at the source"),
        ("/dev/null", "/dev/null"),
        (directory, directory),
    ] {
        let there = lab.receive(1, 4000, &["--disk", &format!("id=disk0,path={path}")]);
        let status = here.wait_port(here.port_to(4000));
        assert_eq!(status["state"], "failed", "{path}: {status}");
        assert!(status["error"].as_str().unwrap().contains(why), "{path}: {status}");
        assert_eq!(there.state(), "receiving", "and waits for the next");
        works(&mut here, &mut echo, &image);
    }
}

/// The source has given the image up, and its destination does not take the VM: it takes the image back, and waits for it if need be.
#[test]
fn the_source_goes_on_only_with_its_lock() {
    let lab = Lab::plain(2);
    let arbiter = Arbiter::start();
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let address = arbiter.address.to_string();
    for more in [&[][..], &["--arbiter", &address, "--vm-id", "9"]] {
        let until = if more.is_empty() { Until::Handing } else { Until::Commit };
        let mut here = boot(&lab, &format!("path={image}"), more);
        let mut echo = Echo::new(&lab);
        works(&mut here, &mut echo, &image);
        // nobody else wants it
        let puppet = Puppet::new();
        let id = here.port_to(puppet.port());
        drop(puppet.follow(until, 0));
        let status = here.wait_port(id);
        assert_eq!(status["state"], "failed", "{status}");
        works(&mut here, &mut echo, &image);
        // a destination that has locked it, and lets go of it only after its connection
        let epoch = if more.is_empty() { 0 } else { arbiter.record(9).unwrap().epoch.0 };
        let id = here.port_to(puppet.port());
        let stopped = puppet.follow(until, epoch);
        let locked = eventually("the image is free", || lock(&image));
        drop(stopped);
        eventually("it says what it waits for", || {
            let status = here.port(id);
            assert_eq!(status["state"], "running", "{status}");
            status["error"].as_str().is_some_and(|e| e.contains("in use by another process")).then_some(())
        });
        assert_eq!(here.state(), "paused");
        let stood = rounds(&here);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!((rounds(&here), here.state().as_str()), (stood, "paused"));
        drop(locked);
        let status = here.wait_port(id);
        assert_eq!(status["state"], "failed", "{status}");
        works(&mut here, &mut echo, &image);
    }
}

#[test]
fn a_source_that_waits_for_its_lock_can_be_shut_down() {
    let lab = Lab::plain(1);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let mut here = boot(&lab, &format!("path={image}"), &[]);
    let puppet = Puppet::new();
    let id = here.port_to(puppet.port());
    let stopped = puppet.follow(Until::Handing, 0);
    let _locked = eventually("the image is free", || lock(&image));
    drop(stopped);
    eventually("it waits", || here.port(id)["error"].is_string().then_some(()));
    here.api("PUT", "/v1/vm/shutdown", None);
    assert!(here.wait().success());
}

/// Somebody who is quicker than the destination: it does not commit, and the guest goes on at the source when the image is free.
#[test]
fn a_lock_that_somebody_else_gets_first() {
    let lab = Lab::new(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let mut here = boot(&lab, &format!("path={image}"), &[]);
    let mut echo = Echo::new(&lab);
    works(&mut here, &mut echo, &image);
    for attempt in 0..20u16 {
        let mut there = lab.receive(usize::from((attempt + 1) % 2), 4000 + attempt, &[]);
        let id = here.port_to(4000 + attempt);
        let thief = eventually("the lock is taken, or the port is over", || {
            loop {
                if let Some(file) = lock(&image) {
                    return Some(Some(file));
                }
                if there.state() == "running" {
                    return Some(None);
                }
            }
        });
        if thief.is_none() {
            // The destination was quicker.
            assert!(here.wait().success());
            works(&mut there, &mut echo, &image);
            here = there;
            continue;
        }
        eventually("the destination gives up", || {
            let arrival = there.api("GET", "/v1/vm", None)["arrival"].clone();
            arrival["last_error"].as_str().is_some_and(|e| e.contains("in use by another process")).then_some(())
        });
        assert_eq!((here.state().as_str(), there.state().as_str()), ("paused", "receiving"));
        drop(thief);
        let status = here.wait_port(id);
        assert_eq!(status["state"], "failed", "{status}");
        assert!(status["error"].as_str().unwrap().contains("in use by another process"), "{status}");
        works(&mut here, &mut echo, &image);
        return;
    }
    panic!("the destination was quicker every time");
}

#[test]
fn processes_that_are_killed_let_go_of_the_image() {
    let lab = Lab::plain(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    // the source, when it has given the image up, and before
    for until in [Until::Handing, Until::PreCopy] {
        let mut here = boot(&lab, &format!("path={image}"), &[]);
        let puppet = Puppet::new();
        here.port_to(puppet.port());
        let _stopped = puppet.follow(until, 0);
        here.signal(libc::SIGKILL);
        here.wait();
        assert!(eventually("the image is free", || lock(&image)).metadata().unwrap().len() == 4 * MIB);
    }
    // a destination that runs the guest
    let mut here = boot(&lab, &format!("path={image}"), &[]);
    let mut there = lab.receive(1, 4000, &[]);
    assert_eq!(here.wait_port(here.port_to(4000))["state"], "completed");
    assert!(here.wait().success());
    there.signal(libc::SIGKILL);
    there.wait();
    eventually("the image is free", || lock(&image));
    let mut again = boot(&lab, &format!("path={image}"), &[]);
    works(&mut again, &mut Echo::new(&lab), &image);
    assert!(Path::new(&image).exists());
}
