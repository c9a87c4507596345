//! The 16550 at 0x3f8, with the console behind it.
//!
//! Owns its registers and its receive buffer of [`BUFFER`] bytes. Always true: input is taken from the console only when the
//! guest has enabled the interrupt for it (what is typed earlier waits with the kernel and is not lost to the driver's
//! initialisation; nor is it given at the instant all interrupts are enabled, which is a probe), and only as much as the buffer has room for; nothing is taken while the VM is being saved, and what
//! was taken is part of the saved state.

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState as RawState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;
use crate::error::{Error, Result, host};
pub use crate::layout::{SERIAL_GSI, SERIAL_PORT};

/// Number of ports.
pub const SERIAL_PORTS: u16 = 8;
/// Bytes of input it holds.
pub const BUFFER: usize = 64;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const MODEM_CONTROL: u8 = 4;
/// The guest wants an interrupt for input.
const ENABLE_RECEIVE: u8 = 1;
/// All interrupts at once, as drivers write it for a moment to find out what the port is (Linux, `autoconfig`); they throw away
/// then what they read.
const ENABLE_ALL: u8 = 0x0f;
/// What is sent comes back: not the time for input.
const LOOPBACK: u8 = 0x10;

/// The serial port's interrupt: an irqfd where there is an interrupt controller.
#[derive(Debug)]
struct Interrupt(Option<EventFd>);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |fd| fd.write(1))
    }
}

/// What is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor, IER, IIR, LCR, LSR, MCR, MSR, scratch.
    pub registers: [u8; 9],
    /// Input the guest has not read yet, at most [`BUFFER`] bytes.
    pub input: Vec<u8>,
}

/// See the module.
pub struct SerialPort {
    serial: Serial<Interrupt, NoEvents, Console>,
    console: Console,
    stopped: bool,
    /// The console may have more than there was room for.
    more: bool,
}

impl SerialPort {
    /// A port after a reset.
    pub fn new(console: Console, irq: Option<EventFd>) -> SerialPort {
        let serial = Serial::new(Interrupt(irq), console.clone());
        SerialPort { serial, console, stopped: false, more: true }
    }

    /// The guest reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.serial.read(offset);
        if offset == DATA && self.more && self.serial.fifo_capacity() == BUFFER {
            self.take_input();
        }
        value
    }

    /// The guest writes a register.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(e) = self.serial.write(offset, value) {
            log::debug!("serial port: {e:?}");
        }
        let probe = offset == INTERRUPT_ENABLE && value & ENABLE_ALL == ENABLE_ALL;
        if matches!(offset, INTERRUPT_ENABLE | MODEM_CONTROL) && self.more && !probe {
            self.take_input();
        }
    }

    /// The console may have input.
    pub fn take_input(&mut self) {
        self.more = true;
        self.console.look();
        let state = self.serial.state();
        if self.stopped || state.interrupt_enable & ENABLE_RECEIVE == 0 || state.modem_control & LOOPBACK != 0 {
            return;
        }
        let mut bytes = [0; BUFFER];
        while let room @ 1.. = self.serial.fifo_capacity() {
            let n = self.console.read(&mut bytes[..room.min(BUFFER)]);
            if n == 0 {
                self.more = false;
                break;
            }
            if let Err(e) = self.serial.enqueue_raw_bytes(&bytes[..n]) {
                log::debug!("serial port: {e:?}");
            }
        }
    }

    /// As at power-on. Input the guest has not read is lost, what the console still has is not.
    pub fn reset(&mut self) -> Result<()> {
        let irq = self.serial.interrupt_evt().0.as_ref().map(EventFd::try_clone).transpose();
        self.serial = Serial::new(Interrupt(irq.map_err(host("eventfd"))?), self.console.clone());
        self.more = true;
        Ok(())
    }

    /// Takes no input until [`SerialPort::resume`].
    pub fn stop_input(&mut self) {
        self.stopped = true;
    }

    /// Goes on.
    pub fn resume(&mut self) {
        self.stopped = false;
        self.take_input();
    }

    /// What is to be saved; only after [`SerialPort::stop_input`].
    pub fn save(&self) -> SerialState {
        let s = self.serial.state();
        let registers = [
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.interrupt_enable,
            s.interrupt_identification,
            s.line_control,
            s.line_status,
            s.modem_control,
            s.modem_status,
            s.scratch,
        ];
        SerialState { registers, input: s.in_buffer }
    }

    /// Takes over a saved state, and stays stopped.
    pub fn restore(&mut self, state: &SerialState, irq: Option<EventFd>) -> Result<()> {
        let [low, high, ier, iir, lcr, lsr, mcr, msr, scratch] = state.registers;
        if state.input.len() > BUFFER {
            return Err(Error::State(format!("serial port: {} bytes of input, at most {BUFFER}", state.input.len())));
        }
        let raw = RawState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: state.input.clone(),
        };
        self.serial = Serial::from_state(&raw, Interrupt(irq), NoEvents, self.console.clone())
            .map_err(|e| Error::State(format!("serial port: {e:?}")))?;
        self.stopped = true;
        Ok(())
    }

    /// Where a terminal program finds the console, if it is a pseudo terminal.
    pub fn pty(&self) -> Option<std::path::PathBuf> {
        self.console.pty()
    }
}

#[cfg(test)]
mod tests;
