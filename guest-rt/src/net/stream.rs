//! A TCP connection, whole or in two halves.
use super::{Buffers, CONNECT_TIMEOUT, EPHEMERAL, SocketAddrV4, StackInner, new_socket, settle, smol_duration};
use crate::rng;
use crate::time::timeout;
use alloc::rc::Rc;
use core::future::poll_fn;
use core::task::{Context, Poll};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

/// Tries to find a free port.
const PORT_TRIES: u32 = 64;

/// Why a connection cannot be read from or written to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TcpError {
    /// Reset by the peer, aborted, or the peer did not answer for too long.
    #[error("the connection was reset or timed out")]
    Reset,
    /// The peer closed before all bytes had come.
    #[error("the peer closed the connection in the middle")]
    UnexpectedEnd,
    /// Writing after [`TcpStream::shutdown`].
    #[error("the connection is shut down for writing")]
    ShutDown,
}

/// Why a connection did not come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there.
    #[error("the connection was refused")]
    Refused,
    /// No answer.
    #[error("no answer")]
    TimedOut,
    /// No memory for the socket's buffers.
    #[error("too little memory for another connection")]
    NoMemory,
    /// No address to come from, or no free port.
    #[error("no route or no free port")]
    Unreachable,
}

/// The socket, closed when the last holder is gone.
struct Connection {
    stack: Rc<StackInner>,
    handle: SocketHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stack.orphan(self.handle);
    }
}

impl Connection {
    fn with<R>(&self, f: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        self.stack.with(self.handle, f)
    }

    /// Looks without touching: nothing for smoltcp to do afterwards.
    fn peek<R>(&self, f: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        f(self.stack.net.borrow_mut().sockets.get_mut::<tcp::Socket<'static>>(self.handle))
    }

    /// `Some(true)`: something to read; `Some(false)`: the end.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<bool, TcpError>> {
        self.peek(|socket| {
            if socket.can_recv() {
                return Poll::Ready(Ok(true));
            }
            if socket.may_recv() || matches!(socket.state(), tcp::State::SynReceived | tcp::State::SynSent) {
                socket.register_recv_waker(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(match socket.recv(|_| (0, ())) {
                Err(tcp::RecvError::InvalidState) => Err(TcpError::Reset),
                _ => Ok(false),
            })
        })
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<Result<(), TcpError>> {
        self.peek(|socket| {
            if socket.can_send() {
                return Poll::Ready(Ok(()));
            }
            if socket.may_send() {
                socket.register_send_waker(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(Err(match socket.state() {
                tcp::State::Closed => TcpError::Reset,
                _ => TcpError::ShutDown,
            }))
        })
    }

    async fn readable(&self) -> Result<bool, TcpError> {
        poll_fn(|cx| self.poll_readable(cx)).await
    }

    async fn writable(&self) -> Result<(), TcpError> {
        poll_fn(|cx| self.poll_writable(cx)).await
    }

    async fn read_with<R>(&self, f: impl FnOnce(&[u8]) -> (usize, R)) -> Result<R, TcpError> {
        if !self.readable().await? {
            return Ok(f(&[]).1);
        }
        self.with(|socket| {
            socket.recv(|data| {
                let (consumed, result) = f(data);
                (consumed.min(data.len()), result)
            })
        })
        .map_err(|_| TcpError::Reset)
    }

    async fn write_with<R>(&self, f: impl FnOnce(&mut [u8]) -> (usize, R)) -> Result<R, TcpError> {
        self.writable().await?;
        self.with(|socket| {
            socket.send(|space| {
                let (written, result) = f(space);
                (written.min(space.len()), result)
            })
        })
        .map_err(|_| TcpError::Reset)
    }

    async fn read(&self, buffer: &mut [u8]) -> Result<usize, TcpError> {
        if buffer.is_empty() || !self.readable().await? {
            return Ok(0);
        }
        self.with(|socket| socket.recv_slice(buffer)).map_err(|_| TcpError::Reset)
    }

    async fn read_exact(&self, buffer: &mut [u8]) -> Result<(), TcpError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read(&mut buffer[done..]).await? {
                0 => return Err(TcpError::UnexpectedEnd),
                n => done += n,
            }
        }
        Ok(())
    }

    async fn write_all(&self, mut data: &[u8]) -> Result<(), TcpError> {
        while !data.is_empty() {
            self.writable().await?;
            let n = self.with(|socket| socket.send_slice(data)).map_err(|_| TcpError::Reset)?;
            data = &data[n..];
        }
        Ok(())
    }
}

macro_rules! reading {
    () => {
        /// Reads what there is, at least one byte; 0 at the end.
        pub async fn read(&mut self, buffer: &mut [u8]) -> Result<usize, TcpError> {
            self.0.read(buffer).await
        }

        /// Fills the buffer.
        pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), TcpError> {
            self.0.read_exact(buffer).await
        }

        /// Waits for data and shows it where it lies (it may be only a part of what has come: the receive buffer is a
        /// ring); `f` says how much it has consumed, and a result. An empty slice is the end.
        pub async fn read_with<R>(&mut self, f: impl FnOnce(&[u8]) -> (usize, R)) -> Result<R, TcpError> {
            self.0.read_with(f).await
        }
    };
}

macro_rules! writing {
    () => {
        /// Writes all of it: waits until the last byte is in the send buffer, not until it has arrived.
        pub async fn write_all(&mut self, data: &[u8]) -> Result<(), TcpError> {
            self.0.write_all(data).await
        }

        /// Waits for room and lends the space in the send buffer (never empty, but maybe small: it is a ring); `f` says
        /// how much it has written, and a result. Nothing is sent before the task waits for something.
        pub async fn write_with<R>(&mut self, f: impl FnOnce(&mut [u8]) -> (usize, R)) -> Result<R, TcpError> {
            self.0.write_with(f).await
        }

        /// No more data will be written: the peer sees the end after what was written. Reading goes on.
        pub fn shutdown(&mut self) {
            self.0.with(|socket| socket.close());
        }

        /// Waits until all that was written has been acknowledged.
        pub async fn drained(&mut self) -> Result<(), TcpError> {
            poll_fn(|cx| {
                self.0.peek(|socket| {
                    if socket.send_queue() == 0 {
                        return Poll::Ready(Ok(()));
                    }
                    if socket.state() == tcp::State::Closed {
                        return Poll::Ready(Err(TcpError::Reset));
                    }
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                })
            })
            .await
        }
    };
}

/// A TCP connection. Dropping it closes it in an orderly way, in the background.
pub struct TcpStream(Rc<Connection>);

/// The reading half of a connection.
pub struct ReadHalf(Rc<Connection>);

/// The writing half of a connection. Dropping it does not end the stream: see [`WriteHalf::shutdown`].
pub struct WriteHalf(Rc<Connection>);

impl TcpStream {
    pub(super) fn new(stack: Rc<StackInner>, handle: SocketHandle) -> TcpStream {
        TcpStream(Rc::new(Connection { stack, handle }))
    }

    pub(super) async fn connect(
        stack: Rc<StackInner>,
        to: SocketAddrV4,
        buffers: Buffers,
    ) -> Result<TcpStream, ConnectError> {
        let handle = {
            let mut net = stack.net.borrow_mut();
            let in_use = |port| {
                net.sockets.iter().any(|(_, s)| match s {
                    smoltcp::socket::Socket::Tcp(s) => s.local_endpoint().is_some_and(|e| e.port == port),
                })
            };
            let size = u32::from(EPHEMERAL.end - EPHEMERAL.start);
            let port = (0..PORT_TRIES)
                .map(|_| EPHEMERAL.start + (rng::random_u32() % size) as u16)
                .find(|&port| !in_use(port))
                .ok_or(ConnectError::Unreachable)?;
            let mut socket = new_socket(buffers).ok_or(ConnectError::NoMemory)?;
            socket
                .connect(net.interface.context(), (*to.ip(), to.port()), port)
                .map_err(|_| ConnectError::Unreachable)?;
            // Time is over when we say so, not when smoltcp does: then it looks as if refused.
            socket.set_timeout(Some(smol_duration(2 * CONNECT_TIMEOUT)));
            net.sockets.add(socket)
        };
        stack.touched.set(true);
        let stream = TcpStream::new(stack, handle);
        let up = poll_fn(|cx| {
            stream.0.peek(|socket| match socket.state() {
                tcp::State::SynSent | tcp::State::SynReceived => {
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
                tcp::State::Closed => Poll::Ready(Err(ConnectError::Refused)),
                _ => Poll::Ready(Ok(())),
            })
        });
        match timeout(CONNECT_TIMEOUT, up).await {
            Ok(result) => result?,
            Err(_) => {
                stream.abort();
                return Err(ConnectError::TimedOut);
            }
        }
        stream.0.with(settle);
        Ok(stream)
    }

    reading!();
    writing!();

    /// Sizes of its buffers.
    pub fn buffers(&self) -> Buffers {
        self.0.peek(|socket| Buffers { rx: socket.recv_capacity(), tx: socket.send_capacity() })
    }

    /// The peer's address, while connected.
    pub fn peer(&self) -> Option<SocketAddrV4> {
        self.0.peek(|socket| match socket.remote_endpoint()? {
            smoltcp::wire::IpEndpoint { addr: smoltcp::wire::IpAddress::Ipv4(address), port } => {
                Some(SocketAddrV4::new(address, port))
            }
            _ => None,
        })
    }

    /// Ends the connection at once, with a reset.
    pub fn abort(&self) {
        self.0.with(|socket| socket.abort());
    }

    /// Two halves, for two tasks.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (ReadHalf(self.0.clone()), WriteHalf(self.0))
    }
}

impl ReadHalf {
    reading!();

    /// Ends the connection at once, with a reset.
    pub fn abort(&self) {
        self.0.with(|socket| socket.abort());
    }
}

impl WriteHalf {
    writing!();

    /// Ends the connection at once, with a reset.
    pub fn abort(&self) {
        self.0.with(|socket| socket.abort());
    }
}
