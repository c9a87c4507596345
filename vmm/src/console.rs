//! Where the guest's text goes.
//!
//! Owns the output. A console that cannot take text loses it; the guest never waits for longer than one write.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::SerialOutput;
use crate::error::{Result, host};

/// Output shared by the platform device and the serial port.
#[derive(Debug, Clone)]
pub struct Console(Arc<Mutex<Option<Sink>>>);

#[derive(Debug)]
enum Sink {
    Stdout,
    File(File),
}

impl Console {
    /// Opens the output.
    pub fn open(output: &SerialOutput) -> Result<Console> {
        let sink = match output {
            SerialOutput::Stdout => Some(Sink::Stdout),
            SerialOutput::None => None,
            SerialOutput::File(path) => Some(Sink::File(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(host(format!("serial output {}", path.display())))?,
            )),
        };
        Ok(Console(Arc::new(Mutex::new(sink))))
    }
}

impl Write for Console {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let result = match &mut *sink {
            None => Ok(()),
            Some(Sink::Stdout) => {
                let mut out = std::io::stdout().lock();
                out.write_all(text).and_then(|()| out.flush())
            }
            Some(Sink::File(file)) => file.write_all(text),
        };
        if let Err(e) = result {
            log::warn!("console output ends: {e}");
            *sink = None;
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
