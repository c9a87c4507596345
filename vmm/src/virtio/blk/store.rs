//! What a disk's bytes are in: a raw image or one with a format.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::format::FormatImage;
use super::image::{DirectAlign, Image};

/// Cluster of most qcow2 images.
const FORMAT_BLOCK: u64 = 64 << 10;

/// What a disk's bytes are in.
pub(super) enum Store {
    Raw(Image),
    Format(Arc<FormatImage>),
}

impl Store {
    pub fn sectors(&self) -> u64 {
        match self {
            Store::Raw(image) => image.sectors(),
            Store::Format(image) => image.sectors(),
        }
    }

    pub fn is_readonly(&self) -> bool {
        match self {
            Store::Raw(image) => image.is_readonly(),
            Store::Format(image) => image.is_readonly(),
        }
    }

    /// What buffers must be multiples of to be used as they are; `None`: none can be.
    pub fn align(&self) -> Option<DirectAlign> {
        match self {
            Store::Raw(image) => Some(image.align()),
            Store::Format(_) => None,
        }
    }

    /// What ranges to discard should be multiples of, in bytes.
    pub fn block(&self) -> u64 {
        match self {
            Store::Raw(image) => image.block(),
            Store::Format(_) => FORMAT_BLOCK,
        }
    }

    pub fn grow(&mut self, bytes: u64) -> io::Result<()> {
        match self {
            Store::Raw(image) => image.grow(bytes),
            Store::Format(image) => image.grow(bytes),
        }
    }

    pub fn file(&self) -> &File {
        match self {
            Store::Raw(image) => image.file(),
            Store::Format(image) => image.file(),
        }
    }

    pub fn give(&mut self) -> io::Result<()> {
        match self {
            Store::Raw(image) => image.give(),
            Store::Format(image) => image.give(),
        }
    }

    pub fn take(&mut self, forget: bool) -> io::Result<()> {
        match self {
            Store::Raw(image) => image.take(forget),
            Store::Format(image) => image.take(forget),
        }
    }
}
