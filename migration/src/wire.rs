//! Frames: a fixed 32-byte little-endian header, then a payload.
//!
//! ```text
//!  0  u32 magic      "ORPT"
//!  4  u16 layout     1: this header
//!  6  u16 type       [`FrameType`]
//!  8  u64 sequence   0, 1, 2, … in each direction
//! 16  u32 length     of the payload, at most [`FrameType::max_length`]
//! 20  u32 reserved   0
//! 24  u64 checksum   xxh3-64 of bytes 0..24 followed by the payload
//! ```
//!
//! Always true: a header is refused before its payload is read when its length exceeds the bound of its
//! type, so a receiver never allocates more than that. A frame that is lost, repeated or reordered shows in the
//! sequence, one that is damaged in the checksum; either ends the connection.
use crate::Error;
use xxhash_rust::xxh3::Xxh3;

/// `"ORPT"`, as the first four bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"ORPT");
/// The frame layout described above. The protocol's version is negotiated in HELLO, not here.
pub const LAYOUT: u16 = 1;
/// How the first record of TLS begins: handshake, version 3.x.
const TLS_HANDSHAKE: [u8; 2] = [22, 3];
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 32;

/// Longest payload of a control message, in bytes.
pub const CONTROL_MAX: usize = 128 << 10;
/// Longest payload of a PAGES frame, in bytes: run table and 1 MiB of pages.
pub const PAGES_MAX: usize = (1 << 20) + crate::pages::TABLE_MAX;
/// Longest payload of a STATE frame, in bytes.
pub const STATE_MAX: usize = 4 << 20;
/// Longest payload of a FRAMES frame, in bytes.
pub const FRAMES_MAX: usize = 256 << 10;

/// Type of a frame. Numbers are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FrameType {
    /// Source: version range, features, which VM.
    Hello = 1,
    /// Destination: version and features chosen.
    Welcome = 2,
    /// Destination: will not take the VM, and why.
    Refuse = 3,
    /// Source: what the VM is made of.
    Describe = 4,
    /// Destination: everything that can fail or allocate is done.
    Ready = 5,
    /// Source: guest memory.
    Pages = 6,
    /// Source: a pre-copy round ends.
    Round = 7,
    /// Destination: everything up to the end of the round is in place.
    RoundDone = 8,
    /// Source: the guest stands still, the rest follows at once; the destination may spin from now on.
    Pausing = 9,
    /// Source: device and vCPU state.
    State = 10,
    /// Destination: the state is loaded (only where no arbiter decides).
    Loaded = 11,
    /// Source: the destination may run.
    Commit = 12,
    /// Destination: it runs.
    Running = 13,
    /// Destination: it does not run and never will.
    Aborted = 14,
    /// Source: frames that reached it after the pause.
    Frames = 15,
    /// Source: the port is off.
    Cancel = 16,
    /// Source: nothing more will be forwarded.
    Done = 17,
    /// Source: the destination's announcement has reached a tap here; all that came before it has been forwarded.
    Switched = 18,
    /// Destination: the guest gets frames from the taps here.
    Opened = 19,
}

impl FrameType {
    /// All types, in numerical order from 1.
    pub const ALL: [FrameType; 19] = [
        FrameType::Hello,
        FrameType::Welcome,
        FrameType::Refuse,
        FrameType::Describe,
        FrameType::Ready,
        FrameType::Pages,
        FrameType::Round,
        FrameType::RoundDone,
        FrameType::Pausing,
        FrameType::State,
        FrameType::Loaded,
        FrameType::Commit,
        FrameType::Running,
        FrameType::Aborted,
        FrameType::Frames,
        FrameType::Cancel,
        FrameType::Done,
        FrameType::Switched,
        FrameType::Opened,
    ];

    /// The type with this number.
    pub fn from_number(number: u16) -> Result<FrameType, Error> {
        let index = usize::from(number).checked_sub(1).ok_or(Error::Type(number))?;
        FrameType::ALL.get(index).copied().ok_or(Error::Type(number))
    }

    /// Longest payload of this type.
    pub fn max_length(self) -> usize {
        match self {
            FrameType::Pages => PAGES_MAX,
            FrameType::State => STATE_MAX,
            FrameType::Frames => FRAMES_MAX,
            _ => CONTROL_MAX,
        }
    }

    /// Name for messages to people.
    pub fn name(self) -> &'static str {
        match self {
            FrameType::Hello => "HELLO",
            FrameType::Welcome => "WELCOME",
            FrameType::Refuse => "REFUSE",
            FrameType::Describe => "DESCRIBE",
            FrameType::Ready => "READY",
            FrameType::Pages => "PAGES",
            FrameType::Round => "ROUND",
            FrameType::RoundDone => "ROUND_DONE",
            FrameType::Pausing => "PAUSING",
            FrameType::State => "STATE",
            FrameType::Loaded => "LOADED",
            FrameType::Commit => "COMMIT",
            FrameType::Running => "RUNNING",
            FrameType::Aborted => "ABORTED",
            FrameType::Frames => "FRAMES",
            FrameType::Cancel => "CANCEL",
            FrameType::Done => "DONE",
            FrameType::Switched => "SWITCHED",
            FrameType::Opened => "OPENED",
        }
    }
}

/// A header that passed [`Header::parse`]: type known, length within its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Type.
    pub frame_type: FrameType,
    /// Sequence number.
    pub sequence: u64,
    /// Length of the payload.
    pub length: usize,
    checksum: u64,
    bytes: [u8; 24],
}

impl Header {
    /// Checks everything about a header that can be checked without its payload.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, Error> {
        let mut r = Reader::new("frame header", bytes);
        let magic = r.u32()?;
        if bytes.starts_with(&TLS_HANDSHAKE) {
            return Err(Error::Tls);
        }
        if magic != MAGIC {
            return Err(Error::Magic(magic));
        }
        let layout = r.u16()?;
        if layout != LAYOUT {
            return Err(Error::Layout(layout));
        }
        let frame_type = FrameType::from_number(r.u16()?)?;
        let sequence = r.u64()?;
        let length = r.count(frame_type.max_length(), "frame length")?;
        if r.u32()? != 0 {
            return Err(Error::Reserved("frame header"));
        }
        let checksum = r.u64()?;
        let mut covered = [0; 24];
        covered.copy_from_slice(&bytes[..24]);
        Ok(Header { frame_type, sequence, length, checksum, bytes: covered })
    }

    /// Checks the payload against the checksum.
    pub fn verify(&self, payload: &[u8]) -> Result<(), Error> {
        if payload.len() != self.length || checksum(&self.bytes, &[payload]) != self.checksum {
            return Err(Error::Checksum(self.frame_type.name()));
        }
        Ok(())
    }
}

fn checksum(header: &[u8; 24], parts: &[&[u8]]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(header);
    for part in parts {
        hash.update(part);
    }
    hash.digest()
}

/// xxh3-64 of something that comes in pieces.
#[derive(Clone, Default)]
pub struct Digest(Xxh3);

impl Digest {
    /// The next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest.
    pub fn finish(&self) -> u64 {
        self.0.digest()
    }
}

/// Numbers and seals the frames of one direction.
#[derive(Clone, Debug, Default)]
pub struct Sender {
    next: u64,
}

impl Sender {
    /// Nothing sent yet.
    pub fn new() -> Sender {
        Sender::default()
    }

    /// The header for a payload given in parts, which must be sent behind it in this order, unchanged.
    ///
    /// # Panics
    /// When the payload is longer than [`FrameType::max_length`]: an error of the program, not of the peer.
    pub fn seal(&mut self, frame_type: FrameType, parts: &[&[u8]]) -> [u8; HEADER_LEN] {
        let length: usize = parts.iter().map(|p| p.len()).sum();
        assert!(length <= frame_type.max_length(), "{} of {length} bytes", frame_type.name());
        let mut header = [0; 24];
        header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        header[4..6].copy_from_slice(&LAYOUT.to_le_bytes());
        header[6..8].copy_from_slice(&(frame_type as u16).to_le_bytes());
        header[8..16].copy_from_slice(&self.next.to_le_bytes());
        header[16..20].copy_from_slice(&(length as u32).to_le_bytes());
        self.next += 1;
        let mut whole = [0; HEADER_LEN];
        whole[..24].copy_from_slice(&header);
        whole[24..].copy_from_slice(&checksum(&header, parts).to_le_bytes());
        whole
    }

    /// Appends a whole frame to `out`.
    pub fn frame(&mut self, frame_type: FrameType, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&self.seal(frame_type, &[payload]));
        out.extend_from_slice(payload);
    }
}

/// Checks that the frames of one direction come whole and in order.
#[derive(Clone, Debug, Default)]
pub struct Receiver {
    next: u64,
}

impl Receiver {
    /// Nothing received yet.
    pub fn new() -> Receiver {
        Receiver::default()
    }

    /// Takes a header; its payload is to be given to [`Header::verify`].
    pub fn header(&mut self, bytes: &[u8; HEADER_LEN]) -> Result<Header, Error> {
        let header = Header::parse(bytes)?;
        if header.sequence != self.next {
            return Err(Error::Sequence { expected: self.next, got: header.sequence });
        }
        self.next += 1;
        Ok(header)
    }
}

/// Reads fields out of a payload; every read is checked against the end.
pub(crate) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { what, rest: bytes }
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let (head, tail) = self.rest.split_at_checked(length).ok_or(Error::Short(self.what))?;
        self.rest = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (head, tail) = self.rest.split_first_chunk::<N>().ok_or(Error::Short(self.what))?;
        self.rest = tail;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A u32 count or length with its bound.
    pub(crate) fn count(&mut self, bound: usize, what: &'static str) -> Result<usize, Error> {
        let value = self.u32()? as usize;
        if value > bound {
            return Err(Error::Bound { what, value: value as u64, bound: bound as u64 });
        }
        Ok(value)
    }

    /// A length-prefixed run of bytes.
    pub(crate) fn blob(&mut self, bound: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let length = self.count(bound, what)?;
        self.bytes(length)
    }

    /// A length-prefixed UTF-8 text.
    pub(crate) fn text(&mut self, bound: usize, what: &'static str) -> Result<String, Error> {
        let bytes = self.blob(bound, what)?;
        core::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Error::Text(what))
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.rest)
    }

    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.rest.len() {
            0 => Ok(()),
            n => Err(Error::Trailing(self.what, n)),
        }
    }
}

pub(crate) fn put_blob(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests;
