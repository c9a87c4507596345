//! A tap: the host's side of a network device, or one queue of it.
//!
//! Owns one descriptor. Always true: frames carry a virtio-net header of [`HEADER_SIZE`] bytes; a filter that a driver asked
//! for is gone when the device is. Survives an interface that is deleted while it is used: see [`is_gone`].

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
const TUNSETTXFILTER: u64 = 0x4004_54d1;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETQUEUE: u64 = 0x4004_54d9;
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;
const TUN_F_USO4: u64 = 32;
const TUN_F_USO6: u64 = 64;
const TUN_FLT_ALLMULTI: u16 = 1;
/// Addresses the kernel compares exactly; beyond these it filters multicast by a hash, and unicast not at all.
pub const FILTER_EXACT: usize = 8;

/// An open tap, or one queue of it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    attached: bool,
    filtered: bool,
}

/// Whether an error of reading or writing says that the interface does not exist any more.
pub fn is_gone(e: &IoError) -> bool {
    e.raw_os_error() == Some(libc::EBADFD)
}

impl Tap {
    /// Opens the tap of a configuration, as often as it has queues: by descriptor, or by name (made, and brought up, if
    /// there is none).
    pub fn open(config: &NetConfig) -> Result<Vec<Tap>> {
        let mut taps = Vec::new();
        match (config.fd, &config.tap) {
            (Some(fd), _) => taps.push(Tap::from_fd(fd)?),
            (None, Some(name)) if config.queues > 1 => {
                for _ in 0..config.queues {
                    taps.push(Tap::attach(name, true)?);
                }
            }
            (None, Some(name)) => taps.push(match Tap::attach(name, false) {
                // One that was made for several queues has to be opened as such.
                Err(Error::Host { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    Tap::attach(name, true)?
                }
                result => result?,
            }),
            (None, None) => return Err(Error::Conflict(format!("{}: no tap given", config.id))),
        }
        for tap in &mut taps {
            let size = HEADER_SIZE as libc::c_int;
            // SAFETY: the ioctl reads one int.
            tap.check("header size", unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETVNETHDRSZ, &size) })?;
            tap.set_filter(None)?;
            tap.set_offloads(0)?;
        }
        if let Some(tap) = taps.first() {
            tap.bring_up()?;
        }
        Ok(taps)
    }

    fn attach(name: &str, several: bool) -> Result<Tap> {
        let what = || format!("tap {name}");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(host(format!("{}: /dev/net/tun", what())))?;
        let mut request = request(name);
        let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues) as i16;
        // SAFETY: the ioctl reads and writes one ifreq.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } < 0 {
            let e = IoError::last_os_error();
            let hint = match e.raw_os_error() {
                Some(libc::EBUSY) => " (another process uses it)",
                Some(libc::EPERM) => " (needs CAP_NET_ADMIN)",
                Some(libc::ENOTTY) => " (/dev/net/tun is not the device for taps)",
                Some(libc::EINVAL) if several => {
                    " (not a tap, or one without several queues: make it with `ip tuntap add … multi_queue`)"
                }
                Some(libc::EINVAL) => " (not a tap, or one with other flags)",
                Some(libc::E2BIG) => " (it has no queue left: another process uses it)",
                _ => "",
            };
            return Err(host(what() + hint)(e));
        }
        Ok(Tap { file, name: name.to_owned(), attached: true, filtered: false })
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
        let tap = Tap { file, name, attached: true, filtered: false };
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

    /// The descriptor, for the kernel to use.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the kernel hands frames to this queue.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Attaches or detaches this queue. What is in a queue that is detached is lost: read it before.
    pub fn set_attached(&mut self, attached: bool) -> Result<()> {
        if attached == self.attached {
            return Ok(());
        }
        let mut request = request("");
        request.ifr_ifru.ifru_flags = (if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE }) as i16;
        // SAFETY: the ioctl reads one ifreq.
        self.check("queue", unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETQUEUE, &request) })?;
        self.attached = attached;
        Ok(())
    }

    /// Lets the kernel drop frames to other addresses than these (all multicast passes with `all_multicast`); `None`
    /// lets everything pass. The filter is the interface's: any of its queues sets it for all.
    pub fn set_filter(&mut self, filter: Option<(&[[u8; 6]], bool)>) -> Result<()> {
        let (addresses, all_multicast) = filter.unwrap_or_default();
        let count = u16::try_from(addresses.len()).unwrap_or(0);
        // struct tun_filter; no addresses mean no filter.
        let mut filter = Vec::new();
        filter.extend((if all_multicast { TUN_FLT_ALLMULTI } else { 0 }).to_ne_bytes());
        filter.extend(count.to_ne_bytes());
        filter.extend(addresses.iter().take(usize::from(count)).flatten());
        // SAFETY: the ioctl reads the count and as many addresses, all of which are there.
        self.check("filter", unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETTXFILTER, filter.as_ptr()) })?;
        self.filtered = count > 0;
        Ok(())
    }

    /// Whether the kernel cuts and joins UDP (Linux 6.2). Leaves all offloads off.
    pub fn knows_udp_segmentation(&self) -> bool {
        let flags = TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6;
        // SAFETY: the ioctl takes its argument by value.
        let known = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) } == 0;
        self.set_offloads(0).is_ok() && known
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
                (feature::GUEST_USO4, TUN_F_USO4),
                (feature::GUEST_USO6, TUN_F_USO6),
            ] {
                if features & bit != 0 {
                    flags |= flag;
                }
            }
            if flags & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
                flags &= !TUN_F_TSO_ECN;
            }
            // The kernel takes both or none.
            if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
                flags &= !(TUN_F_USO4 | TUN_F_USO6);
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

    /// Reads one frame of at most `max` bytes, by way of `aside`, to be given again: that grows once, so that a frame costs no more
    /// memory than it is long, and a look at an empty tap none.
    pub fn read_frame(&self, max: usize, aside: &mut Vec<u8>) -> io::Result<Option<Frame>> {
        if aside.len() < max {
            aside.resize(max, 0);
        }
        let piece = IoVec(libc::iovec { iov_base: aside.as_mut_ptr().cast(), iov_len: max });
        Ok(self.read(&[piece])?.map(|n| aside[..n].to_vec()))
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

impl Drop for Tap {
    fn drop(&mut self) {
        // A tap that stays is not to be deaf for who uses it next. If it has vanished there is nothing to do.
        if self.filtered {
            let _ = self.set_filter(None);
        }
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
