//! Which files are being read from front to back, and how far ahead to read.
use alloc::vec::Vec;
use fabric::fs::FileHandle;

/// Files watched; the one not read for longest is forgotten.
const STREAMS: usize = 32;
/// Sequential bytes after which reading ahead begins.
const START_AFTER: u64 = 128 << 10;
/// Most bytes read ahead of the reader.
const AHEAD_MAX: u64 = 4 << 20;
/// Bytes of one piece read ahead.
const PIECE: u64 = 512 << 10;
/// How far a reader's requests may be out of order: clients send several at once.
const SLACK: u64 = 4 << 20;

struct Stream {
    handle: FileHandle,
    /// Where reading began.
    start: u64,
    /// End of the furthest read.
    end: u64,
    /// End of what has been read ahead.
    ahead: u64,
    used: u64,
}

#[derive(Default)]
pub(crate) struct ReadAhead {
    streams: Vec<Stream>,
    clock: u64,
}

impl ReadAhead {
    /// A read was asked for. Returns a piece (offset, length) to be read ahead, if any.
    pub fn read(&mut self, handle: FileHandle, offset: u64, length: u32) -> Option<(u64, u32)> {
        self.clock += 1;
        let end = offset.checked_add(length.into())?;
        let Some(stream) = self.streams.iter_mut().find(|s| s.handle == handle) else {
            let stream = Stream { handle, start: offset, end, ahead: end, used: self.clock };
            if self.streams.len() < STREAMS {
                self.streams.push(stream);
            } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.used) {
                *oldest = stream;
            }
            return None;
        };
        stream.used = self.clock;
        if offset > stream.end.max(stream.ahead) + SLACK || end + SLACK < stream.end {
            *stream = Stream { handle, start: offset, end, ahead: end, used: self.clock };
            return None;
        }
        stream.end = stream.end.max(end);
        stream.ahead = stream.ahead.max(stream.end);
        // As far ahead as the reader has come, up to the bound.
        let come = stream.end - stream.start;
        if come < START_AFTER || stream.ahead >= stream.end + come.min(AHEAD_MAX) {
            return None;
        }
        let piece = (stream.ahead, PIECE as u32);
        stream.ahead += PIECE;
        Some(piece)
    }

    /// The file ends here, as it turned out.
    pub fn at_end(&mut self, handle: FileHandle) {
        if let Some(stream) = self.streams.iter_mut().find(|s| s.handle == handle) {
            // Nothing more ahead until the file is read from elsewhere.
            stream.ahead = u64::MAX >> 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric::fs::VolumeId;

    fn file(inode: u64) -> FileHandle {
        FileHandle { volume: VolumeId(1), generation: 1, inode }
    }

    #[test]
    fn a_reader_from_front_to_back_is_read_ahead_of_without_gaps() {
        let mut r = ReadAhead::default();
        let mut ahead = None;
        for at in 0..400u64 {
            let end = (at + 1) * 65536;
            if let Some((offset, length)) = r.read(file(1), at * 65536, 65536) {
                assert!(offset >= end, "not what the reader has asked for itself");
                assert_eq!(offset, *ahead.get_or_insert(offset));
                ahead = Some(offset + u64::from(length));
                assert!(offset < end + AHEAD_MAX);
            }
        }
        assert!(ahead.unwrap() > 400 * 65536 + AHEAD_MAX / 2);
    }

    #[test]
    fn a_reader_here_and_there_is_not() {
        let mut r = ReadAhead::default();
        for at in 0..1000u64 {
            let offset = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24;
            assert_eq!(r.read(file(1), offset, 4096), None);
        }
        for inode in 0..1000 {
            assert_eq!(r.read(file(inode), 0, 1 << 20), None);
        }
        assert_eq!(r.streams.len(), STREAMS);
        assert_eq!(r.read(file(1), u64::MAX, 1), None);
    }

    #[test]
    fn nothing_is_read_behind_the_end() {
        let mut r = ReadAhead::default();
        r.read(file(1), 0, 1 << 20);
        assert!(r.read(file(1), 1 << 20, 1 << 20).is_some());
        r.at_end(file(1));
        assert_eq!(r.read(file(1), 2 << 20, 1 << 20), None);
    }
}
