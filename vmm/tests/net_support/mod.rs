//! A vhost-user-net back end for tests: a wire between a guest's queues and a tap.
//!
//! It works the queues in the test's own process, as any other back end would in its own.

use std::fs::File;
use std::io::{Read, Result, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::port_support::{GUEST, Lab, MAC, Vmm, image};

/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Longest frame with its header.
const FRAME_MAX: usize = 70_000;
/// What an event of the tap is called.
const TAP: u16 = 3;
/// CSUM, GUEST_CSUM, HOST_TSO4, RING_INDIRECT_DESC, RING_EVENT_IDX, VERSION_1.
const FEATURES: u64 = 1 | 1 << 1 | 1 << 11 | 1 << 28 | 1 << 29 | 1 << 32;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

struct Wire {
    tap: File,
    memory: Memory,
    event_idx: bool,
}

fn open_tap(name: &str) -> File {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all-zero is a valid ifreq, each ioctl reads what its argument points to or takes it by value.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        assert_eq!(libc::ioctl(file.as_raw_fd(), 0x4004_54ca, &mut request), 0, "TUNSETIFF {name}");
        assert_eq!(libc::ioctl(file.as_raw_fd(), 0x4004_54d8, &(HEADER as libc::c_int)), 0, "TUNSETVNETHDRSZ");
        assert_eq!(libc::ioctl(file.as_raw_fd(), 0x4004_54d0, 1), 0, "TUNSETOFFLOAD: checksums");
    }
    file
}

impl Wire {
    fn send(&mut self, vring: &Vring) -> Result<()> {
        let memory = self.memory.memory();
        loop {
            let mut done = Vec::new();
            let mut state = vring.get_mut();
            while let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.clone()) {
                let head = chain.head_index();
                let mut frame = Vec::new();
                for piece in chain {
                    let at = frame.len();
                    frame.resize(at + piece.len() as usize, 0);
                    memory.read_slice(&mut frame[at..], piece.addr()).unwrap();
                }
                let _ = self.tap.write(&frame);
                done.push(head);
            }
            drop(state);
            for head in &done {
                vring.add_used(*head, 0).unwrap();
            }
            if !done.is_empty() && vring.needs_notification().unwrap() {
                vring.signal_used_queue()?;
            }
            if !vring.enable_notification().unwrap() {
                return Ok(());
            }
        }
    }

    fn receive(&mut self, vring: &Vring) -> Result<()> {
        let memory = self.memory.memory();
        let mut frame = vec![0; FRAME_MAX];
        while let Ok(len) = self.tap.read(&mut frame) {
            let Some(chain) = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                continue; // dropped
            };
            let head = chain.head_index();
            frame[10..12].copy_from_slice(&1u16.to_le_bytes());
            let mut rest = &frame[..len];
            for piece in chain {
                let (now, later) = rest.split_at(rest.len().min(piece.len() as usize));
                memory.write_slice(now, piece.addr()).unwrap();
                rest = later;
            }
            vring.add_used(head, len as u32).unwrap();
            if vring.needs_notification().unwrap() {
                vring.signal_used_queue()?;
            }
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Wire {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Memory) -> Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(&mut self, event: u16, _set: EventSet, vrings: &[Vring], _thread: usize) -> Result<()> {
        match event {
            1 => self.send(&vrings[1]),
            _ => self.receive(&vrings[0]),
        }
    }
}

/// Serves one connection at `socket`, in threads of its own; gives what ends that connection.
fn serve(socket: &Path, tap: &str) -> std::sync::mpsc::Receiver<ShutdownHandle> {
    let memory = Memory::new(GuestMemoryMmap::new());
    let tap = open_tap(tap);
    // SAFETY: dup of a descriptor that is open; the result is ours.
    let heard = unsafe { File::from_raw_fd(libc::dup(tap.as_raw_fd())) };
    let wire = std::sync::Arc::new(std::sync::RwLock::new(Wire { tap, memory: memory.clone(), event_idx: false }));
    let mut listener = Listener::new(socket, true).unwrap();
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut daemon = VhostUserDaemon::new("wire".into(), wire, memory).unwrap();
        for handler in daemon.get_epoll_handlers() {
            handler.register_listener(heard.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, TAP.into()).unwrap();
        }
        daemon.start(&mut listener).unwrap();
        let _ = tx.send(daemon.shutdown_handle().unwrap());
        let _ = daemon.wait();
        drop(heard);
    });
    rx
}

/// A guest that echoes, and whose network is served here, over `tap0`; and the end of that.
pub fn boot(lab: &Lab) -> (Vmm, ShutdownHandle) {
    let socket = lab.dir.path().join("wire.sock");
    let connected = serve(&socket, "tap0");
    let cmdline = format!("test=echo ip={GUEST}/24 log=warn");
    let net = format!("vhost_user={},mac={MAC},id=lan", socket.display());
    let args = ["--image", image().to_str().unwrap(), "--memory", "64M", "--cmdline", &cmdline, "--net", &net];
    let vmm = lab.spawn("boot", &args);
    (vmm, connected.recv().unwrap())
}
