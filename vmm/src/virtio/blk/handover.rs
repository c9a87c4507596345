//! Whose an image is, when a VM is ported between two processes that both reach it.
//!
//! The source writes out, forgets and unlocks ([`Blk::give_image`]) when its guest stands still and nothing is in flight; the
//! destination, which had only opened the file, locks it and looks into it for the first time ([`Blk::take_image`]). A port that fails
//! goes the same way back. Always true: an image is read and written by none but who has its lock.
//! Survives: either process's death at any point; its lock ends with it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::format::FormatImage;
use super::identity::Identity;
use super::image::{Image, is_locked, lock_error};
use super::store::Store;
use super::uring::Uring;
use super::workers::Workers;
use super::{Blk, Engine};
use crate::config::{DiskConfig, DiskFormat};
use crate::error::{Error, Result, host};

/// Whose an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// This process's, which has its lock.
    Here,
    /// Another's, on this host or (`far`) elsewhere, where this host's page cache does not see what is written.
    Away { far: bool },
}

/// Writes out what was written to a disk and is not in its image yet: without the disk, which may go on meanwhile.
pub struct Flusher(Flush);

enum Flush {
    Cache(File),
    Format(Arc<FormatImage>),
}

impl Flusher {
    /// Does so.
    pub fn flush(&self) -> io::Result<()> {
        match &self.0 {
            Flush::Cache(file) => file.sync_data(),
            Flush::Format(image) => image.flush(),
        }
    }
}

impl Blk {
    /// Opens an image that the source of a port still has: `there`, in its words. It is not read before [`Blk::take_image`].
    pub fn open_for_port(config: &DiskConfig, there: &Identity) -> Result<Blk> {
        let (image, engine): (Store, Box<dyn Engine>) = match config.format {
            DiskFormat::Raw => {
                let image = Image::open_unlocked(&config.path, config.readonly, config.direct)?;
                let engine = Uring::new(&image)?;
                (Store::Raw(image), Box::new(engine))
            }
            format => {
                let image = Arc::new(FormatImage::open_unlocked(&config.path, format, config.readonly)?);
                let engine = Workers::new(image.clone())?;
                (Store::Format(image), Box::new(engine))
            }
        };
        let what = || format!("{}: {}", config.id, config.path.display());
        let here = Identity::of(&config.id, image.file()).map_err(host(what()))?;
        // A writer's would be in the way of the source's, whichever that is.
        let locked = is_locked(image.file()).map_err(host(format!("{}: lock", what())))?;
        if let Some(why) = there.difference(&here, locked) {
            return Err(Error::Conflict(format!("{}: {why}", what())));
        }
        Blk::new(config, image, engine, Held::Away { far: !there.same_host(&here) })
    }

    /// Which image it is.
    pub fn identity(&self) -> Result<Identity> {
        Identity::of(&self.id, self.image.file()).map_err(host(format!("{}: {}", self.id, self.path.display())))
    }

    /// What to do beforehand so that [`Blk::give_image`] takes little time; `None`: nothing.
    pub fn flusher(&self) -> Result<Option<Flusher>> {
        Ok(match &self.image {
            Store::Raw(image) if image.is_cached() => {
                let file = image.file().try_clone().map_err(host(format!("{}: flush", self.id)))?;
                Some(Flusher(Flush::Cache(file)))
            }
            Store::Format(image) if !image.is_readonly() => Some(Flusher(Flush::Format(image.clone()))),
            _ => None,
        })
    }

    /// Leaves the image to another process: what was written is in it, nothing of it is remembered, its lock is free. Only after
    /// [`Device::quiesce`](crate::virtio::Device::quiesce); on an error the image is still this process's.
    pub fn give_image(&mut self) -> Result<()> {
        assert_eq!(self.engine.in_flight(), 0, "{}: requests in flight", self.id);
        if self.held == Held::Here {
            self.image.give().map_err(host(format!("{}: giving the image up", self.id)))?;
            self.held = Held::Away { far: false };
        }
        Ok(())
    }

    /// Makes the image this process's, unless it is. Fails at once while another has its lock.
    pub fn take_image(&mut self) -> Result<()> {
        if let Held::Away { far } = self.held {
            self.image.take(far).map_err(|e| lock_error(&self.path, e))?;
            self.held = Held::Here;
        }
        Ok(())
    }
}
