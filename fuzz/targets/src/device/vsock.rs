//! virtio-vsock, with programs of the host that connect, write and hang up.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;
use vmm::config::VsockConfig;
use vmm::virtio::Device;
use vmm::virtio::vsock::Vsock;

use super::{Subject, drive, programs};
use crate::Target;
use crate::input::Input;

/// The device.
pub const TARGET: Target = Target { name: "vsock", run, seeds: programs, memory: 48 << 20, rounds: 300 };

const CID: u64 = 3;
/// Where a program of the host listens for the guest.
const PORT: u32 = 1024;
const STREAMS_MAX: usize = 8;

struct Host {
    dir: TempDir,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Host {
    fn new() -> std::io::Result<Host> {
        let dir = tempfile::tempdir()?;
        let listener = UnixListener::bind(dir.path().join(format!("v_{PORT}")))?;
        listener.set_nonblocking(true)?;
        Ok(Host { dir, listener, streams: Vec::new() })
    }
}

impl Subject for Host {
    fn make(&mut self) -> Box<dyn Device> {
        match Vsock::open("vsock0", &VsockConfig { cid: CID as u32, path: self.dir.path().join("v") }) {
            Ok(vsock) => Box::new(vsock),
            Err(e) => panic!("{e}"),
        }
    }

    fn header(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let right = input.u8();
        let mut rare = |usual: u64, bit: u8| if right & 0xf == bit { input.value() } else { usual };
        let (src, dst, kind) = (rare(CID, 1), rare(2, 2), rare(1, 3));
        let ports = [u32::from(input.u8() % 4), input.one_of(&[PORT, PORT, 1 << 30, (1 << 30) + 1, 7, u32::MAX])];
        let op = input.one_of(&[1u16, 2, 3, 4, 5, 5, 5, 6, 7, 0, 0xffff]);
        let len = if input.below(2) == 0 { u32::from(input.u16()) } else { input.value() as u32 };
        let (flags, room, read) = (u32::from(input.u8() % 4), input.value() as u32, input.value() as u32);
        let mut out = [src.to_le_bytes(), dst.to_le_bytes()].concat();
        ports.iter().for_each(|p| out.extend(p.to_le_bytes()));
        out.extend(len.to_le_bytes());
        out.extend((kind as u16).to_le_bytes());
        out.extend(op.to_le_bytes());
        [flags, room, read].iter().for_each(|v| out.extend(v.to_le_bytes()));
        out
    }

    fn outside(&mut self, input: &mut Input<'_>, _device: &mut dyn Device) {
        let which = input.below(self.streams.len());
        match input.below(6) {
            0 | 1 if self.streams.len() < STREAMS_MAX => {
                let Ok(mut stream) = UnixStream::connect(self.dir.path().join("v")) else { return };
                let _ = stream.set_nonblocking(true);
                let line = match input.below(3) {
                    0 => "CONNECT 52\n".into(),
                    1 => format!("CONNECT {}\n", input.value()),
                    _ => String::from_utf8_lossy(input.bytes(16)).into_owned(),
                };
                let _ = stream.write_all(line.as_bytes());
                self.streams.push(stream);
            }
            2 if self.streams.len() < STREAMS_MAX => {
                if let Ok((stream, _)) = self.listener.accept() {
                    let _ = stream.set_nonblocking(true);
                    self.streams.push(stream);
                }
            }
            3 if !self.streams.is_empty() => {
                drop(self.streams.remove(which));
            }
            4 => {
                if let Some(stream) = self.streams.get_mut(which) {
                    let _ = stream.read(&mut [0; 4096]);
                }
            }
            _ => {
                let n = usize::from(input.u16());
                if let Some(stream) = self.streams.get_mut(which) {
                    let _ = stream.write(&vec![7; n]);
                }
            }
        }
    }
}

fn run(input: &[u8]) {
    let mut host = Host::new().unwrap_or_else(|e| panic!("{e}"));
    drive(input, &mut host);
}
