//! What the N-module decides without doing I/O: its configuration and how it divides its memory.
//!
//! The image itself (`main.rs` and the modules beside it) needs `guest-rt`, which only links into an image; what is
//! here is tested on the host.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod budget;
pub mod config;
pub mod limits;
