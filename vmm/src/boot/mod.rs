//! From an image file to a vCPU that can run it.
//!
//! Owns: loading an image, the choice between a direct start in ring 3, PVH and the Linux boot protocol, what each wants in
//! memory ([`crate::layout`] says where) and its registers.

pub mod direct;
pub mod files;
pub mod image;
pub mod info;
pub mod linux;
pub mod pvh;
pub mod start;

pub use files::BootFiles;
pub use image::{Entry, Image};
