//! A failure at every point of a port: real processes on real cables, with the D-module's server as the arbiter and without one.
//!
//! `--port-faults` holds a `vmm` at a point; there a process is killed or stopped, a cable pulled, and so on. The points are those
//! the code says there are (`vmm::port::faults::points`), as far as ports come to them. What is left each time is in
//! docs/failure-matrix.md, which is written from what these tests found and held against what they find.
//! Faults that only pass when something times out are ignored here: `cargo xtask test failures` has them too.
#![allow(clippy::unwrap_used)]

mod disk;
mod dmodule;
mod document;
mod heirs;
mod hold;
mod network;
#[path = "../port_support/mod.rs"]
mod port_support;
mod stand;
mod world;

use std::collections::BTreeSet;

use document::Cell;
use world::{Survivor, World};

/// Attempts to come to a point: some are only there when frames come at the right time.
const ATTEMPTS: usize = 5;
/// Attempts at a port that nothing disturbs, not even a busy machine.
const UNDISTURBED_ATTEMPTS: usize = 20;

/// Which end of a connection hears of its end, and whether before a limit, is a race, on a busy machine the guest may be too fast
/// once, and since its clients are silent in the pause hardly a frame comes then: these may not be there again. They are no points of a course of
/// their own.
const SELDOM: [&str; 7] = [
    "source send FRAMES",
    "destination receive FRAMES",
    "source on Disconnected",
    "source on Timeout",
    "source do Throttle",
    "destination on Disconnected",
    "destination on Timeout",
];

/// Where a port may go on in two ways, and both are right: one that came by the first point need not come to the others.
///
/// Whoever of the two has waited long enough for late frames ends the connection. In everyday life that is the source, after 500 ms
/// ([`vmm::port::source::LINGER`]), with DONE; the destination would wait for 3 s. Where a fault lasts, the destination's limit is divided
/// by ten (the source's is none: it waits for nobody), and it is the other way round, unless a frame that was late or a machine that is busy has put the
/// destination's limit off. Likewise what a destination says that cannot load the state may come just behind the source's limit.
///
/// What counts is what the port that missed a point passed instead, and not how often a point is found: however seldom the other way is
/// taken, a column does not fail for it, and a point that every port comes to is waited for as before.
const FORKS: [(&str, &[&str]); 3] = [
    (
        "destination on Timeout",
        &["source on LingerOver", "source do Finish", "source send DONE", "destination receive DONE"],
    ),
    ("source on LingerOver", &["destination on Timeout", "source on Disconnected", "source do Close"]),
    ("source on Timeout", &["source receive ABORTED"]),
];

/// Whether a port that passed these points may have missed this one although nothing was wrong with it.
fn may_miss(point: &str, trace: &[String]) -> bool {
    let passed = |by: &str| trace.iter().any(|p| p == by);
    SELDOM.contains(&point) || FORKS.iter().any(|(by, missed)| missed.contains(&point) && passed(by))
}

/// Whether a column may lack this point where the document's has it, or have it where the document's lacks it.
fn is_optional(point: &str) -> bool {
    SELDOM.contains(&point) || FORKS.iter().any(|(_, missed)| missed.contains(&point))
}

/// Points of the destination at which a source that is killed may have sent COMMIT already, or not.
const AHEAD: [&str; 3] = ["destination receive PAUSING", "destination do Spin", "destination receive STATE"];
/// Points at which a killed destination may have gone one step further or not, or the source have heard of it.
const RACING: [&str; 9] = [
    "source send FRAMES",
    "source send SWITCHED",
    "source receive LOADED",
    "source do SendCommit",
    "source send COMMIT",
    "destination receive FRAMES",
    "destination receive SWITCHED",
    "destination on Opened",
    "destination send OPENED",
];

/// Where a destination that has won has not said yet that it gives the VM back.
const MUTE: &str = "destination send ABORTED";

/// Who decides who runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ownership {
    Arbiter,
    Stream,
}

/// What a port does apart from the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// It takes place.
    Straight,
    /// The operator cancels it in the first round.
    Cancelled,
    /// The destination cannot make the VM.
    Refused,
    /// The destination cannot load the state, and gives the VM back that it has won where there is an arbiter.
    GivenBack,
    /// The source has sent COMMIT, and the destination fails before it has read it: it neither competes nor runs. With an arbiter only.
    /// It has no rows: there is no point that is on this course alone.
    Declined,
}

impl Course {
    /// Those with rows.
    const ALL: [Course; 4] = [Course::Straight, Course::Cancelled, Course::Refused, Course::GivenBack];

    /// Where the VM is left when nothing else happens.
    fn end(self) -> Survivor {
        if self == Course::Straight { Survivor::Destination } else { Survivor::Source }
    }

    /// The step that fails on this course.
    fn fails(self) -> Option<&'static str> {
        match self {
            Course::Straight | Course::Cancelled => None,
            Course::Refused => Some("destination do Prepare"),
            Course::GivenBack => Some("destination do Load"),
            Course::Declined => Some("destination do Spin"),
        }
    }
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KillSource,
    KillDestination,
    Cancel,
    StepFails,
    OutOfMemory,
    /// Nothing more can be written where the destination has its log, its console and its sockets.
    DestinationFull,
    ArbiterRestarted,
    StopSource,
    StopDestination,
    PullSource,
    PullDestination,
    SourceUnheard,
    DestinationUnheard,
    ArbiterSilent,
    /// The same where the arbiter has its disk.
    ArbiterFull,
    /// The same from the moment on at which the heir is named, if the port comes there, and the arbiter is killed and started again at
    /// the point.
    ArbiterFullRestarted,
    /// Killed, and started again when all have asked it in vain. It has no column: of what it changes a test of its own tells more.
    ArbiterAway,
}

impl Fault {
    const ALL: [Fault; 16] = [
        Fault::KillSource,
        Fault::KillDestination,
        Fault::Cancel,
        Fault::StepFails,
        Fault::OutOfMemory,
        Fault::DestinationFull,
        Fault::ArbiterRestarted,
        Fault::StopSource,
        Fault::StopDestination,
        Fault::PullSource,
        Fault::PullDestination,
        Fault::SourceUnheard,
        Fault::DestinationUnheard,
        Fault::ArbiterSilent,
        Fault::ArbiterFull,
        Fault::ArbiterFullRestarted,
    ];

    fn name(self) -> &'static str {
        match self {
            Fault::KillSource => "source killed",
            Fault::KillDestination => "destination killed",
            Fault::Cancel => "cancelled",
            Fault::StepFails => "step fails",
            Fault::OutOfMemory => "destination out of memory",
            Fault::DestinationFull => "destination's disk full",
            Fault::ArbiterRestarted => "arbiter killed, restarted",
            Fault::StopSource => "source stopped",
            Fault::StopDestination => "destination stopped",
            Fault::PullSource => "source's cable pulled",
            Fault::PullDestination => "destination's cable pulled",
            Fault::SourceUnheard => "source not heard",
            Fault::DestinationUnheard => "destination not heard",
            Fault::ArbiterSilent => "arbiter silent",
            Fault::ArbiterFull => "arbiter's disk full",
            Fault::ArbiterFullRestarted => "arbiter's disk full, and restarted",
            Fault::ArbiterAway => "arbiter away",
        }
    }

    /// It ends only after everything that waits for the other side has given up.
    fn lasts(self) -> bool {
        matches!(
            self,
            Fault::StopSource
                | Fault::StopDestination
                | Fault::PullSource
                | Fault::PullDestination
                | Fault::SourceUnheard
                | Fault::DestinationUnheard
                | Fault::ArbiterSilent
                | Fault::ArbiterFull
                | Fault::ArbiterFullRestarted
                | Fault::ArbiterAway
        )
    }

    /// A disk gets full: the outcome is settled, and there is more to be seen of it.
    fn fills(self) -> bool {
        matches!(self, Fault::DestinationFull | Fault::ArbiterFull | Fault::ArbiterFullRestarted)
    }

    /// Whether it settles by itself which copy is left. Else that is a race of the fault with the port: any is right
    /// that [`World`] finds right.
    fn decides(self, point: &str) -> bool {
        match self {
            Fault::Cancel | Fault::OutOfMemory => false,
            // The destination goes on, or its end is heard of, while the source is held.
            Fault::KillDestination => !RACING.contains(&point),
            // With an arbiter the source goes on to COMMIT while the destination is held, or is killed before.
            Fault::KillSource => !AHEAD.contains(&point),
            _ => true,
        }
    }

    /// Whether it means something at this point.
    fn fits(self, point: &str) -> bool {
        self != Fault::StepFails || point.contains(" do ")
    }
}

/// One fault at every point.
fn column(ownership: Ownership, fault: Fault) {
    let mut world = World::new(ownership, fault);
    let mut known = BTreeSet::new();
    let mut rows = Vec::new();
    for course in Course::ALL {
        // On a busy machine a limit may pass without a fault: that is another course.
        let undisturbed = (0..UNDISTURBED_ATTEMPTS).find_map(|_| {
            let (outcome, trace) = world.port(course, None);
            let late = trace.iter().any(|p| p == "source on Timeout");
            (outcome?.survivor == course.end() && !late).then_some(trace)
        });
        let trace = undisturbed.unwrap_or_else(|| panic!("{course:?}: the port does not end as it should"));
        let seldom = |point: &String| course != Course::Straight && SELDOM.contains(&point.as_str());
        let new = trace.into_iter().filter(|point| !seldom(point) && known.insert(point.clone()));
        rows.extend(new.map(|point| (course, point)));
    }
    if ownership == Ownership::Arbiter {
        // Cancelled ports come there as well; but here the source has heard that it has lost, and hears no more of it while a cable is pulled.
        rows.push((Course::GivenBack, MUTE.into()));
    }
    rows.retain(|(_, point)| fault.fits(point));
    cells(&mut world, ownership, fault, &rows);
}

/// Fills cells, and holds them against the document.
fn cells(world: &mut World, ownership: Ownership, fault: Fault, rows: &[(Course, String)]) {
    let mut cells = Vec::new();
    for (course, point) in rows {
        for _ in 0..document::repeats(fault) {
            let mut excused = false;
            let outcome = (0..ATTEMPTS).find_map(|_| {
                let (outcome, trace) = world.port(*course, Some((point, fault)));
                excused |= outcome.is_none() && may_miss(point, &trace);
                outcome
            });
            let Some(outcome) = outcome else {
                assert!(excused, "no port came to {point} again");
                continue;
            };
            println!("{ownership:?} {fault:?} {course:?} {point}: {outcome:?}");
            cells.push(Cell { course: *course, point: point.clone(), outcome });
        }
    }
    document::hold(ownership, fault, &cells);
}

/// Some cells of a column that as a whole takes too long for every day.
fn sample(fault: Fault, points: &[&str]) {
    let mut world = World::new(Ownership::Arbiter, fault);
    let rows: Vec<_> = points.iter().map(|point| (Course::Straight, (*point).to_owned())).collect();
    cells(&mut world, Ownership::Arbiter, fault, &rows);
}

macro_rules! columns {
    ($($(#[$attribute:meta])* $name:ident: $ownership:ident $fault:ident;)*) => {
        $(
            #[test]
            $(#[$attribute])*
            fn $name() {
                column(Ownership::$ownership, Fault::$fault);
            }
        )*
    };
}

columns! {
    arbiter_source_killed: Arbiter KillSource;
    arbiter_destination_killed: Arbiter KillDestination;
    arbiter_cancelled: Arbiter Cancel;
    arbiter_step_fails: Arbiter StepFails;
    arbiter_destination_out_of_memory: Arbiter OutOfMemory;
    arbiter_restarted: Arbiter ArbiterRestarted;
    stream_source_killed: Stream KillSource;
    stream_destination_killed: Stream KillDestination;
    stream_cancelled: Stream Cancel;
    stream_step_fails: Stream StepFails;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_destination_out_of_memory: Stream OutOfMemory;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_destination_full: Arbiter DestinationFull;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_full: Arbiter ArbiterFull;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_full_and_restarted: Arbiter ArbiterFullRestarted;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_destination_full: Stream DestinationFull;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_source_stopped: Arbiter StopSource;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_destination_stopped: Arbiter StopDestination;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_source_pulled: Arbiter PullSource;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_destination_pulled: Arbiter PullDestination;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_source_unheard: Arbiter SourceUnheard;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_destination_unheard: Arbiter DestinationUnheard;
    #[ignore = "lasts: cargo xtask test failures"]
    arbiter_silent: Arbiter ArbiterSilent;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_source_stopped: Stream StopSource;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_destination_stopped: Stream StopDestination;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_source_pulled: Stream PullSource;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_destination_pulled: Stream PullDestination;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_source_unheard: Stream SourceUnheard;
    #[ignore = "lasts: cargo xtask test failures"]
    stream_destination_unheard: Stream DestinationUnheard;
}

#[test]
fn sample_of_a_destination_whose_disk_is_full() {
    sample(Fault::DestinationFull, &["destination do Prepare", "destination do Load"]);
}

#[test]
fn sample_of_an_arbiter_whose_disk_is_full() {
    sample(Fault::ArbiterFull, &["source do StartDirtyLog", "destination do Compete"]);
}

#[test]
fn only_a_port_that_went_the_other_way_may_miss_a_point() {
    let all = vmm::port::faults::points();
    for (by, missed) in FORKS {
        for point in missed {
            assert!(all.iter().any(|p| p == point) && all.iter().any(|p| p == by), "{by}, {point}: no such point");
            assert!(may_miss(point, &[by.to_owned()]));
            assert_eq!(may_miss(point, &[]), SELDOM.contains(point), "{point} came to nothing else");
        }
    }
    assert!(!may_miss("destination do Run", &all));
}

/// Before the heir's compare-and-swap, and behind it.
#[test]
fn sample_of_an_arbiter_whose_disk_is_full_and_that_is_restarted() {
    sample(Fault::ArbiterFullRestarted, &["destination do Compete", "destination do Run"]);
}

/// Restarted, the arbiter gives the next epoch to nobody but the heir, and its disk does not take that the heir will not have it:
/// the source has the VM as soon as there is room, and does not stand still for ever.
#[test]
fn a_destination_that_declines_is_heard_by_an_arbiter_whose_disk_was_full() {
    let mut world = World::new(Ownership::Arbiter, Fault::ArbiterFullRestarted);
    let (outcome, _) = world.port(Course::Declined, Some(("destination do Spin", Fault::ArbiterFullRestarted)));
    assert_eq!(outcome.map(|o| o.survivor), Some(Survivor::Source));
}

/// It was restarted, and could not be reached when the heir renounced: the heir says so again. The source would stand still for ever.
#[test]
fn a_destination_that_declines_is_heard_by_an_arbiter_that_was_away() {
    let mut world = World::new(Ownership::Arbiter, Fault::ArbiterAway);
    let (outcome, _) = world.port(Course::Declined, Some(("destination do Spin", Fault::ArbiterAway)));
    assert_eq!(outcome.map(|o| o.survivor), Some(Survivor::Source));
}

/// The destination has won, cannot load the state, and can tell nobody: the VM is the source's again all the same.
#[test]
fn a_destination_that_cannot_load_and_is_not_heard_gives_the_vm_back() {
    let mut world = World::new(Ownership::Arbiter, Fault::PullDestination);
    let (outcome, trace) = world.port(Course::GivenBack, Some((MUTE, Fault::PullDestination)));
    assert_eq!(outcome.map(|o| o.survivor), Some(Survivor::Source));
    let passed = |point: &str| trace.iter().any(|p| p == point);
    assert!(passed("source do Watch") && passed("source on Seen") && !passed("source receive ABORTED"), "{trace:?}");
}

/// The source cannot name the heir, and gives the port up while the guest runs.
#[test]
fn sample_of_an_arbiter_that_is_silent() {
    sample(Fault::ArbiterSilent, &["source do StartDirtyLog"]);
}

#[test]
fn the_document_has_every_point() {
    document::has_every_point();
}

#[test]
#[ignore = "writes docs/failure-matrix.md: cargo xtask test failures"]
fn the_document_is_written() {
    document::write();
}
