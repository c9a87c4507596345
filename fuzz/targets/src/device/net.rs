//! virtio-net on a tap in a network namespace of the thread's own, with a packet socket at the other end. Needs root.
//!
//! One more queue of the tap is held open as long as the thread lives, so that the interface is not made anew for each input.

use std::cell::OnceCell;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vmm::config::{MacAddress, NetConfig, Vhost};
use vmm::virtio::Device;
use vmm::virtio::net::Net;

use super::rng::limits;
use super::{Subject, drive, programs};
use crate::Target;
use crate::input::Input;

/// The device.
pub const TARGET: Target = Target { name: "net", run, seeds: programs, memory: 16 << 20, rounds: 200 };

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The other end of the tap.
struct Wire {
    socket: OwnedFd,
    _interface: Net,
}

thread_local! {
    static WIRE: OnceCell<Wire> = const { OnceCell::new() };
}

fn config(queues: u16) -> NetConfig {
    let mac = Some(MacAddress(MAC));
    NetConfig { id: "net0".into(), tap: Some("t0".into()), mac, queues, vhost: Vhost::Off, ..NetConfig::default() }
}

impl Wire {
    fn new() -> io::Result<Wire> {
        // SAFETY: no memory is involved; only this thread's view changes, and ends with it.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(Error::last_os_error());
        }
        // Nothing but the input is to send on the wire.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
        let interface = Net::open(&config(2)).map_err(Error::other)?;
        // SAFETY: no memory is involved; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all-zero is a valid address; the pointers are valid for their lengths.
        let rc = unsafe {
            let mut to: libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_ifindex = libc::if_nametoindex(c"t0".as_ptr()) as i32;
            libc::bind(socket.as_raw_fd(), (&raw const to).cast(), size_of_val(&to) as u32)
        };
        if rc == 0 { Ok(Wire { socket, _interface: interface }) } else { Err(Error::last_os_error()) }
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer is valid for its length. A frame that is not taken is lost, as on any wire.
        unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    }
}

struct Card<'a> {
    wire: &'a Wire,
    config: NetConfig,
}

impl Subject for Card<'_> {
    fn make(&mut self) -> Box<dyn Device> {
        match Net::open(&self.config) {
            Ok(net) => Box::new(net),
            Err(e) => panic!("{e}"),
        }
    }

    /// A command, or the header of a frame with the beginning of the frame.
    fn header(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        if input.below(2) == 0 {
            let mut out = vec![input.u8() % 7, input.u8() % 4];
            let n = input.below(4) as u32;
            match input.below(4) {
                0 => out.extend(n.to_le_bytes()),
                1 => {
                    out.extend(n.to_le_bytes());
                    out.extend(input.bytes(6 * n as usize));
                    out.extend(input.value().to_le_bytes());
                }
                _ => out.extend(input.value().to_le_bytes()),
            }
            return out;
        }
        let mut out = vec![input.u8() % 4, input.one_of(&[0, 0, 1, 4, 5, 0x81, 0xff])];
        for _ in 0..4 {
            let field = if input.below(2) == 0 { u16::from(input.u8()) } else { input.value() as u16 };
            out.extend(field.to_le_bytes());
        }
        out.extend([0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        out.extend(MAC);
        out.extend(input.one_of(&[0x0800u16, 0x86dd, 0x0806, 0x8035]).to_be_bytes());
        out.extend(input.bytes(40));
        out
    }

    fn outside(&mut self, input: &mut Input<'_>, device: &mut dyn Device) {
        if input.below(4) == 0 {
            let Some(net) = device.as_net() else { return };
            let (rx, tx) = (limits(input), limits(input));
            net.set_limits(Some(rx), Some(tx));
            return;
        }
        for _ in 0..1 + input.below(8) {
            let to = input.one_of(&[MAC, [0xff; 6], [0x33, 0x33, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9]]);
            let n = usize::from(input.u16()) % 1501;
            self.wire.send(&[&to[..], &[2, 0, 0, 0, 0, 2, 8, 0], &vec![7; n]].concat());
        }
    }
}

fn run(input: &[u8]) {
    WIRE.with(|wire| {
        let wire =
            wire.get_or_init(|| Wire::new().unwrap_or_else(|e| panic!("a network to test in (needs root): {e}")));
        let mut input = Input::new(input);
        let how = input.u8();
        let mut config = config(1 + u16::from(how) % 3);
        if how & 0x30 == 0x30 {
            config.rx_limits = limits(&mut input);
            config.tx_limits = limits(&mut input);
        }
        drive(input.rest(), &mut Card { wire, config });
    });
}
