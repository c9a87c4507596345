//! virtio-net (virtio 1.2, section 5.1) on a tap, with one or more queue pairs.
//!
//! Owns the tap and the frames between it and the guest. Always true: a frame taken from the tap is delivered in order,
//! or dropped and counted because it can never fit, or part of the saved state; a frame is taken only when the guest has
//! room for it, all others wait in the tap. Each queue of the tap is in order by itself, as the kernel keeps each flow in
//! one; frames injected in a port come before all of them. Receive buffers taken from a queue but not filled are put back when
//! the device is quiesced. Survives a tap that is deleted: the link goes down, the guest's frames are given back unsent.

mod control;
pub(crate) mod feature;
mod filter;
mod port;
mod posted;
mod rx;
mod settings;
pub mod tap;
mod tx;
mod vhost;

use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};

use super::queue::{QueueError, VirtQueue};
use super::{Device, DeviceState, Progress, Work};
use crate::boot::info::random;
use crate::config::{MacAddress, NetConfig};
use crate::error::{Error, Result};
use crate::limit::{LimiterState, Limits, Throttle};
use crate::memory::{GuestRange, Memory};
use crate::metrics::Exposition;
use crate::stats::Counter;
use feature::*;
use filter::Filter;
pub use port::is_announcement;
use rx::Receiver;
use tap::Tap;
use tx::{Sender, Sent};
use vhost::Vhost;

/// Size of `struct virtio_net_hdr_v1`, before every frame in both directions.
pub const HEADER_SIZE: usize = 12;
/// Longest frame with segmentation offload, with its header.
pub const FRAME_MAX: usize = HEADER_SIZE + 14 + 4 + 65_535;
/// Frames kept for the guest outside the tap: those injected in a port and the one that did not fit yet.
pub const PENDING_MAX: usize = 1024;

const KIND: u32 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Frames handled in one call in each direction of a queue pair, so that nobody holds the lock for long.
const BUDGET: usize = 256;
/// Bytes handled likewise: long frames are turned over to the other side while the next are copied, and what answers them is not
/// kept waiting by all the rest.
const BUDGET_BYTES: u64 = 64 << 10;
/// Bits of the status field.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// A frame with its virtio-net header before it.
pub type Frame = Vec<u8>;

/// State that moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// MAC of the guest's side: what it was made with, and what the guest has made of it.
    pub own_mac: [u8; 6],
    /// See there.
    pub mac: [u8; 6],
    /// MTU announced.
    pub mtu: u16,
    /// Queue pairs in use.
    pub active: u16,
    /// Receive offloads in use.
    pub offloads: u64,
    /// What the guest wants to receive.
    pub filter: Filter,
    /// Limits of receiving and sending.
    pub limits: [LimiterState; 2],
    /// Frames taken from the tap and not delivered yet.
    pub pending: Vec<Frame>,
}

/// Counters.
#[derive(Debug, Default)]
struct NetStats {
    rx_frames: Counter,
    rx_bytes: Counter,
    rx_dropped: Counter,
    tx_frames: Counter,
    tx_bytes: Counter,
    tx_errors: Counter,
    injected: Counter,
    commands: Counter,
    command_errors: Counter,
    taps_lost: Counter,
}

/// A queue pair, and the queue of the tap that goes with it.
#[derive(Debug)]
struct Pair {
    tap: Tap,
    receiver: Receiver,
    sender: Sender,
}

/// A network device.
pub struct Net {
    id: String,
    /// MAC after a reset, and now.
    own_mac: MacAddress,
    mac: MacAddress,
    mtu: u16,
    /// Features offered and accepted.
    offered: u64,
    accepted: u64,
    /// Receive and transmit in turn, then control.
    queue_sizes: Vec<u16>,
    pairs: Vec<Pair>,
    /// Queue pairs in use: the first so many.
    active: usize,
    /// Receive offloads in use.
    offloads: u64,
    filter: Filter,
    /// The guest is asked to announce itself.
    announce: bool,
    /// The interface has vanished.
    gone: bool,
    config_changed: bool,
    /// An announcement taken from a queue of the tap, until all other queues are empty.
    parting: Option<(usize, Frame)>,
    /// For [`Tap::read_frame`], while frames are forwarded.
    aside: Vec<u8>,
    limits: Throttles,
    /// The kernel may serve the queues.
    kernel: Option<Vhost>,
    /// But not now: what is written to guest memory is recorded.
    kept: bool,
    stats: NetStats,
}

/// Limits of all queue pairs together.
struct Throttles {
    rx: Throttle,
    tx: Throttle,
}

impl Net {
    /// Opens the tap. `mac` and `mtu` are chosen where the configuration leaves them open.
    pub fn open(config: &NetConfig) -> Result<Net> {
        // One that came with a port has not been looked at yet.
        let mistakes = config.mistakes(&format!("nets.{}", config.id));
        if !mistakes.is_empty() {
            return Err(Error::Config(mistakes));
        }
        let taps = Tap::open(config)?;
        let Some(first) = taps.first() else {
            return Err(Error::Conflict(format!("{}: no queue", config.id)));
        };
        let mtu = match config.mtu {
            Some(mtu) => mtu,
            None => first.mtu()?,
        };
        let mac = match config.mac {
            Some(mac) => mac,
            None => MacAddress::local(random()?),
        };
        let mut offered = BASE;
        if first.knows_udp_segmentation() {
            offered |= USO;
        }
        if taps.len() > 1 {
            offered |= MQ;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        queue_sizes.push(CONTROL_SIZE);
        let pair = |tap| Pair { tap, receiver: Receiver::default(), sender: Sender::default() };
        Ok(Net {
            id: config.id.clone(),
            own_mac: mac,
            mac,
            mtu,
            offered,
            accepted: 0,
            queue_sizes,
            pairs: taps.into_iter().map(pair).collect(),
            active: 1,
            offloads: 0,
            filter: Filter::default(),
            announce: false,
            gone: false,
            config_changed: false,
            parting: None,
            aside: Vec::new(),
            limits: Throttles { rx: Throttle::new(config.rx_limits)?, tx: Throttle::new(config.tx_limits)? },
            kernel: None,
            kept: false,
            stats: NetStats::default(),
        })
    }

    /// The limits of receiving and of sending.
    pub fn limits(&self) -> (Limits, Limits) {
        (self.limits.rx.limits(), self.limits.tx.limits())
    }

    /// Changes the limits of receiving, of sending, or both. They must be free of [`Limits::mistakes`]; whoever changes them
    /// calls [`crate::devices::Devices::process_all`] afterwards.
    pub fn set_limits(&mut self, rx: Option<Limits>, tx: Option<Limits>) {
        if let Some(limits) = rx {
            self.limits.rx.set(limits);
        }
        if let Some(limits) = tx {
            self.limits.tx.set(limits);
        }
        self.event();
    }

    /// Which queue takes commands, if the driver wanted one: the first after the pairs it knows of.
    fn control_queue(&self) -> Option<usize> {
        let pairs = if self.accepted & MQ != 0 { self.pairs.len() } else { 1 };
        (self.accepted & CTRL_VQ != 0).then_some(2 * pairs)
    }

    fn status(&self) -> u16 {
        let link = if self.gone { 0 } else { LINK_UP };
        link | if self.announce { ANNOUNCE } else { 0 }
    }

    /// The interface has vanished.
    fn lose(&mut self) {
        if !std::mem::replace(&mut self.gone, true) {
            let tap = self.pairs.first().map_or("", |p| p.tap.name());
            crate::notice::trouble(&self.id, format!("interface {tap} was deleted; the guest's link is down"));
            self.stats.taps_lost.inc();
            self.config_changed = true;
        }
    }

    fn control(&mut self, queue: &mut VirtQueue, memory: &Memory) -> std::result::Result<bool, QueueError> {
        control::serve(queue, memory, |command| {
            let done = command.is_some_and(|c| self.command(c));
            self.stats.commands.inc();
            self.stats.command_errors.add(u64::from(!done));
            done
        })
    }
}

impl Device for Net {
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
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&self.status().to_le_bytes());
        config[8..10].copy_from_slice(&(self.pairs.len() as u16).to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        super::read_bytes(&config, offset, data);
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.start(features, features & GUEST_OFFLOADS, 1, true)
    }

    fn reset(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.stop();
        }
        self.accepted = 0;
        self.mac = self.own_mac;
        self.filter = Filter::default();
        self.announce = false;
        for pair in &mut self.pairs {
            pair.receiver.reset();
        }
        if let Err(e) = self.apply_filter() {
            log::warn!("{}: {e}", self.id);
        }
    }

    fn is_pollable(&self) -> bool {
        self.kernel.is_none()
    }

    fn pending(&mut self, work: &Work<'_>) -> bool {
        let any = |n: usize| work.queues.get(n).is_some_and(|q| q.depth(work.memory) > 0);
        // Of frames that come the tap tells; receive buffers count only where a frame waits for them.
        let starved = |(i, pair): (usize, &Pair)| pair.receiver.starved && any(2 * i);
        (0..self.active).any(|i| any(2 * i + 1))
            || self.pairs.iter().enumerate().take(self.active).any(starved)
            || self.control_queue().is_some_and(any)
    }

    fn event(&mut self) {
        for pair in &mut self.pairs {
            pair.receiver.tap_may_have_frames();
        }
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let mut more = false;
        let commands = self.control_queue().and_then(|n| work.queues.get(n)).map_or(0, |q| q.depth(work.memory));
        if commands > 0 || !self.kernel_may_serve() {
            self.take_rings(work.queues, work.memory)?;
        }
        if let Some(queue) = self.control_queue().and_then(|n| work.queues.get_mut(n)) {
            more |= self.control(queue, work.memory)?;
        }
        if self.rings_outside() > 0 {
            return Ok(if more { Progress::More } else { Progress::Done });
        }
        let mut gone = false;
        for (pair, queues) in self.pairs.iter_mut().zip(work.queues.chunks_exact_mut(2)).take(self.active) {
            let [_, queue] = queues else { continue };
            let sent = match self.gone {
                true => Sent::Until(Sender::discard(queue, work.memory, &self.stats)?),
                false => pair.sender.send(&pair.tap, queue, work.memory, &mut self.limits.tx, &self.stats)?,
            };
            gone |= sent == Sent::Gone;
            more |= sent != Sent::Until(Progress::Done);
            if pair.sender.has_sent() {
                // An answer may be there already.
                pair.receiver.tap_may_have_frames();
            }
        }
        let mut injected = false;
        for (i, (pair, queues)) in self.pairs.iter_mut().zip(work.queues.chunks_exact_mut(2)).enumerate() {
            let [queue, _] = queues else { continue };
            if i >= self.active {
                pair.receiver.give_back(queue);
                continue;
            }
            pair.receiver.blocked = injected || self.gone;
            let received = pair.receiver.receive(&pair.tap, queue, work.memory, &mut self.limits.rx, &self.stats)?;
            gone |= pair.receiver.gone;
            more |= received == Progress::More;
            // What was injected comes before anything from any queue of the tap.
            injected |= i == 0 && pair.receiver.injected > 0;
        }
        if gone {
            self.lose();
        }
        if !more && self.kernel_may_serve() {
            self.hand_rings_over(work);
        }
        Ok(if more { Progress::More } else { Progress::Done })
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let timers = [self.limits.rx.as_raw_fd(), self.limits.tx.as_raw_fd()];
        self.pairs.iter().map(|p| p.tap.as_raw_fd()).chain(timers).collect()
    }

    fn posted(&self, work: &mut Work<'_>, out: &mut Vec<GuestRange>) {
        self.posted_buffers(work, out);
    }

    fn stop_input(&mut self) {
        for pair in &mut self.pairs {
            pair.receiver.stopped = true;
        }
    }

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.take_rings(work.queues, work.memory)?;
        for (pair, queues) in self.pairs.iter_mut().zip(work.queues.chunks_exact_mut(2)) {
            if let [queue, _] = queues {
                pair.receiver.give_back(queue);
            }
        }
        Ok(())
    }

    fn resume(&mut self) {
        self.parting = None;
        for pair in &mut self.pairs {
            pair.receiver.stopped = false;
            pair.receiver.tap_may_have_frames();
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(Box::new(NetState {
            own_mac: self.own_mac.0,
            mac: self.mac.0,
            mtu: self.mtu,
            active: self.active as u16,
            offloads: self.offloads,
            filter: self.filter.clone(),
            limits: [self.limits.rx.save(), self.limits.tx.save()],
            pending: self.pairs.iter().flat_map(|p| &p.receiver.pending).cloned().collect(),
        }))
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<()> {
        let DeviceState::Net(state) = state else {
            return Err(Error::State(format!("{}: not the state of a network device", self.id)));
        };
        self.take_identity(state)?;
        let bad = |what: String| Error::State(format!("{}: {what}", self.id));
        let most = if features & MQ != 0 { self.pairs.len() } else { 1 };
        if !(1..=most).contains(&state.active.into()) {
            return Err(bad(format!("{} queue pairs in use of {most}", state.active)));
        }
        if state.offloads & !(features & GUEST_OFFLOADS) != 0 || !state.filter.is_possible() {
            return Err(bad("offloads or addresses that cannot be".into()));
        }
        self.limits.rx.restore(&state.limits[0])?;
        self.limits.tx.restore(&state.limits[1])?;
        self.filter = state.filter.clone();
        self.start(features, state.offloads, state.active.into(), false)?;
        self.stop_input();
        // Where it is now its neighbours learn from itself, too.
        if features & GUEST_ANNOUNCE != 0 {
            self.announce = true;
            self.config_changed = true;
        }
        self.inject_frames(state.pending.clone())
    }

    fn restore_idle(&mut self, state: &DeviceState) -> Result<()> {
        match state {
            DeviceState::Net(state) => self.take_identity(state),
            _ => Err(Error::State(format!("{}: not the state of a network device", self.id))),
        }
    }

    fn rings_outside(&self) -> usize {
        self.kernel.as_ref().map_or(0, |k| 2 * k.running())
    }

    fn outside_descriptors(&self) -> Vec<RawFd> {
        self.pairs.iter().map(|p| p.tap.as_raw_fd()).collect()
    }

    fn keep_rings(&mut self, keep: bool) {
        self.kept = keep;
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn metrics(&self, out: &mut Exposition) {
        let (s, labels) = (&self.stats, &[("device", self.id.as_str())]);
        for (name, help, counter) in [
            ("vmm_net_rx_frames_total", "Frames given to the guest.", &s.rx_frames),
            ("vmm_net_rx_bytes_total", "Bytes of frames given to the guest.", &s.rx_bytes),
            ("vmm_net_rx_dropped_total", "Frames that no buffer of the guest could take.", &s.rx_dropped),
            ("vmm_net_tx_frames_total", "Frames sent for the guest.", &s.tx_frames),
            ("vmm_net_tx_bytes_total", "Bytes of frames sent for the guest.", &s.tx_bytes),
            ("vmm_net_tx_errors_total", "Frames of the guest that the host did not take.", &s.tx_errors),
            ("vmm_net_injected_frames_total", "Frames that came with a port.", &s.injected),
            ("vmm_net_commands_total", "Commands of the control queue.", &s.commands),
            (
                "vmm_net_command_errors_total",
                "Commands of the control queue answered with an error.",
                &s.command_errors,
            ),
            ("vmm_net_taps_lost_total", "Taps that were deleted while the device used them.", &s.taps_lost),
        ] {
            out.counter(name, help, labels, counter);
        }
        out.gauge("vmm_net_link_up", "Whether the guest sees its link up.", labels, f64::from(u8::from(!self.gone)));
        out.gauge("vmm_net_queue_pairs", "Queue pairs the guest uses.", labels, self.active as f64);
        let outside = f64::from(u8::from(self.rings_outside() > 0));
        out.gauge("vmm_net_vhost", "Whether vhost-net moves the frames: they are not counted then.", labels, outside);
        let [rx, tx] = [&self.limits.rx, &self.limits.tx].map(Throttle::waits);
        out.count("vmm_net_rx_throttled_total", "How often receiving had to wait for its limits.", labels, rx);
        out.count("vmm_net_tx_throttled_total", "How often sending had to wait for its limits.", labels, tx);
    }

    fn as_net(&mut self) -> Option<&mut Net> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
