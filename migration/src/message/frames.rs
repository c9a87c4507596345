//! FRAMES: network frames on their way to where the guest is now.
use super::put_u32s;
use crate::Error;
use crate::wire::{Reader, put_blob};

/// Longest forwarded network frame with its virtio-net header, in bytes.
pub const NET_FRAME_MAX: usize = 65_536 + 64;
/// Most network frames in one FRAMES frame.
pub const NET_FRAMES_MAX: usize = 512;

/// A checked FRAMES payload: network frames, each with its virtio-net header, in the order they came.
///
/// ```text
///  0  u32 device    index of the network device in the machine configuration
///  4  u32 count     at most [`NET_FRAMES_MAX`]
///  8  count × { u32 length, bytes }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frames<'a> {
    /// Index of the network device.
    pub device: u32,
    /// The frames.
    pub frames: Vec<&'a [u8]>,
}

impl<'a> Frames<'a> {
    /// Appends the payload.
    ///
    /// # Panics
    /// When there are more than [`NET_FRAMES_MAX`] frames or one is longer than [`NET_FRAME_MAX`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        assert!(self.frames.len() <= NET_FRAMES_MAX);
        put_u32s(out, &[self.device, self.frames.len() as u32]);
        for frame in &self.frames {
            assert!(frame.len() <= NET_FRAME_MAX);
            put_blob(out, frame);
        }
    }

    /// Reads what [`Frames::encode`] wrote.
    pub fn parse(payload: &'a [u8]) -> Result<Frames<'a>, Error> {
        let mut r = Reader::new("FRAMES", payload);
        let device = r.u32()?;
        let count = r.count(NET_FRAMES_MAX, "network frames")?;
        let mut frames = Vec::with_capacity(count);
        for _ in 0..count {
            frames.push(r.blob(NET_FRAME_MAX, "network frame")?);
        }
        r.finish()?;
        Ok(Frames { device, frames })
    }
}
