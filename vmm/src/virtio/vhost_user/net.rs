//! virtio-net whose queues another process works (vhost-user-net), like a switch in user space.
//!
//! Owns the device's registers; frames never come by here. Always true: the driver is offered what back end and monitor both
//! know; there is no control queue, so nothing can be asked of the monitor while it runs. A back end that has died: the guest
//! sees its link go down, and up again when it has reset the device and there is another.

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::back_end::Needs;
use super::{Registers, VhostUser};
use crate::boot::info::random;
use crate::config::{MacAddress, NetConfig};
use crate::error::{Error, Result};
use crate::virtio::net::feature::{BASE, CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_VQ, GUEST_ANNOUNCE};
use crate::virtio::net::feature::{MAC, MQ, MTU, STATUS, USO};
use crate::virtio::{DeviceState, read_bytes};

const QUEUE_SIZE: u16 = 256;
const LINK_UP: u16 = 1;
/// Needs a control queue, which is not there.
const CONTROL: u64 = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | GUEST_ANNOUNCE;
/// Says what stands in the configuration space: the monitor's affair.
const OURS: u64 = MAC | STATUS;

/// A network device of another process.
pub type VhostUserNet = VhostUser<NetRegisters>;

/// Configuration space of a network device.
pub struct NetRegisters {
    mac: MacAddress,
    mtu: Option<u16>,
    link: bool,
    config_changed: bool,
}

impl VhostUserNet {
    /// Connects to the back end of the configuration.
    pub fn open(config: &NetConfig) -> Result<VhostUserNet> {
        let Some(path) = &config.vhost_user else {
            return Err(Error::Conflict(format!("{}: no back end given", config.id)));
        };
        VhostUser::connect(&config.id, path, vec![QUEUE_SIZE; 2], |_| {
            let mac = match config.mac {
                Some(mac) => mac,
                None => MacAddress::local(random()?),
            };
            Ok(NetRegisters { mac, mtu: config.mtu, link: true, config_changed: false })
        })
    }
}

impl Registers for NetRegisters {
    const KIND: u32 = 1;
    /// Receive buffers wait for frames.
    const NEEDS: Needs = Needs { protocol: VhostUserProtocolFeatures::empty(), completes: false };

    fn features(&self, offered: u64) -> u64 {
        let mtu = if self.mtu.is_some() { MTU } else { 0 };
        offered & (BASE | USO) & !(CONTROL | MQ | MTU) | OURS | mtu
    }

    fn accepted(&self, accepted: u64) -> u64 {
        accepted & !OURS & !MTU
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&(if self.link { LINK_UP } else { 0 }).to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn serves(&mut self, serves: bool) {
        self.config_changed |= std::mem::replace(&mut self.link, serves) != serves;
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }

    fn restore(&mut self, _state: &DeviceState) -> std::result::Result<(), String> {
        Err("a vhost-user device is neither ported nor restored".into())
    }
}
