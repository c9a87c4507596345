//! virtio-net (virtio 1.2, section 5.1) on a tap.
//!
//! Owns the tap and the frames between it and the guest. Always true: a frame taken from the tap is delivered in order,
//! or dropped and counted because it can never fit, or part of the saved state; a frame is taken only when the guest has
//! room for it, all others wait in the tap. Receive buffers taken from the queue but not filled are put back when the device is
//! quiesced.

mod rx;
pub mod tap;

use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};

use super::queue::QueueError;
use super::{Device, DeviceState, Progress, Work};
use crate::boot::info::random;
use crate::config::{MacAddress, NetConfig};
use crate::error::{Error, Result};
use crate::memory::IoVec;
use crate::metrics::Exposition;
use crate::stats::Counter;
use rx::Receiver;
use tap::Tap;

/// Size of `struct virtio_net_hdr_v1`, before every frame in both directions.
pub const HEADER_SIZE: usize = 12;
/// Longest frame with segmentation offload, with its header.
pub const FRAME_MAX: usize = HEADER_SIZE + 14 + 4 + 65_535;
/// Frames kept for the guest outside the tap: those injected in a port and the one that did not fit yet.
pub const PENDING_MAX: usize = 1024;

const KIND: u32 = 1;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Frames handled in one call in each direction, so that nobody holds the lock for long.
const BUDGET: usize = 256;
const LINK_UP: u16 = 1;

/// Feature bits.
pub(crate) mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}
use feature::*;

const FEATURES: u64 = CSUM
    | GUEST_CSUM
    | MTU
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF
    | STATUS;

/// A frame with its virtio-net header before it.
pub type Frame = Vec<u8>;

/// State that moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// MAC of the guest's side.
    pub mac: [u8; 6],
    /// MTU announced.
    pub mtu: u16,
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
}

/// A network device.
pub struct Net {
    id: String,
    mac: MacAddress,
    mtu: u16,
    tap: Tap,
    receiver: Receiver,
    stats: NetStats,
    /// For the pieces of one frame.
    scratch: Vec<IoVec>,
}

impl Net {
    /// Opens the tap. `mac` and `mtu` are chosen where the configuration leaves them open.
    pub fn open(config: &NetConfig) -> Result<Net> {
        let tap = Tap::open(config)?;
        let mtu = match config.mtu {
            Some(mtu) => mtu,
            None => tap.mtu()?,
        };
        let mac = match config.mac {
            Some(mac) => mac,
            None => MacAddress::local(random()?),
        };
        Ok(Net {
            id: config.id.clone(),
            mac,
            mtu,
            tap,
            receiver: Receiver::default(),
            stats: NetStats::default(),
            scratch: Vec::new(),
        })
    }

    /// MAC of the guest's side.
    pub fn mac(&self) -> MacAddress {
        self.mac
    }

    /// Delivers frames (each with its header) to the guest before anything from the tap, in order. Fails, with nothing
    /// taken, when more than [`PENDING_MAX`] would wait or a frame is longer than [`FRAME_MAX`].
    pub fn inject_frames(&mut self, frames: Vec<Frame>) -> Result<()> {
        if self.receiver.pending.len() + frames.len() > PENDING_MAX {
            return Err(Error::Conflict(format!("{}: more than {PENDING_MAX} frames wait", self.id)));
        }
        if frames.iter().any(|f| f.len() < HEADER_SIZE || f.len() > FRAME_MAX) {
            return Err(Error::State(format!("{}: a frame of a length that cannot be", self.id)));
        }
        self.stats.injected.add(frames.len() as u64);
        self.receiver.pending.extend(frames);
        Ok(())
    }

    /// Takes up to `max` frames (each with its header) that wait in the tap, while the device takes none itself.
    pub fn take_frames(&mut self, max: usize) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        while frames.len() < max {
            match self.tap.read_frame(FRAME_MAX) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(e) => return Err(Error::Host { what: format!("{}: read tap", self.id), source: e }),
            }
        }
        Ok(frames)
    }

    /// The tap's descriptor, readable when a frame waits.
    pub fn tap_fd(&self) -> RawFd {
        self.tap.as_raw_fd()
    }

    /// While `held`, the guest gets injected frames only; those in the tap wait there.
    pub fn hold_tap(&mut self, held: bool) {
        self.receiver.held = held;
        self.receiver.tap_may_have_frames();
    }

    /// How many frames [`Net::inject_frames`] takes at present.
    pub fn room(&self) -> usize {
        PENDING_MAX.saturating_sub(self.receiver.pending.len())
    }

    /// Tells the network where the guest's MAC is now: sends a RARP request from it (broadcast), as QEMU and Linux do.
    pub fn announce(&self) -> Result<()> {
        self.tap
            .write_frame(&announcement(self.mac.0))
            .map_err(|e| Error::Host { what: format!("{}: announce {}", self.id, self.mac), source: e })
    }

    fn transmit(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let memory = work.memory;
        let queue = &mut work.queues[TX];
        let mut budget = BUDGET;
        loop {
            while let Some(chain) = queue.pop(memory)? {
                self.scratch.clear();
                self.scratch.extend(chain.readable.iter().filter(|r| !r.is_empty()).map(|r| memory.iovec(*r)));
                let len = super::queue::total(&chain.readable);
                // A frame that is too short or long is the guest's mistake: given back, not sent.
                let result = match usize::try_from(len) {
                    Ok(HEADER_SIZE..=FRAME_MAX) => self.tap.write(&self.scratch),
                    _ => Err(std::io::Error::from_raw_os_error(libc::EINVAL)),
                };
                match result {
                    Ok(()) => {
                        self.stats.tx_frames.inc();
                        self.stats.tx_bytes.add(len - HEADER_SIZE as u64);
                    }
                    Err(e) => {
                        self.stats.tx_errors.inc();
                        log::debug!("{}: frame of {len} bytes not sent: {e}", self.id);
                    }
                }
                queue.push(memory, chain.head, 0)?;
                budget -= 1;
                if budget == 0 {
                    return Ok(Progress::More);
                }
            }
            if !queue.arm(memory)? {
                return Ok(Progress::Done);
            }
        }
    }
}

/// A RARP request of this MAC, with its virtio-net header.
fn announcement(mac: [u8; 6]) -> [u8; HEADER_SIZE + 60] {
    let mut frame = [0u8; HEADER_SIZE + 60];
    let f = &mut frame[HEADER_SIZE..];
    f[..6].fill(0xff);
    f[6..12].copy_from_slice(&mac);
    f[12..14].copy_from_slice(&[0x80, 0x35]); // RARP
    f[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]); // Ethernet, IPv4, request reverse
    f[22..28].copy_from_slice(&mac);
    f[32..38].copy_from_slice(&mac);
    frame
}

/// Whether a frame, with its virtio-net header, is what [`Net::announce`] sends for this MAC.
pub fn is_announcement(frame: &[u8], mac: [u8; 6]) -> bool {
    // Up to the end of the RARP packet: what pads it may change on the way.
    const END: usize = HEADER_SIZE + 42;
    frame.get(HEADER_SIZE..END) == announcement(mac).get(HEADER_SIZE..END)
}

impl Device for Net {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        super::read_bytes(&config, offset, data);
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.tap.set_offloads(features)?;
        self.receiver.activate(features, self.mtu);
        Ok(())
    }

    fn reset(&mut self) {
        self.receiver.reset();
    }

    fn event(&mut self) {
        self.receiver.tap_may_have_frames();
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let sent = self.transmit(work)?;
        let received = self.receiver.receive(&self.tap, &mut work.queues[RX], work.memory, &self.stats)?;
        Ok(if sent == Progress::More { sent } else { received })
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.tap.as_raw_fd()]
    }

    fn stop_input(&mut self) {
        self.receiver.stopped = true;
    }

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.receiver.give_back(&mut work.queues[RX]);
        Ok(())
    }

    fn resume(&mut self) {
        self.receiver.stopped = false;
        self.receiver.tap_may_have_frames();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState {
            mac: self.mac.0,
            mtu: self.mtu,
            pending: self.receiver.pending.iter().cloned().collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<()> {
        let DeviceState::Net(state) = state else {
            return Err(Error::State(format!("{}: not the state of a network device", self.id)));
        };
        self.mac = MacAddress(state.mac);
        self.mtu = state.mtu;
        self.activate(features)?;
        self.receiver.stopped = true;
        self.inject_frames(state.pending.clone())
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
        ] {
            out.counter(name, help, labels, counter);
        }
    }

    fn as_net(&mut self) -> Option<&mut Net> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
