//! Points at which a test can hold a port, or let a step of it fail.
//!
//! Owns the connection to the test, if there is one, and the names of all edges of the protocol: each frame sent and received, each
//! action carried out, each event given to a machine. They are derived from the machines' own types: a new variant does not
//! compile without a name here. At a point the process says its name over a unix socket and waits for one byte:
//! [`GO_ON`] or [`FAIL`]. What a test does meanwhile (kill, stop, pull a cable) is its own business.
//!
//! It is in every build, so that what is tested is what is shipped; and off unless the command line of this very process says
//! `--port-faults`, which nobody inherits, and which can do nothing that whoever starts the process cannot. Always true: without that
//! nothing waits, and every limit is what its constant says. Survives: a test that goes away; the port goes on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use migration::message::{Reason, ReasonCode};
use migration::wire::FrameType;
use migration::{destination, source};

use crate::error::{Result, host};

/// The test's answer: the port goes on.
pub const GO_ON: u8 = b'.';
/// The test's answer: the step fails.
pub const FAIL: u8 = b'!';

/// For the tests of porting.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct PortFaults {
    /// Say at each point of a port over this unix socket where it is, and wait for the answer. For tests.
    #[arg(long, value_name = "SOCKET", hide = true)]
    pub port_faults: Option<PathBuf>,
    /// Divide the time limits of a port by this. For tests.
    #[arg(long, value_name = "N", hide = true)]
    pub port_hurry: Option<std::num::NonZeroU32>,
    /// Fill pages that a port has skipped with a pattern before the guest runs here. For tests.
    #[arg(long, hide = true)]
    pub poison_skipped: bool,
}

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Gives the VM away.
    Source,
    /// Takes it.
    Destination,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

struct Faults {
    test: Option<Mutex<UnixStream>>,
    hurry: u32,
    poison: bool,
}

static FAULTS: OnceLock<Faults> = OnceLock::new();

/// To be called once, before there are other threads.
pub fn set_up(options: &PortFaults) -> Result<()> {
    if *options == PortFaults::default() {
        return Ok(());
    }
    let hurry = options.port_hurry.map_or(1, std::num::NonZeroU32::get);
    let test = match &options.port_faults {
        Some(path) => {
            log::warn!("--port-faults: a test decides when and whether ports go on");
            Some(Mutex::new(UnixStream::connect(path).map_err(host("--port-faults"))?))
        }
        None => None,
    };
    let _ = FAULTS.set(Faults { test, hurry, poison: options.poison_skipped });
    Ok(())
}

/// A time limit of a port: as it is, unless a test wants it shorter.
pub fn limit(constant: Duration) -> Duration {
    FAULTS.get().map_or(constant, |f| constant / f.hurry)
}

/// Whether a test wants pages that were skipped to be poisoned.
pub(super) fn poisons_skipped() -> bool {
    FAULTS.get().is_some_and(|f| f.poison)
}

/// Names of all variants, and the name of one.
macro_rules! edges {
    ($all:ident, $name:ident: $module:ident::$type:ident { $($variant:ident)* } but { $($frame:ident)* }) => {
        const $all: &[&str] = &[$(stringify!($variant)),*];

        /// `None`: named by its frame.
        fn $name(edge: &$module::$type) -> Option<&'static str> {
            match edge {
                $($module::$type::$variant { .. } => Some(stringify!($variant)),)*
                $($module::$type::$frame { .. } => None,)*
            }
        }
    };
}

edges!(SOURCE_ACTIONS, source_action: source::Action {
    StartDirtyLog SendRound Throttle Measure Lull Pause Collect SendFinal SendCommit Compete Watch Resume Linger Finish Close TearDown
} but { Send });
edges!(SOURCE_EVENTS, source_event: source::Event {
    Connected Measured Lulled Paused Collected FinalNotSent Verdict ArbiterSilent Seen Failed Disconnected Broken Timeout Cancel
    Resolve LingerOver
} but { Message });
edges!(DESTINATION_ACTIONS, destination_action: destination::Action {
    Prepare RoundComplete Spin Load Compete Run GiveBack Destroy Close
} but { Send });
edges!(DESTINATION_EVENTS, destination_event: destination::Event {
    Prepared Loaded Failed Verdict ArbiterSilent Entered Opened Disconnected Broken Timeout Cancel
} but { Message Bulk });

/// Who sends frames of this type.
pub fn sender(frame_type: FrameType) -> Side {
    use FrameType as F;
    match frame_type {
        F::Hello | F::Describe | F::Pages | F::Round | F::Pausing | F::State | F::Commit => Side::Source,
        F::Frames | F::Cancel | F::Done | F::Switched => Side::Source,
        F::Welcome | F::Refuse | F::Ready | F::RoundDone | F::Loaded | F::Running | F::Aborted | F::Opened => {
            Side::Destination
        }
    }
}

fn receiver(frame_type: FrameType) -> Side {
    match sender(frame_type) {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    }
}

/// All points there are: `SIDE VERB NAME`, as a test is told them.
pub fn points() -> Vec<String> {
    let mut points = Vec::new();
    for (side, verb, names) in [
        (Side::Source, "do", SOURCE_ACTIONS),
        (Side::Source, "on", SOURCE_EVENTS),
        (Side::Destination, "do", DESTINATION_ACTIONS),
        (Side::Destination, "on", DESTINATION_EVENTS),
    ] {
        points.extend(names.iter().map(|name| format!("{} {verb} {name}", side.name())));
    }
    for frame_type in FrameType::ALL {
        points.push(format!("{} send {}", sender(frame_type).name(), frame_type.name()));
        points.push(format!("{} receive {}", receiver(frame_type).name(), frame_type.name()));
    }
    points
}

/// Before an action of the source is carried out.
pub fn source_does(action: &source::Action) -> Option<Reason> {
    at(Side::Source, "do", source_action(action)?)
}

/// Before an event is given to the source's machine.
pub fn source_hears(event: &source::Event) -> Option<Reason> {
    at(Side::Source, "on", source_event(event)?)
}

/// Before an action of the destination is carried out.
pub fn destination_does(action: &destination::Action) -> Option<Reason> {
    at(Side::Destination, "do", destination_action(action)?)
}

/// Before an event is given to the destination's machine.
pub fn destination_hears(event: &destination::Event) -> Option<Reason> {
    at(Side::Destination, "on", destination_event(event)?)
}

/// Before a frame is made, and so before any of it is sent.
pub fn sends(frame_type: FrameType) {
    at(sender(frame_type), "send", frame_type.name());
}

/// When a whole frame has come, before it means anything.
pub fn receives(frame_type: FrameType) {
    at(receiver(frame_type), "receive", frame_type.name());
}

/// Why the step is to fail, if the test wants that.
fn at(side: Side, verb: &str, name: &str) -> Option<Reason> {
    let test = FAULTS.get()?.test.as_ref()?;
    let mut test = test.lock().unwrap_or_else(PoisonError::into_inner);
    let mut answer = [GO_ON];
    let asked = test.write_all(format!("{} {verb} {name}\n", side.name()).as_bytes());
    if asked.and_then(|()| test.read_exact(&mut answer)).is_err() {
        log::debug!("the test that holds ports has gone");
    }
    (answer[0] == FAIL).then(|| Reason::new(ReasonCode::Internal, format!("a test lets {name} fail")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let mut points = points();
        let count = points.len();
        points.sort_unstable();
        points.dedup();
        assert_eq!(points.len(), count);
        assert_eq!(receiver(FrameType::Commit), Side::Destination);
    }

    #[test]
    fn nothing_waits_and_no_limit_is_shorter_unless_asked_for() {
        assert_eq!(limit(Duration::from_secs(3)), Duration::from_secs(3));
        sends(FrameType::Hello);
        assert_eq!(source_does(&source::Action::Pause), None);
    }
}
