//! One VM that is ported to and fro between two hosts while everything fails, and what became of it each time.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fabric::id::Owner;

use crate::disk::{self, Disk};
use crate::dmodule::Dmodule;
use crate::hold::Points;
use crate::network::Host;
use crate::port_support::{Echo, GUEST, Lab, MAC, PATIENCE, eventually, image, ip};
use crate::stand::{Instance, Stand, in_vain, owner, signal, source_is_over, stand, starve};
use crate::{Course, Fault, Ownership};

const VM_ID: u64 = 9;
/// Longer than every limit of a port but the source's watch, once [`HURRY`] divides it.
const DWELL: Duration = Duration::from_millis(1300);
/// Divides the limits of a port where a fault lasts.
const HURRY: u32 = 10;
/// The same where nothing has to time out: a busy machine must not look like a fault.
const HURRY_LITTLE: u32 = 2;

/// What each host and the arbiter write is in one of these.
const DIRECTORIES: [&str; 3] = ["host0", "host1", "arbiter"];
const ARBITER: usize = 2;
/// The first point of the source behind the naming of the heir.
const NAMED: &str = "source do SendRound";
/// A source that takes the VM back comes here only when the arbiter's disk has room.
const TAKEN_BACK: &str = "source on Verdict";
/// What a destination logs when it loads the state.
const LOADING: &str = "pages that were skipped are poisoned";

/// Which copy was left when it was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Survivor {
    Source,
    Destination,
    /// The source stands still until the operator says who runs.
    Unknown,
    /// The VM was on the host that died.
    Nobody,
}

/// What came of one fault at one point.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub survivor: Survivor,
    /// From the fault until it was decided.
    pub after: Duration,
}

pub struct World {
    ownership: Ownership,
    hurry: u32,
    number: u16,
    here: Option<Instance>,
    echo: Option<Echo>,
    arbiter: Option<Dmodule>,
    hosts: [Host; 2],
    /// Of each host and of the arbiter, where one of them gets full.
    disks: Vec<Disk>,
    /// The log of a process on a disk that is full, and its length then.
    full: Option<(PathBuf, u64)>,
    arbiter_full: bool,
    noise: Arc<AtomicBool>,
    /// Of the port under way.
    source_owner: Option<Owner>,
    /// The fault came when the destination had been told that it may run.
    told: bool,
    pub lab: Lab,
}

impl Drop for World {
    fn drop(&mut self) {
        self.noise.store(true, Ordering::Release);
    }
}

impl World {
    pub fn new(ownership: Ownership, fault: Fault) -> World {
        let lab = Lab::plain(0);
        for directory in DIRECTORIES {
            std::fs::create_dir(lab.dir.path().join(directory)).unwrap();
        }
        let mut disks = Vec::new();
        if fault.fills() {
            disk::own_mounts();
            disks.extend(DIRECTORIES.map(|directory| Disk::mount(&lab.dir.path().join(directory))));
        }
        let hosts = [Host::new(0), Host::new(1)];
        let noise = Arc::new(AtomicBool::new(false));
        let over = noise.clone();
        // Frames for the guest at any time, so that some come while it moves.
        std::thread::spawn(move || {
            let socket = UdpSocket::bind("10.77.0.1:0").unwrap();
            while !over.load(Ordering::Acquire) {
                let _ = socket.send_to(&[0; 16], (GUEST, 9999));
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let hurry = if fault.lasts() { HURRY } else { HURRY_LITTLE };
        World {
            ownership,
            hurry,
            number: 0,
            here: None,
            echo: None,
            arbiter: None,
            hosts,
            disks,
            full: None,
            arbiter_full: false,
            noise,
            source_owner: None,
            told: false,
            lab,
        }
    }

    /// Once there is a VM.
    pub fn arbiter(&self) -> &Dmodule {
        self.arbiter.as_ref().unwrap()
    }

    /// Of the process that has the VM.
    pub fn log(&self) -> PathBuf {
        self.here.as_ref().unwrap().log.clone()
    }

    /// Ports the VM along a course and lets a fault happen at a point (`None`: nothing happens). Returns what became of it,
    /// and the points passed by both sides; no outcome if the port never came to the point.
    pub fn port(&mut self, course: Course, fault: Option<(&str, Fault)>) -> (Option<Outcome>, Vec<String>) {
        let mut source = self.source();
        let at = 1 - source.at;
        let mut destination =
            self.spawn(at, &["--receive", &format!("{}:4000", self.hosts[at].address), "--poison-skipped"]);
        source.points.expect(None, None);
        destination.points.expect(None, course.fails());
        let cancel_at = "destination receive ROUND";
        if course == Course::Cancelled {
            destination.points.hold(cancel_at);
        }
        let early = fault.filter(|(point, _)| course != Course::Cancelled || point.starts_with("source"));
        if let Some((point, _)) = early {
            if point.starts_with("source") { &source.points } else { &destination.points }.hold(point);
        }
        let fills_first = fault.is_some_and(|(p, f)| f == Fault::ArbiterFullRestarted && p != TAKEN_BACK);
        if fills_first {
            source.points.hold(NAMED);
        }
        self.source_owner = owner(&source.vmm);
        let order = format!("{{\"to\":\"{}:4000\",\"verify\":true}}", self.hosts[at].address);
        let id = source.vmm.api("POST", "/v1/migrations", Some(&order))["id"].as_u64().unwrap();
        if fills_first {
            self.fill_when_named(early.map(|(point, _)| point), &source, &destination, id);
        }
        if course == Course::Cancelled {
            if !destination.points.wait(&|| source_is_over(&source.vmm, id)) {
                // On a busy machine a limit has passed before.
                source.points.release(false);
                return (None, self.settle(source, destination, Instant::now(), id, None).1);
            }
            source.vmm.api("DELETE", &format!("/v1/migrations/{id}"), None);
            // The source hears of it while the destination is held.
            if early.is_none() {
                eventually("the port is off", || (source.vmm.port(id)["state"] == "cancelled").then_some(()));
            } else {
                source.points.wait(&|| false);
            }
            if let Some((point, _)) = fault.filter(|(p, _)| p.starts_with("destination")) {
                destination.points.release_to(point);
            } else {
                destination.points.release(false);
            }
        }
        let mut began = Instant::now();
        let mut gives_up = false;
        if let Some((point, fault)) = fault {
            let at_source = point.starts_with("source");
            let held = if at_source { &source.points } else { &destination.points };
            if !held.wait(&|| source_is_over(&source.vmm, id)) {
                if self.arbiter_full {
                    self.free_arbiter();
                }
                return (None, self.settle(source, destination, Instant::now(), id, None).1);
            }
            if course == Course::GivenBack && at_source && !source.points.passed("source receive ABORTED") {
                // On a busy machine the source's limit has passed first: that is another course.
                held.release(false);
                return (None, self.settle(source, destination, Instant::now(), id, None).1);
            }
            if course == Course::Declined {
                eventually("COMMIT is on its way", || source.points.passed("source send COMMIT").then_some(()));
            }
            began = Instant::now();
            self.told = destination.points.passed("destination receive COMMIT");
            gives_up = match fault {
                Fault::DestinationFull => !destination.points.passed("destination on Prepared"),
                Fault::ArbiterFull | Fault::ArbiterFullRestarted => !source.points.passed(NAMED),
                _ => false,
            } && course == Course::Straight;
            self.strike(fault, &mut source, &mut destination, id);
            if at_source { &source.points } else { &destination.points }.release(fault == Fault::StepFails);
            self.mend(fault, &mut source, &mut destination);
        }
        let log = destination.log.clone();
        let (outcome, trace) = self.settle(source, destination, began, id, fault.map(|(_, fault)| fault));
        if let Some((_, fault)) = fault.filter(|(_, fault)| fault.fills()) {
            // On a busy machine a limit, a tenth of itself here, passes before the arbiter has answered; then either may have the VM.
            let late = trace.iter().any(|point| point.ends_with(" on Timeout"));
            let expected = match course.end() {
                _ if gives_up => Survivor::Source,
                _ if late => outcome.survivor,
                end => end,
            };
            assert_eq!(outcome.survivor, expected, "{trace:?}");
            assert_ne!(outcome.survivor, Survivor::Nobody, "{trace:?}");
            self.was_full(fault, gives_up.then_some(id));
        } else if fault.is_none() && outcome.survivor == Survivor::Destination {
            assert!(std::fs::read_to_string(log).unwrap().contains(LOADING));
        }
        (Some(outcome), trace)
    }

    /// The port did what it has room for: all of it, or, if its end was not in doubt yet, it was `given_up`, with the reason.
    fn was_full(&mut self, fault: Fault, given_up: Option<u64>) {
        if let Some(id) = given_up {
            let status = self.here.as_ref().unwrap().vmm.port(id);
            let error = status["error"].as_str().unwrap();
            let parts = match fault {
                Fault::DestinationFull => ["serial output", "No space left on device"],
                _ => ["arbiter", "its disk does not take it"],
            };
            assert!(parts.iter().all(|part| error.contains(part)), "{status}");
        }
        if let Some((log, length)) = self.full.take() {
            // What it had to say meanwhile is lost (LOADING, for one), and nothing else.
            assert_eq!(std::fs::metadata(log).unwrap().len(), length, "the disk was not full");
            self.disks.iter().for_each(Disk::free);
        }
    }

    /// The VM, where it runs; a new one if it is lost.
    fn source(&mut self) -> Instance {
        if let Some(here) = self.here.take() {
            return here;
        }
        self.echo = None;
        if self.ownership == Ownership::Arbiter {
            self.arbiter = Some(Dmodule::start(&self.lab.dir.path().join(DIRECTORIES[ARBITER]).join("disk")));
        }
        let cmdline = format!("test=echo ip={GUEST}/24 log=warn");
        let vm_id = VM_ID.to_string();
        let arbiter = self.arbiter.as_ref().map(|a| a.address.to_string());
        let mut args = vec!["--image", image().to_str().unwrap(), "--memory", "64M", "--cmdline", &cmdline];
        if let Some(arbiter) = &arbiter {
            args.extend(["--arbiter", arbiter, "--vm-id", &vm_id]);
        }
        let instance = self.spawn(0, &args);
        // The VM before this one had the same address, and the switch has seen it elsewhere: it is asked for again.
        ip("neigh flush dev br0");
        self.echo = Some(Echo::new(&self.lab));
        if self.ownership == Ownership::Stream {
            return instance;
        }
        // A record comes into being with the first port; only then can an heir be named.
        self.here = Some(instance);
        eventually("there is a record", || {
            self.port(Course::Straight, None);
            (self.arbiter.as_ref()?.record(VM_ID).epoch.0 > 0).then_some(())
        });
        self.here.take().unwrap()
    }

    fn spawn(&mut self, at: usize, args: &[&str]) -> Instance {
        self.number += 1;
        let points = Points::listen(&self.lab.dir.path().join(format!("vmm{}.points", self.number)));
        let name = format!("{}/vmm{}", DIRECTORIES[at], self.number);
        let receives = args.contains(&"--receive");
        let net = format!("tap=tap0,id=lan{}", if receives { String::new() } else { format!(",mac={MAC}") });
        let hurry = self.hurry.to_string();
        let mut all = args.to_vec();
        all.extend(["--net", &net, "--port-faults", points.socket.to_str().unwrap(), "--port-hurry", &hurry]);
        let vmm = self.lab.spawn_in(&self.hosts[at].namespace, &name, &all);
        let log = self.lab.dir.path().join(format!("{name}.log"));
        Instance { vmm, points, at, log }
    }

    fn strike(&mut self, fault: Fault, source: &mut Instance, destination: &mut Instance, id: u64) {
        match fault {
            Fault::KillSource => signal(source, libc::SIGKILL),
            Fault::KillDestination => signal(destination, libc::SIGKILL),
            Fault::StopSource => signal(source, libc::SIGSTOP),
            Fault::StopDestination => signal(destination, libc::SIGSTOP),
            Fault::PullSource => self.hosts[source.at].cable(false),
            Fault::PullDestination => self.hosts[destination.at].cable(false),
            Fault::SourceUnheard => self.hosts[source.at].mute(true),
            Fault::DestinationUnheard => self.hosts[destination.at].mute(true),
            Fault::ArbiterRestarted => self.arbiter.as_mut().unwrap().restart(),
            Fault::ArbiterSilent => self.arbiter.as_ref().unwrap().signal(libc::SIGSTOP),
            Fault::ArbiterAway => self.arbiter.as_ref().unwrap().signal(libc::SIGKILL),
            Fault::OutOfMemory => starve(destination, true),
            Fault::DestinationFull => {
                destination.vmm.stop();
                self.disks[destination.at].fill();
                let length = std::fs::metadata(&destination.log).unwrap().len();
                self.full = Some((destination.log.clone(), length));
                destination.vmm.signal(libc::SIGCONT);
            }
            Fault::ArbiterFull => self.fill_arbiter(),
            Fault::ArbiterFullRestarted => {
                self.fill_arbiter();
                self.arbiter.as_mut().unwrap().restart();
            }
            Fault::StepFails => {}
            Fault::Cancel => {
                // It may have ended.
                let _ = source.vmm.try_api("DELETE", &format!("/v1/migrations/{id}"), None);
            }
        }
    }

    fn fill_arbiter(&mut self) {
        if !std::mem::replace(&mut self.arbiter_full, true) {
            self.arbiter.as_ref().unwrap().fill(&self.disks[ARBITER]);
        }
    }

    fn free_arbiter(&mut self) {
        self.arbiter_full = false;
        self.disks[ARBITER].free();
    }

    /// Fills the arbiter's disk when the source has named the heir, if it comes there before somebody is held at a point; the
    /// source is to go on to its own one, if it has one.
    fn fill_when_named(&mut self, point: Option<&str>, source: &Instance, destination: &Instance, id: u64) {
        let at = eventually("somebody is held, or the port is over", || {
            let held = source.points.held().or(destination.points.held());
            held.or_else(|| source_is_over(&source.vmm, id).then(String::new))
        });
        if at == NAMED && point != Some(NAMED) {
            self.fill_arbiter();
        }
        match point.filter(|p| p.starts_with("source")) {
            None => source.points.release(false),
            Some(point) if at == NAMED && point != NAMED => source.points.release_to(point),
            Some(_) => {}
        }
    }

    /// What lasts has lasted long enough.
    fn mend(&mut self, fault: Fault, source: &mut Instance, destination: &mut Instance) {
        if !fault.lasts() {
            return;
        }
        std::thread::sleep(DWELL);
        match fault {
            Fault::StopSource => signal(source, libc::SIGCONT),
            Fault::StopDestination => signal(destination, libc::SIGCONT),
            Fault::PullSource => self.hosts[source.at].cable(true),
            Fault::PullDestination => self.hosts[destination.at].cable(true),
            Fault::SourceUnheard => self.hosts[source.at].mute(false),
            Fault::DestinationUnheard => self.hosts[destination.at].mute(false),
            Fault::ArbiterSilent => self.arbiter.as_ref().unwrap().signal(libc::SIGCONT),
            Fault::ArbiterAway => self.arbiter.as_mut().unwrap().restart(),
            Fault::ArbiterFull | Fault::ArbiterFullRestarted => self.free_arbiter(),
            _ => {}
        }
    }

    /// Waits until it is decided; then exactly one copy is left, its client goes on, and nobody else is believed.
    fn settle(
        &mut self,
        mut source: Instance,
        mut destination: Instance,
        began: Instant,
        id: u64,
        fault: Option<Fault>,
    ) -> (Outcome, Vec<String>) {
        let mut killed = fault.filter(|f| matches!(f, Fault::KillSource | Fault::KillDestination));
        let mut last = (Stand::Busy, Stand::Busy);
        let mut watches = None;
        let survivor = loop {
            last.0 = stand(&mut source.vmm, Some(id));
            // A question costs memory: who has none may die of it, just when it has the VM.
            let decided = matches!(last.0, Stand::Running | Stand::Dead | Stand::Unknown | Stand::Watching);
            if fault == Some(Fault::OutOfMemory) && decided {
                starve(&mut destination, false);
            }
            let unasked = fault == Some(Fault::OutOfMemory) && !decided && destination.vmm.is_alive();
            last.1 = if unasked { Stand::Busy } else { stand(&mut destination.vmm, None) };
            match last {
                (Stand::Running, Stand::Running) => panic!("two run: {}", source.vmm.port(id)),
                (Stand::Running, Stand::Waiting | Stand::Dead) => break Survivor::Source,
                (Stand::Dead, Stand::Running) => break Survivor::Destination,
                (Stand::Unknown, Stand::Running | Stand::Waiting | Stand::Dead) => break Survivor::Unknown,
                (Stand::Dead, Stand::Waiting | Stand::Dead) => break Survivor::Nobody,
                (Stand::Watching, Stand::Dead) if in_vain(&mut watches, &mut source) => break Survivor::Nobody,
                _ => {}
            }
            let status = || source.vmm.try_api("GET", &format!("/v1/migrations/{id}"), None);
            assert!(
                began.elapsed() < PATIENCE,
                "not decided: {last:?} {:?} {:?} {:?}",
                status(),
                source.points.trace(),
                destination.points.trace()
            );
            std::thread::sleep(Duration::from_millis(1));
        };
        let outcome = Outcome { survivor, after: began.elapsed() };
        if last.1 == Stand::Dead && killed.is_none() {
            assert_eq!(fault, Some(Fault::OutOfMemory), "the destination died by itself");
            killed = Some(Fault::KillDestination);
        }
        if last.0 == Stand::Dead && killed != Some(Fault::KillSource) {
            assert!(source.vmm.wait().success(), "the source died by itself");
        }
        if fault == Some(Fault::OutOfMemory) && !self.told {
            let (passed, log) = (destination.points.trace(), std::fs::read_to_string(&destination.log));
            assert_ne!(survivor, Survivor::Nobody, "without memory it took the VM and died: {passed:?} {log:?}");
        }
        self.judge(survivor, killed, &source, &destination);
        let trace = [source.points.trace(), destination.points.trace()].concat();
        self.here = match survivor {
            Survivor::Source => Some(source),
            Survivor::Destination => Some(destination),
            Survivor::Nobody => None,
            Survivor::Unknown => {
                // The operator looks at the other host.
                let here = last.1 != Stand::Running;
                source.vmm.api("PUT", &format!("/v1/migrations/{id}/resolve"), Some(&format!("{{\"here\":{here}}}")));
                let chosen = if here { &source } else { &destination };
                eventually("it runs where the operator says", || (chosen.vmm.state() == "running").then_some(()));
                if here {
                    eventually("the port is over", || (source.vmm.port(id)["state"] == "failed").then_some(()));
                } else {
                    assert!(source.vmm.wait().success());
                }
                Some(if here { source } else { destination })
            }
        };
        self.goes_on();
        (outcome, trace)
    }

    /// Whether the right copy is left.
    fn judge(&self, survivor: Survivor, killed: Option<Fault>, source: &Instance, destination: &Instance) {
        let text = || format!("{survivor:?}: {:?} {:?}", source.points.trace(), destination.points.trace());
        assert!(survivor != Survivor::Unknown || self.ownership == Ownership::Stream, "{}", text());
        match killed {
            // Nobody is there whom it could have been but the destination, if it was told that it may.
            Some(Fault::KillSource) => {
                let told = destination.points.passed("destination receive COMMIT");
                let fails = destination.points.passed("destination send ABORTED");
                let expected = if told && !fails { Survivor::Destination } else { Survivor::Nobody };
                assert_eq!(survivor, expected, "{}", text());
            }
            Some(_) => {
                let ran = destination.points.passed("destination do Run");
                let told = source.points.passed("source receive RUNNING");
                let expected: &[Survivor] = match self.ownership {
                    Ownership::Arbiter => {
                        let record = self.arbiter.as_ref().unwrap().record(VM_ID);
                        let ours = Some(record.owner) == self.source_owner;
                        if ours { &[Survivor::Source] } else { &[Survivor::Nobody] }
                    }
                    Ownership::Stream if told => &[Survivor::Nobody],
                    Ownership::Stream if ran => &[Survivor::Unknown],
                    Ownership::Stream if source.points.passed("source do SendCommit") => {
                        &[Survivor::Unknown, Survivor::Source]
                    }
                    Ownership::Stream => &[Survivor::Source],
                };
                assert!(expected.contains(&survivor), "{}", text());
            }
            // Both are there: the VM is, too.
            None => assert_ne!(survivor, Survivor::Nobody, "{}", text()),
        }
    }

    /// The client's connection is the same and has lost nothing; the D-module believes the running copy and no former one.
    fn goes_on(&mut self) {
        let Some(here) = &self.here else { return };
        let echo = self.echo.as_mut().unwrap();
        for _ in 0..3 {
            echo.turn();
        }
        let Some(arbiter) = &self.arbiter else { return };
        let epoch = here.vmm.api("GET", "/v1/vm", None)["epoch"].as_u64().unwrap();
        let owner = owner(&here.vmm).unwrap();
        if epoch == 0 {
            return;
        }
        // As the CF client in the guest does: a D-module that was killed may have to be told.
        assert_eq!(arbiter.hello(VM_ID, epoch, owner), Ok(epoch));
        let record = arbiter.record(VM_ID);
        assert_eq!((record.epoch.0, record.owner), (epoch, owner), "the record is the running copy's");
        if epoch > 1 {
            assert_eq!(arbiter.hello(VM_ID, epoch - 1, owner), Err(epoch), "a stale epoch");
        }
    }
}
