//! virtio-blk whose queues another process works (vhost-user-blk), like qemu-storage-daemon.
//!
//! Owns the device's registers; the disk is the back end's. Always true: what the driver reads of the configuration is what the
//! back end said when it was last asked. A back end that has died: see the module above.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::EventFd;

use super::{BackEnd, Needs};
use crate::config::DiskConfig;
use crate::error::{Error, Result};
use crate::metrics::Exposition;
use crate::stats::Counter;
use crate::virtio::queue::QueueError;
use crate::virtio::{Device, DeviceState, F_EVENT_IDX, F_INDIRECT_DESC, Progress, Work, read_bytes};

const KIND: u32 = 2;
const QUEUE_SIZE: u16 = 128;
const NEEDS: Needs = Needs { protocol: VhostUserProtocolFeatures::CONFIG, completes: true };
/// `struct virtio_blk_config` up to and with the fields of write-zeroes.
const CONFIG_SIZE: usize = 60;
/// Where `num_queues` and `writeback` stand in it.
const NUM_QUEUES: usize = 34;
const WRITEBACK: u64 = 32;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_MQ: u64 = 1 << 12;
/// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, DISCARD, WRITE_ZEROES: those that mean nothing to
/// the monitor.
const F_PASSED: u64 =
    F_SIZE_MAX | F_SEG_MAX | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | F_MQ | 1 << 13 | 1 << 14;

/// State that moves with the guest: there is none besides the queues, which are the monitor's while the device is quiesced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserBlkState {
    /// Size in sectors that the guest was told.
    pub capacity: u64,
}

/// A disk of another process.
pub struct VhostUserBlk {
    id: String,
    back_end: BackEnd,
    sizes: Vec<u16>,
    /// Offered by the back end when it was first connected to: a driver may have accepted them.
    offered: u64,
    config: Vec<u8>,
    config_changed: bool,
    /// What the driver has accepted, while it uses the device.
    active: Option<u64>,
    /// An event is to be looked at.
    event: bool,
    ended: Counter,
}

impl VhostUserBlk {
    /// Connects to the back end.
    pub fn open(config: &DiskConfig) -> Result<VhostUserBlk> {
        let path = config.vhost_user.as_deref().unwrap_or(&config.path);
        let queues = usize::from(config.queues);
        let mut back_end = BackEnd::connect(path, queues, NEEDS)?;
        let space = back_end.read_config(CONFIG_SIZE)?;
        log::info!("{}: {}", config.id, back_end.description());
        let mut device = VhostUserBlk {
            id: config.id.clone(),
            offered: back_end.features(),
            back_end,
            sizes: vec![QUEUE_SIZE; queues],
            config: Vec::new(),
            config_changed: false,
            active: None,
            event: false,
            ended: Counter::default(),
        };
        device.set_config(space);
        Ok(device)
    }

    fn set_config(&mut self, mut space: Vec<u8>) {
        space.resize(CONFIG_SIZE, 0);
        // The driver is told of the queues there are here.
        space[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&(self.sizes.len() as u16).to_le_bytes());
        self.config_changed |= !self.config.is_empty() && self.config != space;
        self.config = space;
    }

    fn capacity(&self) -> u64 {
        self.config.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }

    /// Asks the back end for the configuration again: its disk may have another size now.
    pub fn refresh(&mut self) -> Result<u64> {
        let space = self.back_end.read_config(CONFIG_SIZE)?;
        self.set_config(space);
        Ok(self.capacity() * super::super::blk::SECTOR)
    }

    fn start(&mut self, features: u64, work: &mut Work<'_>) -> Result<()> {
        if !self.back_end.is_connected() {
            self.back_end.reconnect()?;
            self.refresh()?;
            log::info!("{}: connected again: {}", self.id, self.back_end.description());
        }
        self.back_end.start(features, work)
    }
}

impl Device for VhostUserBlk {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        // qemu-storage-daemon offers SIZE_MAX and leaves size_max zero.
        let field = |at: usize| self.config.get(at..at + 4).is_some_and(|b| b != [0; 4]);
        let meant = [(F_MQ, self.sizes.len() > 1), (F_SIZE_MAX, field(8)), (F_SEG_MAX, field(12))];
        meant.iter().fold(self.offered & F_PASSED, |all, (bit, means)| if *means { all } else { all & !bit })
    }

    fn ring_features(&self) -> u64 {
        self.offered & (F_EVENT_IDX | F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == WRITEBACK && data.len() == 1 {
            match self.back_end.write_config(WRITEBACK as u32, data) {
                Ok(()) => self.config[WRITEBACK as usize] = data[0],
                Err(e) => log::warn!("{}: {e}", self.id),
            }
        }
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
        let lost = |device: &Self, e: Error| {
            crate::notice::trouble(&device.id, e.to_string());
            device.ended.inc();
            QueueError("its back end is gone".into())
        };
        if std::mem::take(&mut self.event) {
            self.back_end.look(work.queues).map_err(|e| lost(self, e))?;
            // Who is parked rings by parking, who is not by the doorbell.
            if self.back_end.is_started() {
                return Ok(Progress::Done);
            }
        }
        match self.back_end.is_started() {
            true => self.back_end.ring(work),
            false => self.start(features, work).map_err(|e| lost(self, e))?,
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
        DeviceState::VhostUserBlk(VhostUserBlkState { capacity: self.capacity() })
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<()> {
        match state {
            DeviceState::VhostUserBlk(state) if state.capacity == self.capacity() => {
                self.active = Some(features);
                Ok(())
            }
            DeviceState::VhostUserBlk(state) => Err(Error::State(format!(
                "{}: the disk had {} sectors, it has {} here",
                self.id,
                state.capacity,
                self.capacity()
            ))),
            _ => Err(Error::State(format!("{}: not the state of a vhost-user disk", self.id))),
        }
    }

    fn metrics(&self, out: &mut Exposition) {
        let labels = &[("device", self.id.as_str())];
        let connected = f64::from(u8::from(self.back_end.is_connected()));
        out.gauge("vmm_vhost_user_connected", "Whether the back end is there.", labels, connected);
        out.counter("vmm_vhost_user_lost_total", "Times the back end was lost.", labels, &self.ended);
    }
}
