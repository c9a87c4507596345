//! virtio-net whose queues another process works (vhost-user-net), like a switch in user space.
//!
//! Owns the device's registers; frames never come by here. Always true: the driver is offered what back end and monitor both
//! know; there is no control queue, so nothing can be asked of the monitor while it runs. A back end that has died: see the
//! module above.

use std::os::fd::RawFd;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::EventFd;

use super::{BackEnd, Needs};
use crate::boot::info::random;
use crate::config::{MacAddress, NetConfig};
use crate::error::{Error, Result};
use crate::metrics::Exposition;
use crate::stats::Counter;
use crate::virtio::net::feature::{BASE, CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_VQ, GUEST_ANNOUNCE};
use crate::virtio::net::feature::{MAC, MQ, MTU, STATUS, USO};
use crate::virtio::queue::QueueError;
use crate::virtio::{Device, DeviceState, F_EVENT_IDX, F_INDIRECT_DESC, Progress, Work, read_bytes};

const KIND: u32 = 1;
const QUEUE_SIZE: u16 = 256;
/// Receive buffers wait for frames.
const NEEDS: Needs = Needs { protocol: VhostUserProtocolFeatures::empty(), completes: false };
const LINK_UP: u16 = 1;
/// Needs a control queue, which is not there.
const CONTROL: u64 = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | GUEST_ANNOUNCE;
/// Says what stands in the configuration space: the monitor's affair.
const OURS: u64 = MAC | STATUS;

/// A network device of another process.
pub struct VhostUserNet {
    id: String,
    mac: MacAddress,
    mtu: Option<u16>,
    back_end: BackEnd,
    sizes: Vec<u16>,
    /// Offered by the back end when it was first connected to: a driver may have accepted them.
    offered: u64,
    /// What the driver has accepted, while it uses the device.
    active: Option<u64>,
    /// An event is to be looked at.
    event: bool,
    link: bool,
    config_changed: bool,
    ended: Counter,
}

impl VhostUserNet {
    /// Connects to the back end of the configuration.
    pub fn open(config: &NetConfig) -> Result<VhostUserNet> {
        let Some(path) = &config.vhost_user else {
            return Err(Error::Conflict(format!("{}: no back end given", config.id)));
        };
        let back_end = BackEnd::connect(path, 2, NEEDS)?;
        log::info!("{}: {}", config.id, back_end.description());
        Ok(VhostUserNet {
            id: config.id.clone(),
            mac: match config.mac {
                Some(mac) => mac,
                None => MacAddress::local(random()?),
            },
            mtu: config.mtu,
            offered: back_end.features(),
            back_end,
            sizes: vec![QUEUE_SIZE; 2],
            active: None,
            event: false,
            link: true,
            config_changed: false,
            ended: Counter::default(),
        })
    }

    fn start(&mut self, features: u64, work: &mut Work<'_>) -> Result<()> {
        if !self.back_end.is_connected() {
            self.back_end.reconnect()?;
            log::info!("{}: connected again: {}", self.id, self.back_end.description());
        }
        self.back_end.start(features & !OURS & !MTU, work)?;
        self.config_changed |= !std::mem::replace(&mut self.link, true);
        Ok(())
    }

    /// The back end is gone: the guest sees its link go down, and may reset the device to look for it again.
    fn lose(&mut self, e: &Error) -> QueueError {
        crate::notice::trouble(&self.id, e.to_string());
        self.ended.inc();
        self.config_changed |= std::mem::replace(&mut self.link, false);
        QueueError("its back end is gone".into())
    }
}

impl Device for VhostUserNet {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { MTU } else { 0 };
        self.offered & (BASE | USO) & !(CONTROL | MQ | MTU) | OURS | mtu
    }

    fn ring_features(&self) -> u64 {
        self.offered & (F_EVENT_IDX | F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&(if self.link { LINK_UP } else { 0 }).to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn take_doorbells(&mut self, doorbells: &[EventFd]) -> Result<bool> {
        self.back_end.take_doorbells(doorbells).map(|()| true)
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.active = Some(features);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.event = false;
        if let Err(e) = self.back_end.take_back() {
            crate::notice::trouble(&self.id, e.to_string());
            self.ended.inc();
        }
    }

    fn event(&mut self) {
        self.event = true;
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let Some(features) = self.active else { return Ok(Progress::Done) };
        if std::mem::take(&mut self.event) {
            self.back_end.look(work.queues).map_err(|e| self.lose(&e))?;
            // Who is parked rings by parking, who is not by the doorbell.
            if self.back_end.is_started() {
                return Ok(Progress::Done);
            }
        }
        match self.back_end.is_started() {
            true => self.back_end.ring(work),
            false => self.start(features, work).map_err(|e| self.lose(&e))?,
        }
        Ok(Progress::Done)
    }

    fn parked(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.back_end.awaited(work)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.back_end.descriptors()
    }

    fn stop_input(&mut self) {}

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.back_end.stop(work.queues, work.memory).map_err(|e| QueueError(e.to_string()))?;
        // What the last answers have rung.
        self.back_end.look(work.queues).map_err(|e| QueueError(e.to_string()))
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }

    fn restore(&mut self, _state: &DeviceState, _features: u64) -> Result<()> {
        Err(Error::State(format!("{}: a vhost-user device is neither ported nor restored", self.id)))
    }

    fn metrics(&self, out: &mut Exposition) {
        let labels = &[("device", self.id.as_str())];
        let connected = f64::from(u8::from(self.back_end.is_connected()));
        out.gauge("vmm_vhost_user_connected", "Whether the back end is there.", labels, connected);
        out.counter("vmm_vhost_user_lost_total", "Times the back end was lost.", labels, &self.ended);
    }
}
