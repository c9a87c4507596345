//! Ownership records of VMs that have no D-module: who may run each, kept by a host (`vmm arbiter`).
//!
//! Owns: the records in a directory ([`Store`]), their file format ([`image`]), and the service that answers questions about them
//! ([`Service`]). What is asked and how it is decided is the D-module's ([`fabric::server`]): the frames are those of the cluster fabric, the
//! rules the same, so VMMs do not know whom they ask.
//!
//! Always true: a change is told to anybody only after it was written. (The D-module tells an heir before: what a restart forgets then the
//! N-module says again with its HELLO. These VMs say none.) One process has a directory at a time. Survives: a crash at any moment (the file before or the file after), a full disk (who asks is told
//! "not known" and asks again), peers that send anything, do not read, or never leave.
pub mod image;
mod service;
mod store;
#[cfg(test)]
mod tests;

pub use service::{CONNECTIONS_MAX, Service};
pub use store::Store;
