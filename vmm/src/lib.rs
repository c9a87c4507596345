//! KVM virtual machine monitor for storage guests.
//!
//! One process runs one VM. The way through the crate: [`config`] says what is wanted, [`vm`] builds it out of
//! [`memory`], [`boot`], [`vcpu`] and [`devices`] (with [`virtio`]), and runs it; [`api`] tells it what to do through
//! [`control`]; [`port`] moves it to another host.

pub mod acpi;
pub mod api;
pub mod boot;
pub mod checkpoint;
pub mod config;
pub mod console;
pub mod control;
pub mod devices;
pub mod error;
pub mod event;
pub mod gate;
pub mod layout;
pub mod limit;
pub mod memory;
pub mod metrics;
pub mod notice;
pub mod platform;
mod polling;
pub mod port;
pub mod records;
pub mod residence;
pub mod sandbox;
pub mod schedule;
pub mod serial;
pub mod socket_file;
pub mod spawn;
pub mod stats;
pub mod vcpu;
pub mod virtio;
pub mod vm;

pub use error::{Error, Result};
