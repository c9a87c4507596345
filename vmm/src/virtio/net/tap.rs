//! A tap: the host's side of a network device.

use std::fs::{File, OpenOptions};
use std::io::{self, Error as IoError};
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{Frame, HEADER_SIZE, feature};
use crate::config::NetConfig;
use crate::error::{Error, Result, host};
use crate::memory::IoVec;

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;

/// An open tap whose frames carry a virtio-net header of [`HEADER_SIZE`] bytes.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the tap of a configuration: by descriptor, or by name (made, and brought up, if there is none).
    pub fn open(config: &NetConfig) -> Result<Tap> {
        let tap = match (config.fd, &config.tap) {
            (Some(fd), _) => Tap::from_fd(fd)?,
            (None, Some(name)) => Tap::attach(name)?,
            (None, None) => return Err(Error::Conflict(format!("{}: no tap given", config.id))),
        };
        let size = HEADER_SIZE as libc::c_int;
        // SAFETY: the ioctl reads one int.
        tap.check("header size", unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETVNETHDRSZ, &size) })?;
        tap.bring_up()?;
        Ok(tap)
    }

    fn attach(name: &str) -> Result<Tap> {
        let what = || format!("tap {name}");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(host(format!("{}: /dev/net/tun", what())))?;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        // SAFETY: the ioctl reads and writes one ifreq.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } < 0 {
            let e = IoError::last_os_error();
            let hint = match e.raw_os_error() {
                Some(libc::EBUSY) => " (another process uses it)",
                Some(libc::EPERM) => " (needs CAP_NET_ADMIN)",
                Some(libc::EINVAL) => " (not a tap, or one with other flags)",
                _ => "",
            };
            return Err(host(what() + hint)(e));
        }
        Ok(Tap { file, name: name.to_owned() })
    }

    fn from_fd(fd: RawFd) -> Result<Tap> {
        let mut request = request("");
        // SAFETY: the ioctl writes one ifreq; a descriptor that is no tap makes it fail.
        if unsafe { libc::ioctl(fd, TUNGETIFF, &mut request) } < 0 {
            return Err(host(format!("descriptor {fd} is not a tap"))(IoError::last_os_error()));
        }
        // SAFETY: the kernel has set the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 || flags & libc::IFF_VNET_HDR == 0 {
            return Err(Error::Conflict(format!("descriptor {fd}: must be a tap opened with IFF_VNET_HDR")));
        }
        // SAFETY: the configuration gives us this descriptor, and it was just seen to be a tap.
        let file = unsafe { File::from_raw_fd(fd) };
        // SAFETY: no memory is involved.
        let rc = unsafe {
            libc::fcntl(fd, libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK)
                | libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC)
        };
        let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect();
        let tap = Tap { file, name };
        tap.check("flags", rc)?;
        Ok(tap)
    }

    fn check(&self, what: &str, rc: libc::c_int) -> Result<()> {
        if rc < 0 { Err(host(format!("tap {}: {what}", self.name))(IoError::last_os_error())) } else { Ok(()) }
    }

    /// Asks the network stack about the interface, through any socket.
    fn socket_ioctl(&self, op: u64, request: &mut libc::ifreq) -> Result<()> {
        // SAFETY: no memory is involved; the result is checked by the next call.
        let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        // SAFETY: the ioctl reads and writes one ifreq.
        let result = self.check("interface", unsafe { libc::ioctl(socket, op, request) });
        if socket >= 0 {
            // SAFETY: the socket is ours.
            unsafe { libc::close(socket) };
        }
        result
    }

    fn bring_up(&self) -> Result<()> {
        let mut request = request(&self.name);
        self.socket_ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has set the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if flags & libc::IFF_UP as i16 == 0 {
            request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
            self.socket_ioctl(libc::SIOCSIFFLAGS, &mut request)?;
        }
        Ok(())
    }

    /// The interface's MTU.
    pub fn mtu(&self) -> Result<u16> {
        let mut request = request(&self.name);
        self.socket_ioctl(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel has set the MTU.
        Ok(u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(u16::MAX))
    }

    /// Lets the kernel hand over frames with the offloads the guest accepts.
    pub fn set_offloads(&self, features: u64) -> Result<()> {
        let mut flags = 0;
        if features & feature::GUEST_CSUM != 0 {
            flags |= TUN_F_CSUM;
            for (bit, flag) in [
                (feature::GUEST_TSO4, TUN_F_TSO4),
                (feature::GUEST_TSO6, TUN_F_TSO6),
                (feature::GUEST_ECN, TUN_F_TSO_ECN),
            ] {
                if features & bit != 0 {
                    flags |= flag;
                }
            }
            if flags & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
                flags &= !TUN_F_TSO_ECN;
            }
        }
        // SAFETY: the ioctl takes its argument by value.
        self.check("offloads", unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) })
    }

    /// Reads one frame, with its header, into `pieces`; `None` if there is none.
    pub fn read(&self, pieces: &[IoVec]) -> io::Result<Option<usize>> {
        // SAFETY: `IoVec` is a transparent iovec; each is guest memory or a buffer that is there for the call.
        let n = unsafe { libc::readv(self.file.as_raw_fd(), pieces.as_ptr().cast(), pieces.len() as libc::c_int) };
        match usize::try_from(n) {
            Ok(n) => Ok(Some(n)),
            Err(_) => match IoError::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Reads one frame of at most `max` bytes aside.
    pub fn read_frame(&self, max: usize) -> io::Result<Option<Frame>> {
        let mut frame = vec![0u8; max];
        let piece = IoVec(libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() });
        let n = self.read(&[piece])?;
        Ok(n.map(|n| {
            frame.truncate(n);
            frame.shrink_to_fit();
            frame
        }))
    }

    /// Sends one frame, with its header, from `pieces`.
    pub fn write(&self, pieces: &[IoVec]) -> io::Result<()> {
        // SAFETY: `IoVec` is a transparent iovec; each is guest memory or a buffer that is there for the call.
        let n = unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr().cast(), pieces.len() as libc::c_int) };
        if n < 0 { Err(IoError::last_os_error()) } else { Ok(()) }
    }

    /// Sends one frame, with its header.
    pub fn write_frame(&self, frame: &[u8]) -> io::Result<()> {
        self.write(&[IoVec(libc::iovec { iov_base: frame.as_ptr() as *mut _, iov_len: frame.len() })])
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// A request about an interface. The name was checked to be short enough with the configuration; it is cut here if not.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}
