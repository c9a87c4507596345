//! Ports of VMs with disks between real `vmm` processes that reach the same image, while the guest writes and verifies: exactly one
//! process runs the guest, and has the lock on the image.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use port_support::arbiter::Arbiter;
use port_support::disks::{MIB, lock, read_lock, rounds, run, sparse, works};
use port_support::puppet::{Puppet, Until};
use port_support::{Echo, Lab, Vmm, eventually};

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
        drop(puppet.follow(until, u64::from(!more.is_empty())));
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

/// Makes the calling thread more urgent than those of a port.
fn hurry() {
    let parameters = libc::sched_param { sched_priority: 3 };
    // SAFETY: the call reads the parameters; only this thread changes.
    let rc = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
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
        // Nobody has it for as long as the residue is on its way. Both sides are urgent then: who asks for it in between must not do
        // anything else.
        let over = AtomicBool::new(false);
        let thief = std::thread::scope(|scope| {
            let thief = scope.spawn(|| {
                hurry();
                loop {
                    match lock(&image) {
                        None if !over.load(Ordering::Relaxed) => {}
                        end => return end,
                    }
                }
            });
            eventually("the lock is taken, or the port is over", || {
                (thief.is_finished() || there.state() == "running").then_some(())
            });
            over.store(true, Ordering::Relaxed);
            thief.join().unwrap()
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

/// Any number read an image, while it moves too.
#[test]
fn a_disk_that_is_only_read() {
    let lab = Lab::new(2);
    let image = sparse(lab.dir.path().join("disk"), 4 * MIB);
    let reader = read_lock(&image).unwrap();
    let mut here = lab.boot("block-loop", &["--disk", &format!("path={image},readonly=true")]);
    let reads = |vmm: &Vmm| -> u64 {
        let metrics = vmm.api_text("/v1/metrics");
        let line = metrics.lines().find_map(|l| l.strip_prefix("vmm_blk_reads_total{device=\"disk0\"} "));
        line.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap()
    };
    eventually("the guest reads", || (reads(&here) > 100).then_some(()));
    for turn in 0..2u16 {
        let mut there = lab.receive(usize::from((turn + 1) % 2), 4000 + turn, &[]);
        let status = here.wait_port(here.port_to(4000 + turn));
        assert_eq!(status["state"], "completed", "{status}");
        assert!(here.wait().success());
        let before = reads(&there);
        eventually("the guest reads on", || (reads(&there) > before + 100).then_some(()));
        assert!(there.is_alive());
        assert_eq!(there.api("GET", "/v1/vm/config", None)["disks"][0]["readonly"], true);
        assert!(lock(&image).is_none(), "nobody writes meanwhile");
        here = there;
    }
    drop(reader);
    assert!(lock(&image).is_none() && read_lock(&image).is_some());
    drop(here);
    assert!(lock(&image).is_some());
}

/// A mount namespace, in which the calling thread is from now on, with an empty file system of its own at `own`.
fn namespace(own: &Path) -> File {
    // SAFETY: no memory is involved; only this thread changes its namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
    run("mount", &["--make-rprivate", "/"]);
    run("mount", &["-t", "tmpfs", "tmpfs", own.to_str().unwrap()]);
    File::open("/proc/thread-self/ns/mnt").unwrap()
}

fn enter(namespace: &File) {
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) }, 0);
}

/// Between two hosts an image is the same one if it has the same inode number and is seen locked: as on a network file system, and
/// not as a file of the same name and number on another disk. A host is one by its boot id.
#[test]
fn between_two_hosts_number_and_lock_decide() {
    let lab = Lab::new(2);
    let at = |name: &str| lab.dir.path().join(name);
    let (shared, own) = (sparse(at("shared"), 4 * MIB), at("own"));
    std::fs::create_dir(&own).unwrap();
    let source = namespace(&own);
    let destination = namespace(&own);
    std::fs::write(at("boot_id"), "11111111-2222-4333-8444-555555555555\n").unwrap();
    run("mount", &["--bind", at("boot_id").to_str().unwrap(), "/proc/sys/kernel/random/boot_id"]);

    for (test, readonly) in [("disk", false), ("block-loop", true)] {
        enter(&source);
        let local = sparse(own.join("disk"), 4 * MIB);
        let number = std::fs::metadata(&local).unwrap().ino();
        let mut here = lab.boot(test, &["--disk", &format!("path={local},readonly={readonly}")]);
        enter(&destination);
        sparse(own.join("disk"), 4 * MIB);
        assert_eq!(std::fs::metadata(&local).unwrap().ino(), number, "both have the same number");
        let there = lab.receive(1, 4000, &[]);
        let status = here.wait_port(here.port_to(4000));
        assert_eq!(status["state"], "failed", "{status}");
        assert!(status["error"].as_str().unwrap().contains("the source's lock on the image is not seen"), "{status}");
        assert_eq!((here.state().as_str(), there.state().as_str()), ("running", "receiving"));
        assert!(here.is_alive());
    }

    enter(&source);
    let mut here = boot(&lab, &format!("path={shared}"), &[]);
    let mut echo = Echo::new(&lab);
    works(&mut here, &mut echo, &shared);
    enter(&destination);
    let other = sparse(at("other"), 4 * MIB);
    let there = lab.receive(1, 4000, &["--disk", &format!("id=disk0,path={other}")]);
    let status = here.wait_port(here.port_to(4000));
    assert!(status["error"].as_str().unwrap().contains("another image than at the source"), "{status}");
    drop(there);
    works(&mut here, &mut echo, &shared);
    let mut there = lab.receive(1, 4000, &[]);
    let status = here.wait_port(here.port_to(4000));
    assert_eq!(status["state"], "completed", "{status}");
    assert!(here.wait().success());
    works(&mut there, &mut echo, &shared);
}
