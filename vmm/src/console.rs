//! Where the guest's text goes, and where what is typed to it comes from.
//!
//! Owns both ends. A console that cannot take text (its disk is full, say) loses it, and says so once; what comes when it can again is
//! there again. The guest never waits for longer than one write. Input is read only
//! as far as the serial port has room for it ([`Console::read`] never waits): the rest stays with the kernel, so no more than
//! that is ever held here. A terminal gets its own settings back however the process ends ([`terminal`]).

mod pty;
mod socket;
mod terminal;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::SerialOutput;
use crate::error::{Result, host};
use pty::Pty;
use socket::Socket;
use terminal::Input;

/// Output shared by the platform device and the serial port, and input for the latter.
#[derive(Debug, Clone)]
pub struct Console {
    sink: Arc<Mutex<Sink>>,
    /// What was written last was lost.
    losing: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Sink {
    None,
    Stdout,
    Stdio(Input),
    File(File, PathBuf),
    Socket(Socket),
    Pty(Pty),
}

impl Console {
    /// Opens both ends. With `stdio` on a terminal, its settings change until the process ends.
    pub fn open(output: &SerialOutput) -> Result<Console> {
        let sink = match output {
            SerialOutput::Stdout => Sink::Stdout,
            SerialOutput::None => Sink::None,
            SerialOutput::Stdio => Sink::Stdio(Input::open()?),
            SerialOutput::File(path) => Sink::File(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(host(format!("serial output {}", path.display())))?,
                path.clone(),
            ),
            SerialOutput::Socket(path) => Sink::Socket(Socket::bind(path)?),
            SerialOutput::Pty => {
                let pty = Pty::open()?;
                let text = format!("the console is {}", pty.path().display());
                // A file on a full disk, perhaps: no reason not to start.
                let _ = writeln!(io::stderr(), "vmm: {text}");
                crate::notice::device("serial", &text);
                Sink::Pty(pty)
            }
        };
        Ok(Console { sink: Arc::new(Mutex::new(sink)), losing: Arc::default() })
    }

    fn sink(&self) -> MutexGuard<'_, Sink> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor that is ready when there may be input; edges are enough. `None`: there is never any.
    pub fn descriptor(&self) -> Option<RawFd> {
        match &*self.sink() {
            Sink::Stdio(input) => Some(input.as_raw_fd()),
            Sink::Socket(socket) => Some(socket.as_raw_fd()),
            Sink::Pty(pty) => Some(pty.as_raw_fd()),
            Sink::None | Sink::Stdout | Sink::File(..) => None,
        }
    }

    /// Where a terminal program finds the console, if it is a pseudo terminal.
    pub fn pty(&self) -> Option<PathBuf> {
        match &*self.sink() {
            Sink::Pty(pty) => Some(pty.path().to_owned()),
            _ => None,
        }
    }

    /// Obeys what is typed for the monitor, whether or not the guest takes input.
    pub fn look(&self) {
        if let Sink::Stdio(input) = &mut *self.sink() {
            input.look();
        }
    }

    /// Takes the input there is, at most what `buffer` has room for; zero: none at present.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        match &mut *self.sink() {
            Sink::Stdio(input) => input.read(buffer),
            Sink::Socket(socket) => socket.read(buffer),
            Sink::Pty(pty) => pty.read(buffer),
            Sink::None | Sink::Stdout | Sink::File(..) => 0,
        }
    }
}

impl Write for Console {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut sink = self.sink();
        let result = match &mut *sink {
            Sink::None => Ok(()),
            Sink::Stdout | Sink::Stdio(_) => {
                let mut out = io::stdout().lock();
                out.write_all(text).and_then(|()| out.flush())
            }
            Sink::File(file, _) => file.write_all(text),
            // Nobody there, or somebody who does not read: lost.
            Sink::Socket(socket) => {
                socket.write(text);
                Ok(())
            }
            Sink::Pty(pty) => {
                pty.write(text);
                Ok(())
            }
        };
        let losing = result.is_err();
        if self.losing.swap(losing, Ordering::Relaxed) != losing {
            let name = match &*sink {
                Sink::File(_, path) => path.display().to_string(),
                _ => "standard output".into(),
            };
            match result {
                Ok(()) => log::info!("console: {name} takes text again"),
                Err(e) => log::warn!("console: {name}: {e}; what the guest prints is lost until that changes"),
            }
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One read that does not wait; `None` when there is nothing at present, zero at the end.
fn read_now(fd: RawFd, buffer: &mut [u8]) -> Option<usize> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // The descriptor may be shared with other processes, so it is not made non-blocking.
    // SAFETY: one entry, valid for the call.
    if unsafe { libc::poll(&mut poll, 1, 0) } <= 0 || poll.revents == 0 {
        return None;
    }
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    match usize::try_from(n) {
        Ok(n) => Some(n),
        Err(_) => match io::Error::last_os_error().kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => None,
            _ => Some(0),
        },
    }
}

#[cfg(test)]
mod tests;
