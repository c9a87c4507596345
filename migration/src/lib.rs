//! The porting protocol (live migration) as bytes and as state machines, without I/O.
//!
//! Owns: the frame and message formats ([`wire`], [`message`], [`pages`], [`section`]), the rules of the
//! source ([`source`]) and of the destination ([`destination`]), the record that decides who runs
//! ([`ownership`]), the permission to port ([`ticket`]) and the decision when to pause ([`convergence`]). docs/migration-protocol.md describes
//! it for readers; the formats here are the truth. A checkpoint ([`checkpoint`]) is the same state in a file.
//!
//! Always true: nothing in this crate opens a socket, reads a clock or starts a thread. Everything a peer
//! sends is checked against a named bound before memory is allocated for it. At most one of source and
//! destination is told to run ([`source::Action::Resume`], [`destination::Action::Run`]): `tests/model`
//! searches all interleavings of messages, cuts and crashes for a counter-example.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod convergence;
pub mod destination;
mod error;
pub mod message;
pub mod ownership;
pub mod pages;
pub mod section;
pub mod source;
pub mod ticket;
pub mod wire;

pub use error::Error;

/// Size of a page of guest memory: the unit of dirty logging and of page runs.
pub const PAGE_SIZE: usize = 4096;
