//! The thread that watches a connection: tells when it ends, and ends it when an answer takes too long.
//!
//! The protocol's answers are waited for with the devices locked. Always true: [`Watch::during`] returns within
//! [`ANSWER_TIME`] and a moment, because the thread then shuts the connection down and every read of it ends.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::back_end::ANSWER_TIME;
use crate::error::{Result, host};
use crate::sandbox::{self, Kind};

const STACK: usize = 64 << 10;

struct Shared {
    /// Until when the answer must be there.
    deadline: Mutex<Option<Instant>>,
    /// The watch itself is to end.
    stop: AtomicBool,
    ended: AtomicBool,
    /// The thread is to look at the above.
    look: EventFd,
}

/// See the module.
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches `stream` until it ends, and then makes `ended` readable.
    pub fn start(stream: UnixStream, ended: EventFd) -> Result<Watch> {
        let shared = Arc::new(Shared {
            deadline: Mutex::new(None),
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            look: EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?,
        });
        let for_thread = shared.clone();
        let confined = sandbox::faces_guest();
        let thread = std::thread::Builder::new().name("vhost-user".into()).stack_size(STACK).spawn(move || {
            match if confined { Ok(()) } else { sandbox::confine(Kind::Io) } {
                Ok(()) => watch(&stream, &for_thread),
                Err(e) => log::error!("the back end is not watched: {e}"),
            }
            for_thread.ended.store(true, Ordering::Release);
            let _ = ended.write(1);
        });
        Ok(Watch { shared, thread: Some(thread.map_err(host("thread vhost-user"))?) })
    }

    /// Whether the connection is over.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Does what waits for answers.
    pub fn during<T>(&self, f: impl FnOnce() -> T) -> T {
        self.set_deadline(Some(Instant::now() + ANSWER_TIME));
        let _ = self.shared.look.write(1);
        let result = f();
        self.set_deadline(None);
        result
    }

    fn set_deadline(&self, deadline: Option<Instant>) {
        *self.shared.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.shared.look.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(stream: &UnixStream, shared: &Shared) {
    let descriptor = |fd, events| libc::pollfd { fd, events, revents: 0 };
    while !shared.stop.load(Ordering::Acquire) {
        let left = {
            let deadline = shared.deadline.lock().unwrap_or_else(PoisonError::into_inner);
            deadline.map(|d| d.saturating_duration_since(Instant::now()))
        };
        if left.is_some_and(|l| l.is_zero()) {
            log::error!("a vhost-user back end has not answered for {} s and is cut off", ANSWER_TIME.as_secs());
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
        let timeout = left.map_or(-1, |l| l.as_millis() as libc::c_int + 1);
        let mut fds =
            [descriptor(stream.as_raw_fd(), libc::POLLRDHUP), descriptor(shared.look.as_raw_fd(), libc::POLLIN)];
        // SAFETY: the array is valid for the call and of the length given.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if n < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
        if n > 0 && fds[0].revents != 0 {
            return;
        }
        let _ = shared.look.read();
    }
}
