//! ACPI: the tables that describe the machine ([`tables`]), and the few registers they name.
//!
//! The machine is a hardware-reduced one: sleep and reset registers instead of PM1 blocks, and one Generic Event Device
//! whose interrupt says that [`EVENT_PORT`] holds something. Always true: an event that was raised is seen by the guest,
//! also across a save and restore: its bit stays until the guest reads the register.

pub mod generation;
pub mod tables;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::{EVENT_PORT, RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};

/// Keyboard controller command port and its reset command: the oldest way to reset a PC.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// Reset control register of PC chipsets, and its bit that resets.
const CHIPSET_RESET: u16 = 0xcf9;
const CHIPSET_RESET_NOW: u8 = 4;
/// What the FADT says is to be written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, soft off.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// Bits of the event register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// The power button was pressed.
    PowerButton = 1,
    /// The VM generation id has changed.
    Generation = 2,
}

/// What a guest wants when it writes to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Begin again.
    Reset,
    /// The end.
    PowerOff,
}

/// Whether a write to a port is one of the commands.
pub fn command(port: u16, data: &[u8]) -> Option<Command> {
    let [value] = *data else { return None };
    match (port, value) {
        (I8042_COMMAND, I8042_RESET) | (RESET_PORT, RESET_VALUE) => Some(Command::Reset),
        (CHIPSET_RESET, value) if value & CHIPSET_RESET_NOW != 0 => Some(Command::Reset),
        (SLEEP_CONTROL_PORT, value) => {
            let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            (value & SLEEP_ENABLE != 0 && kind == SLEEP_TYPE_OFF).then_some(Command::PowerOff)
        }
        _ => None,
    }
}

/// State of the registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiState {
    /// Events the guest has not read yet.
    pub events: u32,
}

/// The registers.
#[derive(Debug, Default)]
pub struct Registers {
    events: u32,
    irq: Option<EventFd>,
}

impl Registers {
    /// With an interrupt, where there is an interrupt controller.
    pub fn new(irq: Option<EventFd>) -> Registers {
        Registers { events: 0, irq }
    }

    /// Whether the guest can be told anything.
    pub fn is_connected(&self) -> bool {
        self.irq.is_some()
    }

    /// Something happens.
    pub fn raise(&mut self, event: Event) {
        self.events |= event as u32;
        self.interrupt();
    }

    fn interrupt(&self) {
        if let Some(irq) = &self.irq {
            let _ = irq.write(1);
        }
    }

    /// A read from a port; false: not one of these.
    pub fn read(&mut self, port: u16, data: &mut [u8]) -> bool {
        match port {
            EVENT_PORT if data.len() == 4 => {
                data.copy_from_slice(&std::mem::take(&mut self.events).to_le_bytes());
                true
            }
            // Never asleep, so never woken.
            SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT => {
                data.fill(0);
                true
            }
            _ => false,
        }
    }

    /// A write to a port that is no [`command`]; false: not one of these.
    pub fn write(&mut self, port: u16) -> bool {
        matches!(port, SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT | EVENT_PORT)
    }

    /// As after power on.
    pub fn reset(&mut self) {
        self.events = 0;
    }

    /// The state.
    pub fn save(&self) -> AcpiState {
        AcpiState { events: self.events }
    }

    /// Takes over a saved state.
    pub fn restore(&mut self, state: AcpiState, irq: Option<EventFd>) {
        self.events = state.events & (Event::PowerButton as u32 | Event::Generation as u32);
        self.irq = irq;
        // The interrupt may have been on its way; one too many does no harm.
        if self.events != 0 {
            self.interrupt();
        }
    }
}

#[cfg(test)]
mod tests;
