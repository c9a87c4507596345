//! The network device as smoltcp wants it.
use crate::virtio::net::{ETHERNET, Frame, MAX_FRAME, NetDevice, Receiver, Sender};
use core::cell::Cell;
use core::num::NonZeroUsize;
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

/// Headers of a TCP segment without options.
const IP_AND_TCP: usize = 40;

/// A network device for smoltcp.
pub(super) struct SmolDevice {
    pub(super) net: NetDevice,
    /// There was no room to send, so smoltcp has something left.
    blocked: Cell<bool>,
    waiting_for_room: bool,
}

impl SmolDevice {
    pub(super) fn new(net: NetDevice) -> Self {
        SmolDevice { net, blocked: Cell::new(false), waiting_for_room: false }
    }

    /// Whether the last poll was cut short for want of room; remembered for [`SmolDevice::is_unblocked`].
    pub(super) fn take_blocked(&mut self) -> bool {
        self.waiting_for_room = self.blocked.take();
        self.waiting_for_room
    }

    /// Whether there is room again that the last poll lacked.
    pub(super) fn is_unblocked(&self) -> bool {
        self.waiting_for_room && self.net.has_sent()
    }
}

pub(super) struct RxToken<'a> {
    receiver: &'a mut Receiver,
    frame: Frame,
}

pub(super) struct TxToken<'a> {
    sender: &'a mut Sender,
    segment: Option<u16>,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(self.receiver.bytes(&self.frame));
        self.receiver.finish(self.frame);
        result
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        self.sender.send(length, self.segment, f)
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(|size| size.get());
    }
}

impl phy::Device for SmolDevice {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        if !self.net.has_received() {
            return None;
        }
        let NetDevice { rx, tx, .. } = &mut self.net;
        // A frame may need an answer at once.
        if !tx.has_room() {
            self.blocked.set(true);
            return None;
        }
        let frame = rx.receive()?;
        Some((RxToken { receiver: rx, frame }, TxToken { sender: tx, segment: None }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TxToken<'_>> {
        let tx = &mut self.net.tx;
        if !tx.has_room() {
            self.blocked.set(true);
            return None;
        }
        Some(TxToken { sender: tx, segment: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        let mtu = usize::from(self.net.mtu());
        c.medium = Medium::Ethernet;
        c.max_transmission_unit = ETHERNET + mtu;
        let offloads = self.net.offloads();
        // Received frames nobody vouched for are verified by the driver.
        c.checksum.tcp = if offloads.checksum { Checksum::None } else { Checksum::Tx };
        if offloads.segmentation {
            // As many whole segments as one IPv4 packet can hold.
            let segment = mtu - IP_AND_TCP;
            let largest = ETHERNET + IP_AND_TCP + (MAX_FRAME - 18 - IP_AND_TCP) / segment * segment;
            c.segmentation.tcpv4 = NonZeroUsize::new(largest);
        }
        c
    }
}
