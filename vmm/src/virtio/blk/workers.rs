//! I/O on images with a format, by threads that wait for it.
//!
//! Owns the threads and the requests they have. Always true: a thread works on a request's own buffer, never on guest memory;
//! requests in flight are at most [`DEPTH`]; when this is dropped, all that was written is in the image.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::format::FormatImage;
use super::request::{Operation, Request};
use super::{DEPTH, Engine};
use crate::error::{Result, host};
use crate::sandbox::{self, Kind};
use crate::schedule;

/// Threads of a disk.
const THREADS: usize = 4;
const STACK: usize = 256 << 10;

#[derive(Default)]
struct Queues {
    waiting: VecDeque<Request>,
    done: VecDeque<Request>,
    stop: bool,
}

struct Shared {
    queues: Mutex<Queues>,
    work: Condvar,
    finished: Condvar,
    event: EventFd,
    image: Arc<FormatImage>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
}

impl Workers {
    /// For an image.
    pub fn new(image: Arc<FormatImage>) -> Result<Workers> {
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            work: Condvar::new(),
            finished: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?,
            image,
        });
        let mut workers = Workers { shared: shared.clone(), threads: Vec::new(), in_flight: 0 };
        for _ in 0..THREADS {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("disk".into()).stack_size(STACK).spawn(move || work(&shared));
            workers.threads.push(thread.map_err(host("thread disk"))?);
        }
        Ok(workers)
    }
}

fn work(shared: &Shared) {
    schedule::prompt();
    if let Err(e) = sandbox::confine(Kind::Io) {
        log::error!("a thread of a disk cannot be confined, and serves nothing: {e}");
        return;
    }
    loop {
        let mut request = {
            let mut queues = shared.lock();
            loop {
                if let Some(request) = queues.waiting.pop_front() {
                    break request;
                }
                if queues.stop {
                    return;
                }
                queues = shared.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
            }
        };
        request.error = serve(&shared.image, &mut request).err();
        shared.lock().done.push_back(request);
        shared.finished.notify_one();
        let _ = shared.event.write(1);
    }
}

fn serve(image: &FormatImage, request: &mut Request) -> io::Result<()> {
    let (offset, len) = (request.offset(), request.len as usize);
    let no_buffer = || io::Error::other("a request without a buffer");
    match request.operation {
        Operation::Read => {
            let bytes = request.bounce.as_mut().ok_or_else(no_buffer)?.bytes();
            image.read_at(offset, bytes.get_mut(..len).ok_or_else(no_buffer)?)
        }
        Operation::Write => {
            let bytes = request.bounce.as_mut().ok_or_else(no_buffer)?.bytes();
            image.write_at(offset, bytes.get(..len).ok_or_else(no_buffer)?)
        }
        Operation::Flush => image.flush(),
        Operation::Discard => image.discard(offset, len as u64),
        Operation::WriteZeroes { unmap } => image.write_zeroes(offset, len as u64, unmap),
    }
}

impl Engine for Workers {
    fn room(&self) -> bool {
        self.in_flight < DEPTH
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn submit(&mut self, request: Request) {
        self.in_flight += 1;
        self.shared.lock().waiting.push_back(request);
        self.shared.work.notify_one();
    }

    fn push(&mut self) {}

    fn completed(&mut self) -> Option<Request> {
        let request = self.shared.lock().done.pop_front()?;
        self.in_flight -= 1;
        Some(request)
    }

    fn has_completed(&mut self) -> bool {
        !self.shared.lock().done.is_empty()
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut queues = self.shared.lock();
        while self.in_flight > 0 && queues.done.is_empty() {
            queues = self.shared.finished.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn event(&mut self) {
        let _ = self.shared.event.read();
    }

    fn descriptor(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a disk's thread had panicked");
            }
        }
        if !self.shared.image.is_readonly()
            && let Err(e) = self.shared.image.flush()
        {
            log::error!("flush at the end: {e}");
        }
    }
}
