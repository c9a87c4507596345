//! From an image file to a vCPU that can run it.
//!
//! Owns: loading an ELF image, the choice between a direct start in ring 3 and PVH, the registers of each.

pub mod direct;
pub mod image;
pub mod info;
pub mod pvh;

pub use image::{Entry, Image};
