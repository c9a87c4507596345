//! A destination that follows the protocol up to a chosen point and then does what a test wants: nothing, or vanish.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use migration::message::{Hello, Message, Ownership, Reason};
use migration::ownership::{Epoch, OwnerId};
use migration::pages::{Pages, RunKind};
use migration::wire::{FrameType, HEADER_LEN, Receiver, Sender};

/// A HELLO that is accepted.
pub fn hello() -> Message {
    Message::Hello(Hello {
        min_version: 1,
        max_version: 1,
        required: 0,
        offered: 0,
        port: [1, 2],
        vm_id: 0,
        owner: OwnerId([1, 2]),
        ownership: Ownership::Stream,
        epoch: Epoch(0),
        memory_size: 2 << 20,
        ticket: Vec::new(),
    })
}

/// How far it follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Until {
    /// HELLO is not answered.
    Hello,
    /// DESCRIBE is not answered.
    Describe,
    /// The first round is not confirmed.
    PreCopy,
    /// PAUSING and STATE come, LOADED is not said.
    Handing,
    /// COMMIT comes, RUNNING is not said.
    Commit,
}

/// What the source sees before COMMIT.
pub const BEFORE_COMMIT: [Until; 4] = [Until::Hello, Until::Describe, Until::PreCopy, Until::Handing];

/// See the module.
pub struct Puppet {
    listener: TcpListener,
    pub address: SocketAddr,
    /// What it says it knows.
    pub features: u64,
}

/// The connection, where it stopped.
pub struct Stopped {
    socket: TcpStream,
    sender: Sender,
    receiver: Receiver,
    /// Pages that came with content, as zero, and skipped.
    pub pages: [u64; 3],
}

impl Puppet {
    /// Listens at a free port of loopback.
    pub fn new() -> Puppet {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        Puppet { listener, address, features: 0 }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Takes one source up to a point. `epoch`: what it says the record has.
    pub fn follow(&self, until: Until, epoch: u64) -> Stopped {
        let (socket, _) = self.listener.accept().unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut s = Stopped { socket, sender: Sender::new(), receiver: Receiver::new(), pages: [0; 3] };
        let mut stream = false;
        loop {
            let (frame_type, payload) = s.next().expect("the source goes on");
            let at = match frame_type {
                FrameType::Hello => Until::Hello,
                FrameType::Describe => Until::Describe,
                FrameType::Round => Until::PreCopy,
                FrameType::State => Until::Handing,
                FrameType::Commit => Until::Commit,
                FrameType::Pages => {
                    let pages = Pages::parse(&payload, core::slice::from_ref(&(0..1 << 40)), self.features)
                        .expect("pages as agreed on");
                    for (run, _) in pages.runs() {
                        s.pages[match run.kind {
                            RunKind::Raw => 0,
                            RunKind::Zero => 1,
                            RunKind::Skipped => 2,
                        }] += u64::from(run.pages);
                    }
                    continue;
                }
                _ => continue,
            };
            if at == until {
                return s;
            }
            match Message::parse(frame_type, &payload) {
                Ok(Message::Hello(hello)) => {
                    stream = hello.ownership == Ownership::Stream;
                    s.say(&Message::Welcome { version: 1, features: self.features });
                }
                Ok(Message::Describe(_)) => s.say(&Message::Ready { owner: OwnerId([7, 7]), epoch: Epoch(epoch) }),
                Ok(Message::Round { round, .. }) => s.say(&Message::RoundDone { round }),
                // With an arbiter it would be a mistake.
                Err(_) if stream && until == Until::Commit => s.say_loaded(),
                _ => {}
            }
        }
    }
}

impl Stopped {
    /// As a source, to a destination on loopback.
    pub fn connect(port: u16) -> Stopped {
        let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Stopped { socket, sender: Sender::new(), receiver: Receiver::new(), pages: [0; 3] }
    }

    /// Says something.
    pub fn say(&mut self, message: &Message) {
        let (mut payload, mut out) = (Vec::new(), Vec::new());
        message.encode(&mut payload);
        self.sender.frame(message.frame_type(), &payload, &mut out);
        self.socket.write_all(&out).unwrap();
    }

    /// Ends the connection with a reset.
    pub fn reset(self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the value is a linger, as the option takes, and valid for the call.
        let rc = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as libc::socklen_t,
            )
        };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }

    fn say_loaded(&mut self) {
        self.say(&Message::Loaded);
    }

    /// The next frame; `None` at the end of the stream.
    pub fn next(&mut self) -> Option<(FrameType, Vec<u8>)> {
        let mut bytes = [0; HEADER_LEN];
        self.socket.read_exact(&mut bytes).ok()?;
        let header = self.receiver.header(&bytes).unwrap();
        let mut payload = vec![0; header.length];
        self.socket.read_exact(&mut payload).ok()?;
        header.verify(&payload).unwrap();
        Some((header.frame_type, payload))
    }

    /// Reads on until CANCEL and gives its reason; `None` if the source only closed.
    pub fn cancelled(mut self) -> Option<Reason> {
        while let Some((frame_type, payload)) = self.next() {
            if let FrameType::Cancel = frame_type
                && let Ok(Message::Cancel(reason)) = Message::parse(frame_type, &payload)
            {
                return Some(reason);
            }
        }
        None
    }
}
