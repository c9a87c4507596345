//! What is seen of one port from outside: silence for a client, retransmits and their causes.
use super::ms;
use super::ours::Around;
use super::record::Gap;
use crate::lab::Host;
use crate::modules::NFS;
use crate::probe::Prober;
use crate::tcp;
use anyhow::{Context, Result};
use std::time::{Duration, Instant};

const MIB: f64 = 1_048_576.0;
const PAGE: f64 = 4096.0;
/// How long after a port what is sent again is counted as its doing; what comes later is so where a last frame was lost (200 ms).
pub(super) const AT_ONCE: Duration = Duration::from_millis(20);
/// A guest keeps its clients' windows closed for no longer than this before its pause.
const LULL_MAX: Duration = Duration::from_millis(10);
/// A port with a longer blackout is remarked upon.
const REMARKABLE_BLACKOUT: Duration = Duration::from_millis(3);
/// And so is one that takes longer.
const REMARKABLE_PORT: Duration = Duration::from_millis(400);

/// Figures of a series of ports; times in milliseconds, one of each a port.
#[derive(Default)]
pub struct Seen {
    /// As the VMMs measure it.
    pub blackout: Vec<f64>,
    /// The same by the kernel's record, where there is one.
    pub recorded: Vec<f64>,
    /// Longest silence for a client during the port.
    pub silence: Vec<f64>,
    /// The same, for as long, before it.
    pub quiet: Vec<f64>,
    /// From the request to the end of the port.
    pub whole: Vec<f64>,
    /// Of that, what the arbiter took to make the heir durable, where the side that ports tells it.
    pub heir: Vec<f64>,
    /// What was sent, in MiB.
    pub sent: Vec<f64>,
    /// What had no content and was not sent, in MiB: in receive buffers, and free.
    pub skipped: [Vec<f64>; 2],
    /// Segments the client's connections sent again around the port, and in the pause before it.
    pub retransmits: Vec<f64>,
    /// Those of them until shortly after the port's end ([`AT_ONCE`]): what a silence causes, or a lost frame with others behind it.
    pub retransmits_at_once: Vec<f64>,
    /// See `retransmits`.
    pub retransmits_before: Vec<f64>,
    /// By the kernel's record, where there is one: those from the lull before the pause until [`AT_ONCE`] behind it.
    pub retransmits_of_pause: Vec<f64>,
    /// Tail loss probes, before and during.
    pub probes: Vec<f64>,
    /// How the guest's lull before the pause went, where it was asked for one.
    pub lulls: Vec<Lull>,
    /// The steps of each blackout by name, where the side that ports tells them.
    pub steps: Vec<Vec<(String, f64)>>,
    /// The prober's questions that were never answered.
    pub failed: f64,
}

/// A guest's lull before its pause.
#[derive(Clone, Copy, Debug)]
pub struct Lull {
    /// It came to one in time.
    pub answered: bool,
    /// How long it was waited for, in milliseconds.
    pub waited: f64,
}

impl Lull {
    /// From a port's job.
    pub fn of(report: &serde_json::Value) -> Option<Lull> {
        Some(Lull { answered: report["answered"].as_bool()?, waited: report["waited_us"].as_f64()? / 1e3 })
    }
}

/// One port, as its driver tells it.
pub struct Told {
    /// When it was asked for, and when its end was seen.
    pub asked: Instant,
    /// See `asked`.
    pub ended: Instant,
    /// As the VMMs measure it.
    pub blackout: Duration,
    /// The same by the kernel's record, where there is one.
    pub recorded: Option<Gap>,
    /// Bytes sent.
    pub sent: u64,
    /// Pages that were due, had no content and were not sent: in receive buffers, and free.
    pub skipped: [u64; 2],
    /// The steps of the blackout in milliseconds.
    pub steps: Vec<(String, f64)>,
    /// How the guest's lull went, if it was asked for one.
    pub lull: Option<Lull>,
    /// How long the naming of the heir took, in milliseconds.
    pub heir: Option<f64>,
    /// For the message about a remarkable port.
    pub remark: String,
}

impl Told {
    /// What began then and is over, and ported nothing.
    pub fn nothing(asked: Instant) -> Told {
        Told {
            asked,
            ended: Instant::now(),
            blackout: Duration::ZERO,
            recorded: None,
            sent: 0,
            skipped: [0; 2],
            steps: Vec::new(),
            lull: None,
            heir: None,
            remark: String::new(),
        }
    }
}

impl Seen {
    /// Watches the N-module from `client` for a pause before `port`, while it runs, and for a pause after it.
    pub fn watch(&mut self, client: &Host, around: Around, port: impl FnOnce() -> Result<Told>) -> Result<()> {
        let Around { pause, record } = around;
        let prober = Prober::start(client, NFS.into())?;
        let (retransmits, causes) = (tcp::retransmits_to(client, *NFS.ip())?, tcp::causes(client)?);
        let began = Instant::now();
        std::thread::sleep(pause);
        let so_far = tcp::retransmits_to(client, *NFS.ip())?;
        let told = port()?;
        std::thread::sleep(AT_ONCE.min(pause));
        let at_once = tcp::retransmits_to(client, *NFS.ip())?.saturating_sub(so_far);
        std::thread::sleep(pause.saturating_sub(AT_ONCE));
        let resent = tcp::retransmits_to(client, *NFS.ip())?.saturating_sub(so_far);
        if let (Some(record), Some(gap)) = (record, told.recorded) {
            self.retransmits_of_pause.push(record.resent(*NFS.ip(), gap, LULL_MAX, AT_ONCE)? as f64);
        }
        let now = tcp::causes(client)?;
        let probes = now.loss_probes - causes.loss_probes;
        let log = prober.finish()?;
        let silence = log.longest_silence(told.asked, told.ended).context("the prober got no replies")?;
        let whole = told.ended - told.asked;
        if resent > 0 || told.blackout > REMARKABLE_BLACKOUT || whole > REMARKABLE_PORT {
            let (fast, timeouts) = (now.fast - causes.fast, now.timeouts - causes.timeouts);
            eprintln!(
                "\n{resent} segments sent again, {probes} loss probes, {fast} fast retransmits, {timeouts} timeouts; \
                 port {:.0} ms, blackout {:.2} ms, silence {:.2} ms; {}",
                ms(whole),
                ms(told.blackout),
                ms(silence),
                told.remark,
            );
        }
        // As long before the port as the port took, as far as the prober goes back.
        let quiet_from = told.asked.checked_sub(whole).unwrap_or(began).max(began);
        self.quiet.push(log.longest_silence(quiet_from, told.asked).map_or(0.0, ms));
        self.blackout.push(ms(told.blackout));
        self.recorded.extend(told.recorded.map(|gap| ms(gap.length())));
        self.steps.push(told.steps);
        self.lulls.extend(told.lull);
        self.heir.extend(told.heir);
        self.sent.push(told.sent as f64 / MIB);
        for (all, pages) in self.skipped.iter_mut().zip(told.skipped) {
            all.push(pages as f64 * PAGE / MIB);
        }
        self.silence.push(ms(silence));
        self.whole.push(ms(whole));
        self.retransmits.push(resent as f64);
        self.retransmits_at_once.push(at_once as f64);
        self.retransmits_before.push(so_far.saturating_sub(retransmits) as f64);
        self.probes.push(probes as f64);
        self.failed += log.unanswered() as f64;
        Ok(())
    }
}
