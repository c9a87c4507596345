//! The cluster fabric (CF): the way from any N-module to any D-module.
//!
//! Owns: the vocabulary of file-system primitives ([`fs`]), the operations ([`op`]), their wire format
//! ([`wire`]), who owns a VM ([`owner`]), and both sides of a session ([`client`], [`server`]).
//! Nothing here does I/O, reads a clock or starts a thread.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod client;
pub mod fs;
pub mod id;
pub mod op;
pub mod owner;
pub mod server;
pub mod wire;
