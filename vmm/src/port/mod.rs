//! Porting: driving the `migration` crate's state machines over TCP, KVM and taps.
//!
//! Owns both ends of a port: the [`source`] that gives a running VM away, the [`destination`] that waits for one. Each runs
//! on a thread of its own. Who may run when is decided in the machines, not here; the drivers carry out what they say.
//! [`Engine`] is what the control interface speaks to.

mod announce;
pub mod arbiter;
pub mod connection;
pub mod dead;
pub mod destination;
pub mod end;
mod engine;
pub mod faults;
pub mod frames;
pub(crate) mod guest;
pub mod job;
mod limits;
mod lull;
mod order;
pub mod parting;
mod residue;
pub mod source;
pub mod stamp;
pub mod tls;
pub mod transfer;
pub mod wait;

pub use engine::{Engine, JOBS_MAX};
