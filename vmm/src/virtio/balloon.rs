//! virtio-balloon (virtio 1.2, section 5.5): the guest gives memory back.
//!
//! Owns the balloon's target and what the guest says of its memory. Pages come back in two ways: put into the balloon because
//! the target asks for it, and reported because the guest does not use them at present (VIRTIO_BALLOON_F_REPORTING). Both
//! are given to the host at once ([`Memory::discard`]) and cost it memory again when the guest writes them.
//!
//! Always true: a request names at most [`PFNS_MAX`] pages; pages outside memory are counted and passed over, for a guest
//! can only harm itself by what it gives away; what the guest says of itself (`actual`, statistics) is told to people and
//! decides nothing. The one statistics buffer the device holds is put back when it is quiesced.
//!
//! Which queue is which: the standard numbers queues by what there could be, Linux up to now by what there is. No page
//! hinting is offered, so both agree but for the reporting queue: 3 or 4, or 2 if the driver takes no statistics. All three are
//! served as what the features accepted make of them.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::queue::{Chain, QueueError, read_front, total};
use super::timer::Timer;
use super::{Device, DeviceState, Progress, Work};
use crate::config::BalloonConfig;
use crate::error::{Error, Result};
use crate::memory::{GuestRange, Memory};
use crate::metrics::Exposition;
use crate::stats::Counter;
pub use statistics::Statistics;

mod statistics;

/// Most page numbers in one request; Linux sends 256.
pub const PFNS_MAX: usize = 4096;
/// Page size of the protocol, whatever the guest's is.
pub const BALLOON_PAGE: u64 = 4096;

const KIND: u32 = 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const LAST: usize = 4;
const QUEUE_SIZE: u16 = 128;
/// Pieces of memory given back in one call, about: a call ends with the request that exceeds it.
const BUDGET: usize = 256;

/// Feature bits.
pub(crate) mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// State that moves with the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that are to be in the balloon.
    pub target: u32,
    /// Pages that are, as the driver says.
    pub actual: u32,
}

/// What is known of a balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BalloonInfo {
    /// Bytes that are to be in the balloon.
    pub target: u64,
    /// Bytes that are, as the guest says.
    pub actual: u64,
    /// Bytes given back by way of the balloon since the start, each time anew.
    pub inflated: u64,
    /// Bytes reported as unused since the start, each time anew.
    pub reported: u64,
    /// What the guest last said of its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistics: Option<Statistics>,
}

#[derive(Debug, Default)]
struct BalloonStats {
    inflated: Counter,
    deflated: Counter,
    reported: Counter,
    errors: Counter,
}

/// A balloon.
pub struct Balloon {
    id: String,
    offered: u64,
    accepted: u64,
    target: u32,
    target_changed: bool,
    actual: u32,
    /// The statistics buffer, given back when new statistics are wanted.
    held: Option<u16>,
    statistics: Option<Statistics>,
    statistics_wanted: bool,
    timer: Option<Timer>,
    stats: BalloonStats,
    /// Page numbers of one request.
    pfns: Vec<u32>,
}

impl Balloon {
    /// A balloon called `id`.
    pub fn new(id: &str, config: &BalloonConfig) -> Result<Balloon> {
        let mut offered = feature::STATS_VQ;
        if config.deflate_on_oom {
            offered |= feature::DEFLATE_ON_OOM;
        }
        if config.reporting {
            offered |= feature::REPORTING;
        }
        let timer = match config.stats_seconds {
            0 => None,
            seconds => {
                let timer = Timer::new()?;
                timer.every(Duration::from_secs(seconds.into()))?;
                Some(timer)
            }
        };
        Ok(Balloon {
            id: id.to_owned(),
            offered,
            accepted: 0,
            target: pages(config.target.bytes()),
            target_changed: false,
            actual: 0,
            held: None,
            statistics: None,
            statistics_wanted: false,
            timer,
            stats: BalloonStats::default(),
            pfns: Vec::new(),
        })
    }

    /// Sets how many bytes are to be in the balloon, in whole pages. The driver is told when
    /// the device is next processed.
    pub fn set_target(&mut self, bytes: u64) {
        self.target = pages(bytes);
        self.target_changed = true;
    }

    /// Asks the guest for new statistics; they come when it finds the time. The device is to be processed.
    pub fn ask_for_statistics(&mut self) {
        self.statistics_wanted = true;
    }

    /// What is known.
    pub fn info(&self) -> BalloonInfo {
        BalloonInfo {
            target: u64::from(self.target) * BALLOON_PAGE,
            actual: u64::from(self.actual) * BALLOON_PAGE,
            inflated: self.stats.inflated.get(),
            reported: self.stats.reported.get(),
            statistics: self.statistics,
        }
    }

    /// Reads the page numbers of a request, sorted, each once.
    fn read_pfns(&mut self, chain: &mut Chain, memory: &Memory) -> std::result::Result<(), QueueError> {
        let bytes = usize::try_from(total(&chain.readable)).unwrap_or(usize::MAX);
        if !bytes.is_multiple_of(4) || bytes > 4 * PFNS_MAX {
            return Err(QueueError(format!("page numbers of {bytes} bytes, at most {PFNS_MAX}")));
        }
        let mut raw = vec![0; bytes];
        if !read_front(memory, &mut chain.readable, &mut raw) {
            return Err(QueueError("page numbers cannot be read".into()));
        }
        self.pfns.clear();
        self.pfns.extend(raw.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)));
        self.pfns.sort_unstable();
        self.pfns.dedup();
        Ok(())
    }

    /// Gives the pages of one request back; returns how many pieces they made.
    fn inflate(&mut self, chain: &mut Chain, memory: &Memory) -> std::result::Result<usize, QueueError> {
        self.read_pfns(chain, memory)?;
        let runs = self.pfns.chunk_by(|a, b| a.checked_add(1) == Some(*b));
        let mut pieces = 0;
        for run in runs {
            pieces += 1;
            let first = run.first().map_or(0, |pfn| u64::from(*pfn) * BALLOON_PAGE);
            // At most PFNS_MAX pages: fits.
            let range = memory.range(vm_memory::GuestAddress(first), run.len() as u32 * BALLOON_PAGE as u32);
            self.stats.inflated.add(self.discard(range, memory));
        }
        Ok(pieces)
    }

    /// Gives one piece of memory back; returns the bytes.
    fn discard(&self, range: Option<GuestRange>, memory: &Memory) -> u64 {
        let result = match range {
            Some(range) => memory.discard(range),
            None => Err(std::io::Error::from_raw_os_error(libc::EFAULT)),
        };
        result.unwrap_or_else(|e| {
            self.stats.errors.inc();
            log::debug!("{}: {range:?} not given back: {e}", self.id);
            0
        })
    }

    fn serve_inflate(&mut self, work: &mut Work<'_>, budget: &mut usize) -> std::result::Result<(), QueueError> {
        loop {
            while *budget > 0
                && let Some(mut chain) = work.queues[INFLATE].pop(work.memory)?
            {
                let pieces = self.inflate(&mut chain, work.memory)?;
                *budget = budget.saturating_sub(pieces.max(1));
                work.queues[INFLATE].push(work.memory, chain.head, 0)?;
            }
            if *budget == 0 || !work.queues[INFLATE].arm(work.memory)? {
                return Ok(());
            }
        }
    }

    /// Pages the guest takes out are its own again; the host gives them memory when they are written.
    fn serve_deflate(&mut self, work: &mut Work<'_>, budget: &mut usize) -> std::result::Result<(), QueueError> {
        loop {
            while *budget > 0
                && let Some(chain) = work.queues[DEFLATE].pop(work.memory)?
            {
                *budget -= 1;
                self.stats.deflated.add(total(&chain.readable) / 4 * BALLOON_PAGE);
                work.queues[DEFLATE].push(work.memory, chain.head, 0)?;
            }
            if *budget == 0 || !work.queues[DEFLATE].arm(work.memory)? {
                return Ok(());
            }
        }
    }

    fn serve_reports(
        &mut self,
        index: usize,
        work: &mut Work<'_>,
        budget: &mut usize,
    ) -> std::result::Result<(), QueueError> {
        loop {
            while *budget > 0
                && let Some(chain) = work.queues[index].pop(work.memory)?
            {
                *budget = budget.saturating_sub(chain.writable.len().max(1));
                for range in &chain.writable {
                    self.stats.reported.add(self.discard(Some(*range), work.memory));
                }
                work.queues[index].push(work.memory, chain.head, 0)?;
            }
            if *budget == 0 || !work.queues[index].arm(work.memory)? {
                return Ok(());
            }
        }
    }

    /// The driver hands over a buffer with statistics and gets it back when new ones are wanted: there is only ever one.
    fn serve_statistics(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        if let Some(head) = self.held.take_if(|_| std::mem::take(&mut self.statistics_wanted)) {
            work.queues[STATS].push(work.memory, head, 0)?;
        }
        if self.held.is_none() {
            let mut chain = work.queues[STATS].pop(work.memory)?;
            if chain.is_none() && work.queues[STATS].arm(work.memory)? {
                chain = work.queues[STATS].pop(work.memory)?;
            }
            if let Some(mut chain) = chain {
                self.statistics = Some(Statistics::read(work.memory, &mut chain.readable));
                self.held = Some(chain.head);
            }
        }
        Ok(())
    }
}

/// Whole pages of so many bytes.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / BALLOON_PAGE).unwrap_or(u32::MAX)
}

impl Device for Balloon {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; LAST + 1]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 16];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..8].copy_from_slice(&self.actual.to_le_bytes());
        super::read_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.accepted = features;
        Ok(())
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.actual = 0;
        self.held = None;
        self.statistics = None;
        self.statistics_wanted = false;
    }

    fn event(&mut self) {
        if self.timer.as_ref().is_some_and(Timer::expired) {
            self.statistics_wanted = true;
        }
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let mut budget = BUDGET;
        self.serve_deflate(work, &mut budget)?;
        self.serve_inflate(work, &mut budget)?;
        let first_report = match self.accepted & feature::STATS_VQ {
            0 => STATS,
            _ => {
                self.serve_statistics(work)?;
                STATS + 1
            }
        };
        if self.accepted & feature::REPORTING != 0 {
            for index in first_report..=LAST {
                self.serve_reports(index, work, &mut budget)?;
            }
        }
        Ok(if budget == 0 { Progress::More } else { Progress::Done })
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.timer.iter().map(AsRawFd::as_raw_fd).collect()
    }

    fn stop_input(&mut self) {}

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        if self.held.take().is_some() {
            work.queues[STATS].unpop(1);
        }
        Ok(())
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState { target: self.target, actual: self.actual })
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<()> {
        let DeviceState::Balloon(state) = state else {
            return Err(Error::State(format!("{}: not the state of a balloon", self.id)));
        };
        self.target = state.target;
        self.actual = state.actual;
        self.activate(features)
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.target_changed)
    }

    fn metrics(&self, out: &mut Exposition) {
        let (s, info, labels) = (&self.stats, self.info(), &[("device", self.id.as_str())]);
        for (name, help, counter) in [
            ("vmm_balloon_inflated_bytes_total", "Bytes given back by way of the balloon.", &s.inflated),
            ("vmm_balloon_deflated_bytes_total", "Bytes taken out of the balloon.", &s.deflated),
            ("vmm_balloon_reported_bytes_total", "Bytes reported as unused and given back.", &s.reported),
            ("vmm_balloon_errors_total", "Pieces of memory that could not be given back.", &s.errors),
        ] {
            out.counter(name, help, labels, counter);
        }
        out.gauge("vmm_balloon_target_bytes", "Bytes that are to be in the balloon.", labels, info.target as f64);
        out.gauge("vmm_balloon_actual_bytes", "Bytes in the balloon, as the guest says.", labels, info.actual as f64);
        if let Some(statistics) = &self.statistics {
            statistics.metrics(labels, out);
        }
    }

    fn as_balloon(&mut self) -> Option<&mut Balloon> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
