//! TCP over IPv4 for one network device: [`Stack`], [`Listener`], [`TcpStream`].
//!
//! smoltcp does the protocol; this module gives it the device, polls it from the executor, and puts an asynchronous
//! interface on its sockets. Owns the sockets: one that nobody holds any more is closed and freed when its peer is
//! done with it, at the latest after [`LINGER`].
//! Always true: smoltcp is polled whenever a frame has come, a socket was touched or its timer is due, at most
//! [`INGRESS_BATCH`] frames at a time; there is a listening socket for each [`Listener`] whose backlog is not full.
//! Survives: peers that vanish (keep-alive and time-outs free their sockets), floods of SYN (bounded backlog).
mod announce;
mod config;
mod connections;
mod device;
mod listener;
mod segment;
mod stream;
mod window;

pub use config::{Cidr, Config, ConfigError};
pub use core::net::{Ipv4Addr, SocketAddrV4};
pub use listener::{ListenError, Listener};
pub use stream::{ConnectError, ReadHalf, TcpError, TcpStream, WriteHalf};

use crate::exec::{self, Device};
use crate::rng;
use crate::time::{Duration, Instant};
use crate::virtio::net::{NetDevice, NetStatistics, RxBuffers};
use alloc::{rc::Rc, rc::Weak, vec::Vec};
use core::cell::{Cell, RefCell};
use device::SmolDevice;
use listener::ListenerState;
use smoltcp::iface::{Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

/// Most frames taken from the device before the tasks have their turn again.
pub const INGRESS_BATCH: usize = 64;
/// Most rounds of sending before the tasks have their turn again.
const EGRESS_ROUNDS: usize = 64;
/// How long a socket nobody holds may take to say goodbye.
pub const LINGER: Duration = Duration::from_secs(10);
/// How long the reset of a socket that lingered too long may take to be sent.
const RESET_PATIENCE: Duration = Duration::from_secs(1);
/// An idle connection is probed this often.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A peer that answers nothing for so long is gone.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a connection may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// When the device has no room the stack looks again after this time.
const BLOCKED_RETRY: Duration = Duration::from_millis(1);
/// When something is due that cannot be done, the stack tries again after this time.
const STUCK_RETRY: Duration = Duration::from_millis(5);
/// Smallest socket buffer.
const MIN_BUFFER: usize = 1024;
/// A new connection is only taken if a block of so many bytes is still free afterwards.
pub const HEADROOM: usize = 1 << 20;
/// Ports for outgoing connections.
const EPHEMERAL: core::ops::Range<u16> = 49152..65535;

/// Sizes of a socket's buffers, in bytes. The receive buffer is the TCP window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Received and not yet read.
    pub rx: usize,
    /// Written and not yet acknowledged.
    pub tx: usize,
}

impl Default for Buffers {
    /// 256 KiB each.
    fn default() -> Self {
        Buffers { rx: 256 << 10, tx: 256 << 10 }
    }
}

/// A TCP/IP stack on one network device. Clones are the same stack.
#[derive(Clone)]
pub struct Stack(Rc<StackInner>);

struct StackInner {
    net: RefCell<Net>,
    /// A socket was touched: poll.
    touched: Cell<bool>,
    /// When smoltcp's next timer is due.
    deadline: Cell<Option<Instant>>,
}

/// Everything smoltcp works on.
struct Net {
    interface: Interface,
    sockets: SocketSet<'static>,
    device: SmolDevice,
    listeners: Vec<Weak<ListenerState>>,
    /// Sockets nobody holds any more, and when they are aborted.
    orphans: Vec<(SocketHandle, Instant)>,
}

fn smol(now: Instant) -> smoltcp::time::Instant {
    smoltcp::time::Instant::from_micros((now.as_nanos() / 1000) as i64)
}

fn from_smol(at: smoltcp::time::Instant) -> Instant {
    Instant::from_nanos(u64::try_from(at.total_micros()).unwrap_or(0).saturating_mul(1000))
}

fn smol_duration(d: Duration) -> smoltcp::time::Duration {
    smoltcp::time::Duration::from_micros(d.as_micros() as u64)
}

impl Stack {
    /// Puts a stack on a device, and tells the neighbours whose address it is.
    pub fn new(device: NetDevice, config: Config) -> Stack {
        let stack = Stack::prepare(device, config.rx_buffers);
        stack.begin(config);
        stack
    }

    /// Puts a stack on a device, with all it takes but an address: it can be listened on; frames come and go from
    /// [`Stack::begin`] on. So a template has its buffers ready before it knows who it will be.
    pub fn prepare(mut device: NetDevice, rx_buffers: RxBuffers) -> Stack {
        device.prepare(rx_buffers);
        let mut device = SmolDevice::new(device);
        let interface = new_interface(&mut device);
        let inner = Rc::new(StackInner {
            net: RefCell::new(Net {
                interface,
                sockets: SocketSet::new(Vec::new()),
                device,
                listeners: Vec::new(),
                orphans: Vec::new(),
            }),
            touched: Cell::new(true),
            deadline: Cell::new(None),
        });
        exec::register(inner.clone());
        Stack(inner)
    }

    /// Gives a prepared stack its addresses (the MAC is read from the device), and tells the neighbours. Once, before anything
    /// is sent: numbers that must be guessed by nobody are drawn from here on.
    pub fn begin(&self, config: Config) {
        let mut net = self.0.net.borrow_mut();
        let Net { interface, device, .. } = &mut *net;
        device.net.renew_mac();
        device.net.start(config.rx_buffers);
        announce::announce(&mut device.net, config.address.address);
        *interface = new_interface(device);
        let cidr = IpCidr::new(IpAddress::Ipv4(config.address.address), config.address.prefix);
        interface.update_ip_addrs(|list| {
            // The list is empty and holds at least one.
            let _ = list.push(cidr);
        });
        if let Some(gateway) = config.gateway {
            // As above.
            let _ = interface.routes_mut().add_default_ipv4_route(gateway);
        }
        self.0.touched.set(true);
    }

    /// Accepts connections on a port. At most `backlog` connections wait to be accepted.
    pub fn listen(&self, port: u16, buffers: Buffers, backlog: usize) -> Result<Listener, ListenError> {
        Listener::new(self.0.clone(), port, buffers, backlog)
    }

    /// Opens a connection.
    pub async fn connect(&self, to: SocketAddrV4, buffers: Buffers) -> Result<TcpStream, ConnectError> {
        TcpStream::connect(self.0.clone(), to, buffers).await
    }

    /// Forgets which MAC addresses neighbours have: one that was started anew may have another, and nobody tells.
    pub fn forget_neighbours(&self) {
        // smoltcp does so when the addresses change.
        self.0.net.borrow_mut().interface.update_ip_addrs(|_| {});
        self.0.touched.set(true);
    }

    /// What the device counted.
    pub fn statistics(&self) -> NetStatistics {
        self.0.net.borrow().device.net.statistics()
    }

    /// How many sockets there are: listening, open and lingering.
    pub fn sockets(&self) -> usize {
        self.0.net.borrow().sockets.iter().count()
    }
}

/// smoltcp's interface on a device, without addresses; its seed makes the first sequence numbers of connections.
fn new_interface(device: &mut SmolDevice) -> Interface {
    let mac = HardwareAddress::Ethernet(EthernetAddress(device.net.mac()));
    let mut config = smoltcp::iface::Config::new(mac);
    config.random_seed = rng::random_u64();
    Interface::new(config, device, smol(Instant::now()))
}

/// A socket set up as all of ours are. `None` if memory is short: peers must not be able to use up the heap by opening
/// connections, so [`HEADROOM`] must be left over.
fn new_socket(buffers: Buffers) -> Option<tcp::Socket<'static>> {
    let buffer = |size: usize| {
        let size = size.max(MIN_BUFFER);
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).ok()?;
        bytes.resize(size, 0);
        Some(bytes)
    };
    let (rx, tx) = (buffer(buffers.rx)?, buffer(buffers.tx)?);
    Vec::<u8>::new().try_reserve_exact(HEADROOM).ok()?;
    let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(rx), tcp::SocketBuffer::new(tx));
    socket.set_nagle_enabled(false);
    // On private links an acknowledgement at once (one a batch of frames) is cheaper than a sender that waits.
    socket.set_ack_delay(None);
    socket.set_congestion_control(tcp::CongestionControl::Reno);
    socket.set_timeout(Some(smol_duration(CONNECT_TIMEOUT)));
    Some(socket)
}

/// A connection that has come up gets its lasting time-outs.
fn settle(socket: &mut tcp::Socket<'_>) {
    socket.set_timeout(Some(smol_duration(PEER_TIMEOUT)));
    socket.set_keep_alive(Some(smol_duration(KEEP_ALIVE)));
}

impl StackInner {
    /// Does something with a socket; the stack is polled afterwards.
    fn with<R>(&self, handle: SocketHandle, f: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        self.touched.set(true);
        f(self.net.borrow_mut().sockets.get_mut::<tcp::Socket<'static>>(handle))
    }

    /// Takes over a socket that nobody holds any more.
    fn orphan(&self, handle: SocketHandle) {
        self.touched.set(true);
        let mut net = self.net.borrow_mut();
        net.sockets.get_mut::<tcp::Socket<'static>>(handle).close();
        net.orphans.push((handle, Instant::now() + LINGER));
    }
}

impl Net {
    fn poll(&mut self, now: Instant) -> bool {
        let at = smol(now);
        let mut any = self.device.tell_windows();
        self.interface.poll_maintenance(at);
        // An accept since the last time may have made room in a backlog.
        self.serve_listeners();
        for _ in 0..INGRESS_BATCH {
            let Net { interface, device, sockets, .. } = self;
            if interface.poll_ingress_single(at, device, sockets) == PollIngressSingleResult::None {
                break;
            }
            any = true;
            self.serve_listeners();
        }
        for _ in 0..EGRESS_ROUNDS {
            let Net { interface, device, sockets, .. } = self;
            if interface.poll_egress(at, device, sockets) == PollResult::None {
                break;
            }
            any = true;
        }
        // Time-outs close sockets in the egress.
        self.serve_listeners();
        self.bury_orphans(now);
        any
    }

    fn serve_listeners(&mut self) {
        let Net { listeners, sockets, device, .. } = self;
        listeners.retain(|listener| match listener.upgrade() {
            Some(listener) => {
                listener.serve(sockets);
                true
            }
            None => false,
        });
        device.set_full_ports(listeners.iter().filter_map(Weak::upgrade).filter(|l| l.is_full()).map(|l| l.port()));
    }

    fn bury_orphans(&mut self, now: Instant) {
        let Net { orphans, sockets, device, .. } = self;
        orphans.retain(|&(handle, deadline)| {
            let socket = sockets.get_mut::<tcp::Socket<'static>>(handle);
            match socket.state() {
                tcp::State::Closed if !socket_owes_reset(socket) => {}
                // Nothing of the peer's can come any more that matters.
                tcp::State::TimeWait => {}
                // Its reset could not be sent either.
                _ if now >= deadline + RESET_PATIENCE => {}
                _ => {
                    if now >= deadline {
                        socket.abort();
                    }
                    return true;
                }
            }
            if let Some((local, remote)) = socket.local_endpoint().zip(socket.remote_endpoint())
                && let IpAddress::Ipv4(address) = remote.addr
            {
                device.connections.forget(local.port, remote.port, address.octets());
            }
            sockets.remove(handle);
            false
        });
    }
}

/// An aborted socket still has a reset to send: smoltcp keeps the remote end until it has.
fn socket_owes_reset(socket: &tcp::Socket<'_>) -> bool {
    socket.remote_endpoint().is_some()
}

impl Device for StackInner {
    fn poll(&self) -> bool {
        let now = Instant::now();
        let due = self.deadline.get().is_some_and(|at| at <= now);
        let touched = self.touched.replace(false);
        let mut net = self.net.borrow_mut();
        if !touched && !due && !net.device.has_work() {
            return false;
        }
        let any = net.poll(now);
        let Net { interface, sockets, device, orphans, .. } = &mut *net;
        let blocked = device.take_blocked();
        let next = interface.poll_at(smol(now), sockets).map(from_smol);
        let next = match next {
            // The device has no room: wait for it, but do not trust it to say so.
            Some(at) if blocked => Some(at.max(now + BLOCKED_RETRY)),
            // Due and yet nothing came of it (a reset to a neighbour that does not answer, say): not at once again.
            Some(at) if !any && at <= now => Some(now + STUCK_RETRY),
            next => next,
        };
        // First to be aborted, then to be given up.
        let linger = orphans.iter().map(|(_, at)| if *at > now { *at } else { *at + RESET_PATIENCE }).min();
        self.deadline.set([next, linger].into_iter().flatten().min());
        any
    }

    fn pending(&self) -> bool {
        let net = self.net.borrow();
        self.touched.get() || net.device.has_work()
    }

    fn wants_kick(&self) -> bool {
        self.net.borrow().device.net.wants_kick()
    }

    fn kick(&self) {
        self.net.borrow_mut().device.net.kick();
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }

    fn lull(&self, on: bool) {
        let mut net = self.net.borrow_mut();
        let SmolDevice { windows, connections, .. } = &mut net.device;
        windows.close(on, connections, Instant::now());
        // First of all: they wait for it, or are about to send something.
        if net.device.tell_windows() {
            net.device.net.kick();
        }
    }

    fn is_lulled(&self) -> bool {
        let net = self.net.borrow();
        !net.device.has_received() && net.device.windows.are_closed(Instant::now())
    }

    fn is_quiet(&self) -> bool {
        let net = self.net.borrow();
        !self.touched.get() && net.orphans.is_empty() && net.device.net.is_quiet()
    }
}

#[cfg(test)]
mod tests;
