//! Accepting connections. smoltcp has no backlog: a listening socket becomes the connection. So whenever the listening
//! socket has taken a SYN, it joins the pending ones and another takes its place, as long as fewer than `backlog`
//! are pending.
use super::{Buffers, SocketAddrV4, StackInner, TcpStream, new_socket, settle};
use crate::sync::Notify;
use alloc::{collections::VecDeque, rc::Rc};
use core::cell::{Cell, RefCell};
use core::net::Ipv4Addr;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::wire::IpAddress;

/// Largest backlog.
pub const MAX_BACKLOG: usize = 1024;

/// Why a port cannot be listened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// Port 0, or backlog 0 or more than [`MAX_BACKLOG`].
    #[error("port 0, or backlog 0 or more than {MAX_BACKLOG}")]
    Invalid,
    /// Another listener has the port.
    #[error("port {0} is taken")]
    Taken(u16),
}

/// Accepts connections on a port. Dropping it closes those that were not accepted.
pub struct Listener {
    stack: Rc<StackInner>,
    state: Rc<ListenerState>,
}

pub(super) struct ListenerState {
    port: u16,
    buffers: Cell<Buffers>,
    backlog: usize,
    listening: Cell<Option<SocketHandle>>,
    /// Have taken a SYN; not accepted yet.
    pending: RefCell<VecDeque<SocketHandle>>,
    arrived: Notify,
}

impl Listener {
    pub(super) fn new(
        stack: Rc<StackInner>,
        port: u16,
        buffers: Buffers,
        backlog: usize,
    ) -> Result<Listener, ListenError> {
        if port == 0 || backlog == 0 || backlog > MAX_BACKLOG {
            return Err(ListenError::Invalid);
        }
        let state = Rc::new(ListenerState {
            port,
            buffers: Cell::new(buffers),
            backlog,
            listening: Cell::new(None),
            pending: RefCell::default(),
            arrived: Notify::new(),
        });
        let mut net = stack.net.borrow_mut();
        if net.listeners.iter().filter_map(|l| l.upgrade()).any(|l| l.port == port) {
            return Err(ListenError::Taken(port));
        }
        state.serve(&mut net.sockets);
        net.listeners.push(Rc::downgrade(&state));
        drop(net);
        Ok(Listener { stack, state })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.state.port
    }

    /// The buffers of connections that come from now on, but for the one that is waited for already.
    pub fn set_buffers(&self, buffers: Buffers) {
        self.state.buffers.set(buffers);
    }

    /// The next connection, and where it comes from.
    pub async fn accept(&self) -> (TcpStream, SocketAddrV4) {
        let mut accepted = None;
        self.state
            .arrived
            .wait_until(|| {
                accepted = self.take();
                accepted.is_some()
            })
            .await;
        match accepted {
            Some(accepted) => accepted,
            None => unreachable!("wait_until returns when there is one"),
        }
    }

    /// An established connection, if one is pending.
    fn take(&self) -> Option<(TcpStream, SocketAddrV4)> {
        let mut net = self.stack.net.borrow_mut();
        let mut pending = self.state.pending.borrow_mut();
        let position = pending.iter().position(|&h| is_up(net.sockets.get::<tcp::Socket<'static>>(h)))?;
        let handle = pending.remove(position)?;
        drop(pending);
        let socket = net.sockets.get_mut::<tcp::Socket<'static>>(handle);
        settle(socket);
        let peer = match socket.remote_endpoint() {
            Some(e) => {
                let IpAddress::Ipv4(address) = e.addr else { unreachable!("the interface has IPv4 addresses only") };
                SocketAddrV4::new(address, e.port)
            }
            // Closed again already: the stream will say so.
            None => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
        };
        // There is room in the backlog again.
        self.state.serve(&mut net.sockets);
        drop(net);
        self.stack.touched.set(true);
        Some((TcpStream::new(self.stack.clone(), handle), peer))
    }
}

/// Whether a connection came up (it may be closing again, with data to read).
fn is_up(socket: &tcp::Socket<'_>) -> bool {
    !matches!(socket.state(), tcp::State::Closed | tcp::State::Listen | tcp::State::SynReceived)
}

impl ListenerState {
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Whether nobody listens because too many connections are pending.
    pub(super) fn is_full(&self) -> bool {
        self.listening.get().is_none()
    }

    /// Moves a socket that took a SYN to the pending ones, forgets pending ones that died, sees to it that one
    /// listens, and tells who waits in `accept`.
    pub(super) fn serve(&self, sockets: &mut SocketSet<'static>) {
        let mut pending = self.pending.borrow_mut();
        if let Some(handle) = self.listening.get()
            && sockets.get::<tcp::Socket<'static>>(handle).state() != tcp::State::Listen
        {
            self.listening.set(None);
            pending.push_back(handle);
        }
        if !pending.is_empty() {
            pending.retain(|&handle| {
                let socket = sockets.get_mut::<tcp::Socket<'static>>(handle);
                match socket.state() {
                    tcp::State::Closed => {
                        sockets.remove(handle);
                        false
                    }
                    // A reset in SYN-RECEIVED puts the socket back to listening: one of those is enough.
                    tcp::State::Listen => {
                        if self.listening.get().is_none() {
                            self.listening.set(Some(handle));
                        } else {
                            sockets.remove(handle);
                        }
                        false
                    }
                    _ => true,
                }
            });
            if pending.iter().any(|&h| is_up(sockets.get::<tcp::Socket<'static>>(h))) {
                self.arrived.notify();
            }
        }
        if self.listening.get().is_none() && pending.len() < self.backlog {
            // Without memory for another socket the port is as good as full, until there is.
            if let Some(mut socket) = new_socket(self.buffers.get())
                && socket.listen(self.port).is_ok()
            {
                self.listening.set(Some(sockets.add(socket)));
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(handle) = self.state.listening.take() {
            self.stack.net.borrow_mut().sockets.remove(handle);
        }
        for handle in self.state.pending.take() {
            self.stack.orphan(handle);
        }
    }
}
