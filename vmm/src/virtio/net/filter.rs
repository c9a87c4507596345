//! Which frames a driver wants: its receive mode and address tables, as the rule its tap is given.
//!
//! The kernel drops what the rule does not let pass before anybody wakes up for it. Always true: the guest's own address
//! and broadcast pass, so a port's announcement always does; what a rule cannot express passes.

use serde::{Deserialize, Serialize};

use super::control::{TABLE_MAX, Table};
use super::tap::FILTER_EXACT;

const BROADCAST: [u8; 6] = [0xff; 6];

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Everything passes.
    pub promiscuous: bool,
    /// All multicast passes.
    pub all_multicast: bool,
    /// Further unicast addresses.
    pub unicast: Table,
    /// Multicast addresses.
    pub multicast: Table,
}

impl Default for Filter {
    /// As long as a driver has said nothing, everything passes.
    fn default() -> Filter {
        Filter { promiscuous: true, all_multicast: false, unicast: Table::default(), multicast: Table::default() }
    }
}

impl Filter {
    /// The addresses that pass, and whether all multicast does; `None` if everything does.
    pub fn rule(&self, mac: [u8; 6]) -> Option<(Vec<[u8; 6]>, bool)> {
        // The kernel compares only the first addresses exactly, and hashes none but multicast.
        if self.promiscuous || self.unicast.overflow || 2 + self.unicast.addresses.len() > FILTER_EXACT {
            return None;
        }
        let mut addresses = vec![mac, BROADCAST];
        addresses.extend(&self.unicast.addresses);
        addresses.extend(&self.multicast.addresses);
        Some((addresses, self.all_multicast || self.multicast.overflow))
    }

    /// Whether a driver could have brought the device to this.
    pub fn is_possible(&self) -> bool {
        self.unicast.addresses.len() <= TABLE_MAX && self.multicast.addresses.len() <= TABLE_MAX
    }
}
