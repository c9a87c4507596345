//! What an operator does to a machine from outside: the power button.

use super::{Phase, Vm};
use crate::acpi::Event;
use crate::error::{Error, Result};

impl Vm {
    /// Presses the power button: a guest that listens (ACPI, `button` and something like acpid in Linux) shuts down and switches
    /// itself off. An error for guests that cannot hear it.
    pub fn power_button(&self) -> Result<()> {
        if self.phase() == Phase::Ended {
            return Err(Error::Conflict("the VM has ended".into()));
        }
        let mut devices = self.devices();
        if !devices.acpi().is_connected() {
            return Err(Error::Conflict("a guest that was started directly in ring 3 has no power button".into()));
        }
        devices.acpi().raise(Event::PowerButton);
        Ok(())
    }
}
