//! Builds and describes bootable images.
