//! virtio-vsock (virtio 1.2, section 5.10) in user space, over unix sockets as Firecracker does it.
//!
//! The host's program connects to the device's socket, says `CONNECT <port>\n`, is answered `OK <port>\n` when a program of
//! the guest has accepted, and then has a stream. A guest's connection to port N of the host (context id 2) goes to the
//! socket at the same path with `_N` behind it.
//!
//! Owns the connections. Always true: there are at most [`CONNECTIONS_MAX`] of them, each with at most
//! [`connection::BUFFER`] bytes; resets that wait for room are at most [`RESETS_MAX`], beyond which the guest's packets wait;
//! a peer that says nothing is given up after a time. Streams do not move with the guest: it is told so by
//! VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, and numbers go on so that no new stream is taken for an old one.

mod connection;
mod packet;
mod streams;

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::queue::{Chain, QueueError, read_front, total, write_at};
use super::{Device, DeviceState, Progress, Work};
use crate::config::VsockConfig;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::metrics::Exposition;
use crate::stats::Counter;
use connection::Step;
use packet::{HEADER, HOST_CID, Header, PAYLOAD_MAX, STREAM, op};
pub use streams::CONNECTIONS_MAX;
use streams::Streams;

/// Most resets that wait for the guest to have room.
pub const RESETS_MAX: usize = 128;

const KIND: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZE: u16 = 256;
/// Packets handled in one call in each direction.
const BUDGET: usize = 128;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// State that moves with the guest. Connections do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Context id of the guest.
    pub cid: u32,
    /// Port of the host the next connection has.
    pub next_port: u32,
}

#[derive(Debug, Default)]
struct VsockStats {
    rx_packets: Counter,
    rx_bytes: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
    errors: Counter,
    resets: Counter,
}

/// A vsock device.
pub struct Vsock {
    id: String,
    cid: u32,
    streams: Streams,
    /// Resets for packets that belong to no connection.
    resets: VecDeque<Header>,
    /// The guest is to be told that its connections are gone.
    tell_reset: bool,
    /// Nothing is taken from the host.
    stopped: bool,
    scratch: Vec<u8>,
    stats: VsockStats,
}

impl Vsock {
    /// A device called `id`, listening on its socket.
    pub fn open(id: &str, config: &VsockConfig) -> Result<Vsock> {
        Ok(Vsock {
            id: id.to_owned(),
            cid: config.cid,
            streams: Streams::open(&config.path)?,
            resets: VecDeque::new(),
            tell_reset: false,
            stopped: false,
            scratch: Vec::new(),
            stats: VsockStats::default(),
        })
    }

    /// Says that connections are gone, when there is a buffer for it.
    fn serve_events(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        while self.tell_reset {
            let Some(chain) = work.queues[EVENT].pop(work.memory)? else {
                if work.queues[EVENT].arm(work.memory)? {
                    continue;
                }
                break;
            };
            let told = write_at(work.memory, &chain.writable, 0, &TRANSPORT_RESET);
            self.tell_reset = !told;
            work.queues[EVENT].push(work.memory, chain.head, if told { TRANSPORT_RESET.len() as u32 } else { 0 })?;
        }
        Ok(())
    }

    /// What the guest has sent.
    fn hear(&mut self, work: &mut Work<'_>, now: Instant) -> std::result::Result<Progress, QueueError> {
        let mut budget = BUDGET;
        loop {
            while self.resets.len() < RESETS_MAX
                && let Some(mut chain) = work.queues[TX].pop(work.memory)?
            {
                if !self.hear_packet(&mut chain, work.memory, now) {
                    self.stats.errors.inc();
                }
                work.queues[TX].push(work.memory, chain.head, 0)?;
                budget -= 1;
                if budget == 0 {
                    return Ok(Progress::More);
                }
            }
            // While resets wait it is the receive queue that brings things forward.
            if self.resets.len() >= RESETS_MAX || !work.queues[TX].arm(work.memory)? {
                return Ok(Progress::Done);
            }
        }
    }

    /// One packet; false if it makes no sense.
    fn hear_packet(&mut self, chain: &mut Chain, memory: &Memory, now: Instant) -> bool {
        let mut bytes = [0; HEADER];
        if !read_front(memory, &mut chain.readable, &mut bytes) {
            return false;
        }
        let header = Header::parse(&bytes);
        self.stats.tx_packets.inc();
        if header.src_cid != u64::from(self.cid) || header.dst_cid != HOST_CID {
            return false;
        }
        let len = header.len as usize;
        // Only an RW has bytes.
        let sound = len <= PAYLOAD_MAX
            && len as u64 <= total(&chain.readable)
            && (header.op == op::RW || len == 0)
            && header.kind == STREAM;
        self.scratch.resize(if sound { len } else { 0 }, 0);
        let sound = sound && read_front(memory, &mut chain.readable, &mut self.scratch);
        if let Some((id, connection)) = self.streams.of_guest(&header) {
            let step = match sound {
                true => connection.hear(&header, &self.scratch, now),
                false => {
                    connection.close();
                    Step::Done
                }
            };
            match step {
                Step::Gone => self.streams.forget(id),
                Step::Drains => self.streams.release(id),
                _ => self.streams.settle(id),
            }
            self.stats.tx_bytes.add(self.scratch.len() as u64);
        } else if header.op != op::RST {
            let request = sound && header.op == op::REQUEST;
            if !(request && self.streams.connect(&header)) {
                self.reset(&header);
            }
        }
        sound
    }

    /// Answers a packet that belongs to nothing.
    fn reset(&mut self, to: &Header) {
        self.stats.resets.inc();
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: u64::from(self.cid),
            src_port: to.dst_port,
            dst_port: to.src_port,
            kind: to.kind,
            op: op::RST,
            ..Header::default()
        });
    }

    /// What there is for the guest.
    fn say(&mut self, work: &mut Work<'_>, now: Instant) -> std::result::Result<Progress, QueueError> {
        let mut budget = BUDGET;
        while !self.resets.is_empty() || !self.stopped && self.streams.has_something() {
            let Some(chain) = work.queues[RX].pop(work.memory)? else {
                if work.queues[RX].arm(work.memory)? {
                    continue;
                }
                break;
            };
            // Room for one byte at least: else what there is could never be said.
            let Some(room @ 1..) = total(&chain.writable).checked_sub(HEADER as u64) else {
                return Err(QueueError("receive buffer without room for a packet".into()));
            };
            let room = usize::try_from(room).unwrap_or(PAYLOAD_MAX).min(PAYLOAD_MAX);
            let header = match self.resets.pop_front() {
                Some(header) => {
                    self.scratch.clear();
                    Some(header)
                }
                None => self.streams.say(u64::from(self.cid), room, &mut self.scratch, now),
            };
            let Some(header) = header else {
                // No connection had anything after all.
                work.queues[RX].unpop(1);
                break;
            };
            let written = write_at(work.memory, &chain.writable, 0, &header.encode())
                && write_at(work.memory, &chain.writable, HEADER as u64, &self.scratch);
            if !written {
                return Err(QueueError("receive buffer cannot be written".into()));
            }
            self.stats.rx_packets.inc();
            self.stats.rx_bytes.add(self.scratch.len() as u64);
            work.queues[RX].push(work.memory, chain.head, (HEADER + self.scratch.len()) as u32)?;
            budget -= 1;
            if budget == 0 {
                return Ok(Progress::More);
            }
        }
        Ok(Progress::Done)
    }
}

impl Device for Vsock {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        self.streams.clear();
        self.resets.clear();
        self.tell_reset = false;
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let now = Instant::now();
        self.streams.collect(now, self.stopped);
        self.serve_events(work)?;
        let mut heard = self.hear(work, now)?;
        let said = self.say(work, now)?;
        // Resets that have gone make room for packets that waited for it.
        if self.resets.len() < RESETS_MAX && heard == Progress::Done {
            heard = self.hear(work, now)?;
        }
        self.streams.watch_deadlines();
        Ok(if heard == Progress::More { heard } else { said })
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.streams.descriptor()]
    }

    fn stop_input(&mut self) {
        self.stopped = true;
    }

    fn quiesce(&mut self, _work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        Ok(())
    }

    fn resume(&mut self) {
        self.stopped = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { cid: self.cid, next_port: self.streams.next_port() })
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<()> {
        let DeviceState::Vsock(state) = state else {
            return Err(Error::State(format!("{}: not the state of a vsock device", self.id)));
        };
        if !VsockConfig::CIDS.contains(&state.cid) {
            return Err(Error::State(format!("{}: context id {}", self.id, state.cid)));
        }
        self.cid = state.cid;
        self.streams.set_next_port(state.next_port);
        self.tell_reset = true;
        self.stopped = true;
        Ok(())
    }

    fn metrics(&self, out: &mut Exposition) {
        let (s, labels) = (&self.stats, &[("device", self.id.as_str())]);
        for (name, help, counter) in [
            ("vmm_vsock_rx_packets_total", "Packets given to the guest.", &s.rx_packets),
            ("vmm_vsock_rx_bytes_total", "Bytes of streams given to the guest.", &s.rx_bytes),
            ("vmm_vsock_tx_packets_total", "Packets taken from the guest.", &s.tx_packets),
            ("vmm_vsock_tx_bytes_total", "Bytes of streams taken from the guest.", &s.tx_bytes),
            ("vmm_vsock_errors_total", "Packets of the guest that make no sense.", &s.errors),
            ("vmm_vsock_resets_total", "Packets of the guest that belong to no connection.", &s.resets),
            ("vmm_vsock_refused_total", "Connections refused because there are too many.", self.streams.refused()),
        ] {
            out.counter(name, help, labels, counter);
        }
        out.gauge("vmm_vsock_connections", "Connections at present.", labels, self.streams.len() as f64);
    }
}

#[cfg(test)]
mod tests;
