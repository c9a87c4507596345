//! The D-module's server: CF sessions in front, a file system behind, and no I/O.
//!
//! Owns: [`Server`], which takes frames and finished disk I/O and says what to send, to read and to write; [`mount()`],
//! which finds or makes the file system on a disk and gives a [`Server`].
//!
//! Always true: a stable operation is answered only after the consistency point that holds it; ownership does not wait for
//! one. Survives whatever [`layout`] survives. The image (`guest-dmodule`) and the host tests drive the same code.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod jobs;
mod mount;
mod owners;
mod readahead;
mod runs;
mod server;

pub use mount::{Disk, DiskError, FormatPolicy, Mounted, Options, OwnersPolicy, StartError, mount};
pub use runs::{RUN_MAX, Run, runs};
pub use server::{CP_INTERVAL_NS, HELD_BYTES_MIN, Now, Output, Server, Statistics};
