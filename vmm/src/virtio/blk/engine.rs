//! Who does the I/O of a disk: io_uring ([`super::uring`]) or threads ([`super::workers`]).
//!
//! Always true: a request that was taken on comes back once, and counts as in flight until it has; at most [`super::DEPTH`] are.

use std::io;
use std::os::fd::RawFd;

use super::request::Request;

/// Who does the I/O.
pub(super) trait Engine: Send {
    /// Whether it takes one more request.
    fn room(&self) -> bool;
    /// How many it has.
    fn in_flight(&self) -> usize;
    /// Takes a request on. There must be room.
    fn submit(&mut self, request: Request);
    /// Sees to it that all it has taken on is being done.
    fn push(&mut self);
    /// One that is done, with its error if it failed.
    fn completed(&mut self) -> Option<Request>;
    /// Whether [`Engine::completed`] has something.
    fn has_completed(&mut self) -> bool;
    /// Waits until something is done.
    fn wait(&mut self) -> io::Result<()>;
    /// Its descriptor was ready.
    fn event(&mut self);
    /// Ready when something is done.
    fn descriptor(&self) -> RawFd;
}
