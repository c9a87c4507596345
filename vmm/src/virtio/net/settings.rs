//! What a driver may change while it runs, and how it takes effect: queue pairs, offloads, receive filter, MAC.
//!
//! Always true: a command that makes no sense, or was for a feature that was not accepted, changes nothing; one that fails on
//! the host is answered with an error. Once the interface has vanished, everything succeeds and has no effect.

use super::control::Command;
use super::feature::*;
use super::{FRAME_MAX, HEADER_SIZE, Net, NetState, Pair, tap};
use crate::config::MacAddress;
use crate::error::{Error, Result};

impl Net {
    /// What only works while the interface is there.
    fn with_taps(&mut self, act: impl FnOnce(&mut [Pair]) -> Result<()>) -> Result<()> {
        if self.gone {
            return Ok(());
        }
        match act(&mut self.pairs) {
            Err(Error::Host { source, .. }) if tap::is_gone(&source) => {
                self.lose();
                Ok(())
            }
            result => result,
        }
    }

    pub(super) fn apply_offloads(&mut self) -> Result<()> {
        let offloads = self.offloads;
        self.with_taps(|pairs| pairs.first().map_or(Ok(()), |p| p.tap.set_offloads(offloads)))
    }

    pub(super) fn apply_filter(&mut self) -> Result<()> {
        let rule = match self.accepted & CTRL_RX {
            0 => None,
            _ => self.filter.rule(self.mac.0),
        };
        let rule = rule.as_ref().map(|(addresses, all)| (&addresses[..], *all));
        self.with_taps(|pairs| pairs.first_mut().map_or(Ok(()), |p| p.tap.set_filter(rule)))
    }

    /// Uses the first `active` pairs. What has come to a queue of the tap that is not used any more is delivered by the
    /// first if `keep`.
    pub(super) fn apply_pairs(&mut self, active: usize, keep: bool) -> Result<()> {
        self.active = active;
        let (mut left, mut aside) = (Vec::new(), Vec::new());
        let room = if keep { self.room() } else { 0 };
        let result = self.with_taps(|pairs| {
            for (i, pair) in pairs.iter_mut().enumerate() {
                while i >= active && pair.tap.is_attached() && left.len() < room {
                    match pair.tap.read_frame(FRAME_MAX, &mut aside) {
                        Ok(Some(frame)) if frame.len() >= HEADER_SIZE => left.push(frame),
                        Ok(Some(_)) => {}
                        Ok(None) | Err(_) => break,
                    }
                }
                pair.tap.set_attached(i < active)?;
                pair.receiver.tap_may_have_frames();
            }
            Ok(())
        });
        if !left.is_empty() {
            self.put_first(left);
        }
        result
    }

    pub(super) fn start(&mut self, features: u64, offloads: u64, active: usize, keep: bool) -> Result<()> {
        self.accepted = features;
        self.offloads = offloads;
        for pair in &mut self.pairs {
            pair.receiver.activate(features, self.mtu);
        }
        self.apply_offloads()?;
        self.apply_filter()?;
        self.apply_pairs(active, keep)
    }

    /// Takes over what is the guest's whether a driver runs or not.
    pub(super) fn take_identity(&mut self, state: &NetState) -> Result<()> {
        for mac in [state.own_mac, state.mac].map(MacAddress) {
            if mac.is_multicast() || mac == MacAddress::default() {
                return Err(Error::State(format!("{}: a MAC address that cannot be", self.id)));
            }
        }
        self.own_mac = MacAddress(state.own_mac);
        self.mac = MacAddress(state.mac);
        self.mtu = state.mtu;
        Ok(())
    }

    /// Carries out a command; false if it makes no sense.
    pub(super) fn command(&mut self, command: Command) -> bool {
        let has = |bit| self.accepted & bit != 0;
        let result = match command {
            Command::Promiscuous(on) if has(CTRL_RX) => {
                self.filter.promiscuous = on;
                self.apply_filter()
            }
            Command::AllMulticast(on) if has(CTRL_RX) => {
                self.filter.all_multicast = on;
                self.apply_filter()
            }
            Command::Tables(unicast, multicast) if has(CTRL_RX) => {
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
                self.apply_filter()
            }
            Command::Mac(mac) if has(CTRL_MAC_ADDR) => {
                self.mac = mac;
                self.apply_filter()
            }
            Command::Announced if has(GUEST_ANNOUNCE) => {
                self.announce = false;
                Ok(())
            }
            Command::Pairs(n) if has(MQ) && (1..=self.pairs.len()).contains(&n.into()) => {
                // While a port holds the tap back, what is in it may come from the source as well.
                let keep = !self.pairs.iter().any(|p| p.receiver.held);
                self.apply_pairs(n.into(), keep)
            }
            Command::Offloads(bits) if has(CTRL_GUEST_OFFLOADS) && bits & !(self.accepted & GUEST_OFFLOADS) == 0 => {
                self.offloads = bits;
                self.apply_offloads()
            }
            _ => return false,
        };
        if let Err(e) = &result {
            log::warn!("{}: {e}", self.id);
        }
        result.is_ok()
    }
}
