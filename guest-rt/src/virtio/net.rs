//! virtio-net (virtio 1.2, section 5.1): frames in and out, with checksum and TCP segmentation offload.
//!
//! Owns the device and what was agreed with it; the buffers are its halves' ([`receive`], [`transmit`]).
//! Always true: what the device offers is believed only within what a network can be (MTU, MAC).
//! Survives: headers, lengths and buffer counts that make no sense (the frame is dropped and counted); a device that
//! breaks the rules of the ring (it is given up: nothing is received or sent any more).
mod buffer;
mod receive;
mod transmit;

use super::VirtioError;
use super::mmio::Transport;
use super::queue::QueueError;
pub(crate) use receive::{Frame, Receiver};
pub(crate) use transmit::Sender;

/// Longest frame with offload: an IPv4 packet of 65535 bytes and its Ethernet header (with a VLAN tag).
pub const MAX_FRAME: usize = 65535 + 18;
/// Ethernet header.
pub const ETHERNET: usize = 14;
/// Most entries of a queue that are used.
const QUEUE_SIZE: u16 = 256;
/// Length of `struct virtio_net_hdr` with VERSION_1.
const HEADER: usize = 12;
/// Bytes of a buffer for frames without offload.
const SMALL: usize = 2048;
/// MTU without VIRTIO_NET_F_MTU.
const DEFAULT_MTU: u16 = 1500;
/// Least and largest IP MTU that is believed.
const MTU: core::ops::RangeInclusive<u16> = 576..=65_521;

mod bit {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const MRG_RXBUF: u64 = 1 << 15;
}

/// Bits of a header's flags.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

/// How many receive buffers the device gets, and of which size.
///
/// A large buffer takes a frame of any size in one piece; small ones save memory, but large frames are put together by
/// a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxBuffers {
    /// How many (at most 256).
    pub count: u16,
    /// Bytes of each, rounded up to whole pages.
    pub size: usize,
}

impl RxBuffers {
    /// What suits a guest of so much memory: 1 MiB of small buffers below 64 MiB, else 64 that take any frame.
    pub fn for_memory(memory_size: u64) -> RxBuffers {
        if memory_size < 64 << 20 {
            RxBuffers { count: 256, size: 4096 }
        } else {
            RxBuffers { count: 64, size: (HEADER + MAX_FRAME).next_multiple_of(4096) }
        }
    }
}

/// What the device counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStatistics {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames dropped: bad headers, lengths or checksums.
    pub rx_dropped: u64,
    /// Frames sent (a segmented one counts once).
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// What the device does for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// It fills in checksums.
    pub checksum: bool,
    /// It cuts TCP segments.
    pub segmentation: bool,
    /// Frames may come with checksums that are not filled in, or were verified already.
    pub rx_checksum: bool,
}

/// A network device.
pub struct NetDevice {
    pub(crate) rx: Receiver,
    pub(crate) tx: Sender,
    transport: Transport,
    mac: [u8; 6],
    /// If the device says which: the generation of the clock page it was read in.
    mac_read: Option<u32>,
    mtu: u16,
    offloads: Offloads,
}

fn read_mac(transport: &Transport) -> [u8; 6] {
    [0, 1, 2, 3, 4, 5].map(|i| transport.config8(i))
}

impl NetDevice {
    /// Sets the device up; frames are received from [`NetDevice::start`] on.
    pub fn new(transport: Transport) -> Result<NetDevice, VirtioError> {
        let wanted =
            bit::CSUM | bit::GUEST_CSUM | bit::MTU | bit::MAC | bit::GUEST_TSO4 | bit::HOST_TSO4 | bit::MRG_RXBUF;
        let features = transport.negotiate(wanted)?;
        let has = |bit| features & bit != 0;
        let rx = transport.queue(0, QUEUE_SIZE)?;
        let tx = transport.queue(1, QUEUE_SIZE)?;
        let mac = if has(bit::MAC) {
            read_mac(&transport)
        } else {
            // Locally administered, from nothing better than chance.
            let r = crate::rng::random_u64().to_le_bytes();
            [2, r[0], r[1], r[2], r[3], r[4]]
        };
        let mtu = if has(bit::MTU) {
            u16::from(transport.config8(10)) | u16::from(transport.config8(11)) << 8
        } else {
            DEFAULT_MTU
        };
        if !MTU.contains(&mtu) || mac[0] & 1 != 0 {
            return Err(transport.fail(VirtioError::Config("MTU or MAC address")));
        }
        transport.ready();
        Ok(NetDevice {
            rx: Receiver::new(rx, has(bit::MRG_RXBUF)),
            tx: Sender::new(tx, has(bit::CSUM)),
            transport,
            mac,
            mac_read: has(bit::MAC).then(crate::time::generation),
            mtu,
            offloads: Offloads {
                checksum: has(bit::CSUM),
                segmentation: has(bit::CSUM) && has(bit::HOST_TSO4),
                rx_checksum: has(bit::GUEST_CSUM),
            },
        })
    }

    /// MAC address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// IP MTU.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// What the device does for us.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// What was counted so far.
    pub fn statistics(&self) -> NetStatistics {
        let (tx_frames, tx_bytes) = self.tx.sent();
        NetStatistics { tx_frames, tx_bytes, ..self.rx.statistics() }
    }

    /// Reads the MAC address anew if the VM is not what it was: an instance of a template has another. One that makes no sense
    /// is not taken.
    pub(crate) fn renew_mac(&mut self) {
        let now = crate::time::generation();
        if self.mac_read.is_some_and(|then| then != now) {
            self.mac_read = Some(now);
            let mac = read_mac(&self.transport);
            if mac[0] & 1 == 0 {
                self.mac = mac;
            }
        }
    }

    /// Makes the receive buffers; the device does not have them yet.
    pub(crate) fn prepare(&mut self, buffers: RxBuffers) {
        self.rx.prepare(buffers);
    }

    /// Gives the device its receive buffers.
    pub fn start(&mut self, buffers: RxBuffers) {
        self.rx.start(buffers);
    }

    /// Whether doorbells are due.
    pub(crate) fn wants_kick(&self) -> bool {
        self.rx.queue.wants_kick() || self.tx.queue.wants_kick()
    }

    /// Rings the doorbells that are due.
    pub(crate) fn kick(&mut self) {
        self.rx.queue.kick(&self.transport);
        self.tx.queue.kick(&self.transport);
    }

    /// Whether a frame has come.
    pub(crate) fn has_received(&self) -> bool {
        self.rx.has_received()
    }

    /// Whether the device has nothing left to send.
    pub(crate) fn is_quiet(&self) -> bool {
        self.tx.is_quiet()
    }

    /// Whether something was sent since the last look.
    pub(crate) fn has_sent(&self) -> bool {
        self.tx.has_sent()
    }
}

fn broken(what: &str, e: QueueError) -> bool {
    log::error!("network device given up ({what}): {e}");
    true
}

#[cfg(test)]
mod tests;
