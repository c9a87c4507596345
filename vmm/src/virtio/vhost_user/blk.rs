//! virtio-blk whose queues another process works (vhost-user-blk), like qemu-storage-daemon.
//!
//! Owns the device's registers; the disk is the back end's. Always true: what the driver reads of the configuration is what the
//! back end said when it was last asked.

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::back_end::{BackEnd, Needs};
use super::{Registers, VhostUser};
use crate::config::DiskConfig;
use crate::error::Result;
use crate::virtio::{DeviceState, read_bytes};

const QUEUE_SIZE: u16 = 128;
/// `struct virtio_blk_config` up to and with the fields of write-zeroes.
const CONFIG_SIZE: usize = 60;
/// Where `num_queues` and `writeback` stand in it.
const NUM_QUEUES: usize = 34;
const WRITEBACK: usize = 32;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_MQ: u64 = 1 << 12;
/// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, DISCARD, WRITE_ZEROES: those that mean nothing to
/// the monitor.
const F_PASSED: u64 =
    F_SIZE_MAX | F_SEG_MAX | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | F_MQ | 1 << 13 | 1 << 14;

/// State that moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserBlkState {
    /// Size in sectors that the guest was told.
    pub capacity: u64,
}

/// A disk of another process.
pub type VhostUserBlk = VhostUser<DiskRegisters>;

/// Configuration space of a disk.
pub struct DiskRegisters {
    queues: u16,
    config: [u8; CONFIG_SIZE],
    config_changed: bool,
}

impl VhostUserBlk {
    /// Connects to the back end.
    pub fn open(config: &DiskConfig) -> Result<VhostUserBlk> {
        let path = config.vhost_user.as_deref().unwrap_or(&config.path);
        let sizes = vec![QUEUE_SIZE; config.queues.into()];
        VhostUser::connect(&config.id, path, sizes, |back_end| {
            let mut registers =
                DiskRegisters { queues: config.queues, config: [0; CONFIG_SIZE], config_changed: false };
            registers.config = registers.ask(back_end)?;
            Ok(registers)
        })
    }
}

impl DiskRegisters {
    /// What the back end says now. The driver is told of the queues there are here.
    fn ask(&self, back_end: &mut BackEnd) -> Result<[u8; CONFIG_SIZE]> {
        let mut config = [0; CONFIG_SIZE];
        for (to, from) in config.iter_mut().zip(back_end.read_config(CONFIG_SIZE)?) {
            *to = from;
        }
        config[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&self.queues.to_le_bytes());
        Ok(config)
    }

    fn capacity(&self) -> u64 {
        self.config.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }
}

impl Registers for DiskRegisters {
    const KIND: u32 = 2;
    const NEEDS: Needs = Needs { protocol: VhostUserProtocolFeatures::CONFIG, completes: true };

    fn features(&self, offered: u64) -> u64 {
        // qemu-storage-daemon offers SIZE_MAX and leaves size_max zero.
        let field = |at: usize| self.config.get(at..at + 4).is_some_and(|b| b != [0; 4]);
        let meant = [(F_MQ, self.queues > 1), (F_SIZE_MAX, field(8)), (F_SEG_MAX, field(12))];
        meant.iter().fold(offered & F_PASSED, |all, (bit, means)| if *means { all } else { all & !bit })
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, back_end: &mut BackEnd, offset: u64, data: &[u8]) -> Result<()> {
        if offset == WRITEBACK as u64 && data.len() == 1 {
            back_end.write_config(WRITEBACK as u32, data)?;
            self.config[WRITEBACK] = data[0];
        }
        Ok(())
    }

    fn connected(&mut self, back_end: &mut BackEnd) -> Result<()> {
        let now = self.ask(back_end)?;
        self.config_changed |= now != self.config;
        self.config = now;
        Ok(())
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn save(&self) -> DeviceState {
        DeviceState::VhostUserBlk(VhostUserBlkState { capacity: self.capacity() })
    }

    fn restore(&mut self, state: &DeviceState) -> std::result::Result<(), String> {
        let here = self.capacity();
        match state {
            DeviceState::VhostUserBlk(state) if state.capacity == here => Ok(()),
            DeviceState::VhostUserBlk(state) => {
                Err(format!("the disk had {} sectors, it has {here} here", state.capacity))
            }
            _ => Err("not the state of a vhost-user disk".into()),
        }
    }
}
