//! The test image, booted: under QEMU's microvm by TCG and by KVM, and under our VMM.
//!
//! Needs `qemu-system-x86_64`, binutils, and for the tests of [`kvm`] /dev/kvm and the `vmm` of this workspace, which is
//! built if it is not there.
#![allow(clippy::unwrap_used, reason = "all of this crate is tests; clippy.toml only knows functions marked as such")]

mod faults;
mod harness;
mod image;
mod kvm;
mod network;
mod qemu;
