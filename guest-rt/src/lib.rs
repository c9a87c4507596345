//! The run time of guest images: a bare-metal program in ring 3 with virtio devices, TCP/IP and an executor.
//!
//! An image is a `#![no_std] #![no_main]` bin of three parts:
//!
//! ```text
//! // build.rs: link arguments
//! fn main() {
//!     for arg in std::env::var("DEP_OUTRIGGER_GUEST_LINK_ARGS").expect("from guest-rt").split_terminator(';') {
//!         println!("cargo::rustc-link-arg-bins={arg}");
//!     }
//! }
//! // main.rs
//! #![no_std]
//! #![no_main]
//! guest_rt::entry!(main);
//! async fn main(env: guest_rt::Env) -> Result<(), String> { … }
//! ```
//!
//! built by `cargo build -p IMAGE --profile guest`. It boots under three kinds of VMM: ours by the direct start in
//! ring 3 (docs in `guest-abi`), any VMM by PVH, with or without the platform device.
//!
//! Command line words the run time itself understands: `virtio_mmio.device=` (as Linux), `log=LEVEL`, `spin_us=N`,
//! `debug_exit=PORT` (QEMU's isa-debug-exit), `vm_id=N` (where there is no boot-info page), `early_mark` (one character on the
//! console as the first thing in ring 3).
//!
//! What an image uses: [`Env`], [`exec`] (spawn), [`time`], [`sync`], [`virtio::blk::BlockDevice`], [`net::Stack`],
//! [`identity()`], [`rng`], [`println!`] and the `log` crate, [`boot_mark`].
//!
//! Always true: no interrupt is taken while ring 3 runs; one vCPU, one thread of control, so nothing here is `Send`;
//! memory is mapped one to one, so a pointer is what a device is told.
#![cfg_attr(not(test), no_std)]
// What only an image uses is not used in the other two kinds of build.
#![cfg_attr(any(test, feature = "hosted"), allow(dead_code))]

extern crate alloc;

#[cfg(not(test))]
mod boot;
pub mod cmdline;
#[cfg(not(test))]
pub mod console;
#[cfg(not(test))]
mod entry;
pub mod exec;
#[cfg(not(any(test, feature = "hosted")))]
mod fault;
mod heap;
#[cfg(not(test))]
mod identity;
#[cfg(not(test))]
mod instance;
mod local;
mod lull;
#[cfg(not(any(test, feature = "hosted")))]
mod mem;
pub mod net;
#[cfg(not(test))]
mod platform;
mod ring0;
pub mod rng;
pub mod sync;
pub mod time;
pub mod virtio;

pub use cmdline::Cmdline;
pub use exec::{block_on, generation, generation_changed, log_later, spawn, yield_now};
pub use guest_abi::TEMPLATE_WORD;
#[cfg(not(test))]
pub use identity::{cpu_features, identity, store_epoch};
#[cfg(not(test))]
pub use instance::{InstanceError, next_instance};
#[cfg(not(test))]
pub use platform::{boot_mark, exit};

/// What [`boot_mark`] says when the image serves.
pub const BOOT_MARK_SERVING: u32 = 2;
/// What it says when the image is a template that is prepared, and waits to be made an instance.
pub const BOOT_MARK_PREPARED: u32 = 3;

/// What an image's main is given.
pub struct Env {
    /// Command line.
    pub cmdline: Cmdline,
    /// Network devices, in the order of the command line.
    pub nets: alloc::vec::Vec<virtio::net::NetDevice>,
    /// Disks, in the order of the command line.
    pub disks: alloc::vec::Vec<virtio::blk::BlockDevice>,
    /// Guest memory in bytes.
    pub memory_size: u64,
}

/// Makes `async fn main(env: Env) -> Result<(), impl Display>` the image's main. An error is printed and ends the VM
/// with status [`guest_abi::exit_status::FAILED`].
#[cfg(not(feature = "hosted"))]
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn outrigger_main(env: $crate::Env) -> $crate::MainFuture {
            $crate::wrap_main($main(env))
        }
    };
}

/// In a hosted build the bin says that it is no image, and fails.
#[cfg(feature = "hosted")]
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(export_name = "main")]
        extern "C" fn hosted_main() -> i32 {
            // It must still compile.
            let _ = |env: $crate::Env| $crate::wrap_main($main(env));
            1
        }
    };
}
#[cfg(not(test))]
#[doc(hidden)]
pub use entry::{MainFuture, wrap_main};
