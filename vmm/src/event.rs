//! Who wakes up for which descriptor.
//!
//! Two threads can serve the devices: the I/O thread, and the vCPU thread while its guest is parked. Each waits on an
//! epoll set of its own; device descriptors are in both, edge-triggered and exclusive, the vCPU's first. The
//! kernel then wakes the vCPU's thread alone if it waits, else the I/O thread: no event wakes both, none gets lost.
//! What must hold for that: a thread handles every event it was given, also when it woke for another reason (the vCPU thread
//! collects once more without waiting after it was kicked); handlers read until there is nothing left.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::{Error, Result, host};

/// Most events collected at once.
const BATCH: usize = 16;

/// What a descriptor means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The waiting thread is to look up.
    Wake,
    /// The driver rang for a queue of a device.
    Doorbell {
        /// Index of the device.
        device: u16,
        /// Its queue.
        queue: u16,
    },
    /// The console may have input.
    Console,
    /// A descriptor of a device's own is ready.
    Device {
        /// Index of the device.
        device: u16,
    },
}

impl Token {
    fn to_u64(self) -> u64 {
        match self {
            Token::Wake => 0,
            Token::Console => 3 << 32,
            Token::Doorbell { device, queue } => 1 << 32 | u64::from(device) << 16 | u64::from(queue),
            Token::Device { device } => 2 << 32 | u64::from(device) << 16,
        }
    }

    fn from_u64(v: u64) -> Token {
        let device = (v >> 16) as u16;
        match v >> 32 {
            1 => Token::Doorbell { device, queue: v as u16 },
            2 => Token::Device { device },
            3 => Token::Console,
            _ => Token::Wake,
        }
    }
}

/// One thread's epoll set.
#[derive(Debug)]
pub struct EventSet(OwnedFd);

/// Events collected by [`EventSet::wait`].
#[derive(Debug, Default)]
pub struct Ready {
    tokens: [Option<Token>; BATCH],
}

impl Ready {
    /// The collected events.
    pub fn iter(&self) -> impl Iterator<Item = Token> + '_ {
        self.tokens.iter().map_while(|t| *t)
    }

    /// Nothing was ready.
    pub fn is_empty(&self) -> bool {
        self.tokens[0].is_none()
    }

    /// As many as can be collected at once: there may be more.
    pub fn is_full(&self) -> bool {
        self.tokens[BATCH - 1].is_some()
    }
}

impl EventSet {
    /// An empty set.
    pub(crate) fn new() -> Result<EventSet> {
        // SAFETY: no memory is involved; the result is checked.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(host("epoll")(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(EventSet(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds a descriptor that becomes readable; `flags` of epoll besides.
    pub(crate) fn add(&self, fd: RawFd, token: Token, flags: i32) -> Result<()> {
        let mut event = libc::epoll_event { events: (libc::EPOLLIN | flags) as u32, u64: token.to_u64() };
        // SAFETY: the event is valid for the call.
        let rc = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if rc != 0 { Err(host("epoll")(io::Error::last_os_error())) } else { Ok(()) }
    }

    fn remove(&self, fd: RawFd) -> Result<()> {
        // SAFETY: no memory is involved; the event may be null for a removal (Linux 2.6.9).
        let rc = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
        if rc != 0 { Err(host("epoll")(io::Error::last_os_error())) } else { Ok(()) }
    }

    /// Waits until something is ready or the time is over; `None` waits for ever. A signal ends the wait.
    pub fn wait(&self, timeout: Option<Duration>) -> Ready {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let spec = timeout.map(|t| libc::timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        let spec_ptr = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the buffer holds BATCH events, the timeout is null or valid, no signal mask is given.
        let n = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.0.as_raw_fd(),
                events.as_mut_ptr(),
                BATCH as libc::c_int,
                spec_ptr,
                std::ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        let mut ready = Ready::default();
        for (slot, event) in ready.tokens.iter_mut().zip(&events[..usize::try_from(n).unwrap_or(0)]) {
            *slot = Some(Token::from_u64(event.u64));
        }
        ready
    }
}

impl AsRawFd for EventSet {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The sets of both threads.
#[derive(Debug)]
pub struct Events {
    /// The vCPU thread's.
    pub vcpu: EventSet,
    /// The I/O thread's.
    pub io: EventSet,
}

impl Events {
    /// Two empty sets.
    pub fn new() -> Result<Events> {
        Ok(Events { vcpu: EventSet::new()?, io: EventSet::new()? })
    }

    /// A descriptor of a device, or an epoll set of a device with many: for whichever thread waits.
    pub fn add_device(&self, fd: RawFd, device: u16) -> Result<()> {
        self.add_shared(fd, Token::Device { device })
    }

    /// The console's descriptor: for whichever thread waits. One that cannot be waited for, as a file, is always ready and
    /// is looked at when the guest can take input.
    pub fn add_console(&self, fd: RawFd) -> Result<()> {
        match self.add_shared(fd, Token::Console) {
            Err(Error::Host { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => Ok(()),
            result => result,
        }
    }

    fn add_shared(&self, fd: RawFd, token: Token) -> Result<()> {
        // The order is what gives the vCPU thread precedence: see the module. An epoll set cannot be waited for
        // exclusively: what happens in one wakes both threads, and the second finds nothing left to do.
        for set in [&self.vcpu, &self.io] {
            set.add(fd, token, libc::EPOLLET | libc::EPOLLEXCLUSIVE).or_else(|e| match e {
                Error::Host { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
                    set.add(fd, token, libc::EPOLLET)
                }
                e => Err(e),
            })?;
        }
        Ok(())
    }

    /// Ends [`Events::add_device`].
    pub fn remove_device(&self, fd: RawFd) -> Result<()> {
        self.vcpu.remove(fd)?;
        self.io.remove(fd)
    }

    /// Ends [`Events::add_doorbell`].
    pub fn remove_doorbell(&self, fd: RawFd) -> Result<()> {
        self.io.remove(fd)
    }

    /// A doorbell: rung only while the guest runs, so for the I/O thread. Never read, so edge-triggered.
    pub fn add_doorbell(&self, fd: RawFd, device: u16, queue: u16) -> Result<()> {
        self.io.add(fd, Token::Doorbell { device, queue }, libc::EPOLLET)
    }

    /// Wakes the vCPU thread.
    pub fn add_vcpu_wake(&self, fd: RawFd) -> Result<()> {
        self.vcpu.add(fd, Token::Wake, libc::EPOLLET)
    }

    /// Wakes the I/O thread.
    pub fn add_io_wake(&self, fd: RawFd) -> Result<()> {
        self.io.add(fd, Token::Wake, libc::EPOLLET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn an_event_goes_to_the_io_thread_when_the_vcpu_does_not_wait() {
        let events = Events::new().unwrap();
        let fd = EventFd::new(0).unwrap();
        events.add_device(fd.as_raw_fd(), 3).unwrap();
        fd.write(1).unwrap();
        assert_eq!(events.io.wait(None).iter().collect::<Vec<_>>(), [Token::Device { device: 3 }]);
        // edge-triggered: once
        assert!(events.io.wait(Some(Duration::ZERO)).is_empty());
        fd.write(1).unwrap();
        assert!(!events.io.wait(Some(Duration::ZERO)).is_empty());
    }

    #[test]
    fn a_waiting_vcpu_gets_each_event_or_the_io_thread_does() {
        const ROUNDS: u64 = 2000;
        let events = Events::new().unwrap();
        let (fd, done) = (EventFd::new(libc::EFD_NONBLOCK).unwrap(), EventFd::new(0).unwrap());
        events.add_device(fd.as_raw_fd(), 0).unwrap();
        let (ack_tx, ack_rx) = std::sync::mpsc::channel();
        std::thread::scope(|s| {
            events.add_io_wake(done.as_raw_fd()).unwrap();
            events.vcpu.add(done.as_raw_fd(), Token::Wake, libc::EPOLLET).unwrap();
            for set in [&events.vcpu, &events.io] {
                let (ack, fd) = (ack_tx.clone(), &fd);
                s.spawn(move || {
                    loop {
                        for token in set.wait(None).iter() {
                            match token {
                                Token::Wake => return,
                                _ => {
                                    if fd.read().is_ok() {
                                        ack.send(()).unwrap();
                                    }
                                }
                            }
                        }
                    }
                });
            }
            for _ in 0..ROUNDS {
                fd.write(1).unwrap();
                ack_rx.recv().unwrap();
            }
            done.write(1).unwrap();
        });
    }

    #[test]
    fn a_set_within_a_set_tells_of_each_event() {
        let (events, inner) = (Events::new().unwrap(), EventSet::new().unwrap());
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        inner.add(fd.as_raw_fd(), Token::Wake, libc::EPOLLET).unwrap();
        events.add_device(inner.0.as_raw_fd(), 2).unwrap();
        for _ in 0..3 {
            fd.write(1).unwrap();
            assert_eq!(events.io.wait(None).iter().collect::<Vec<_>>(), [Token::Device { device: 2 }]);
            assert!(!inner.wait(Some(Duration::ZERO)).is_empty());
            assert!(events.io.wait(Some(Duration::ZERO)).is_empty());
        }
    }

    #[test]
    fn tokens_survive_the_kernel() {
        for t in
            [Token::Wake, Token::Console, Token::Doorbell { device: 65535, queue: 7 }, Token::Device { device: 12 }]
        {
            assert_eq!(Token::from_u64(t.to_u64()), t);
        }
    }
}
