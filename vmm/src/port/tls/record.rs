//! TLS 1.3 records (RFC 8446, section 5) of a session whose handshake is done.
//!
//! rustls makes the session and gives its traffic keys away ([`rustls::ExtractedSecrets`], as for a kernel's TLS); the records
//! themselves are sealed and opened here, by ring's AEADs, because rustls allocates and copies for each: in the pause nothing may be
//! allocated. Owns one direction's key, nonce and sequence number each. Always true: a sequence number is used once with a key; nothing
//! of a record is shown before its tag was checked; after [`AES_RECORDS_MAX`] records nothing more is sealed; behind an error nothing
//! more is opened. There are no tickets for resumption, no key updates, no records without content (they would keep a reader busy
//! for nothing, and none is sealed here); a peer that sends any of these breaks the connection. Frames end a port, not
//! close_notify: a stream that is cut short is a connection that was lost.

use ring::aead::{AES_128_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{AlertDescription, ConnectionTrafficSecrets};

use super::TlsError;

/// Length of a record's header.
pub const HEADER_LEN: usize = 5;
/// Most bytes of content in a record.
pub const CONTENT_MAX: usize = 1 << 14;
/// Longest record: header, content, and what the protocol allows a cipher to add.
pub const RECORD_MAX: usize = HEADER_LEN + CONTENT_MAX + 256;
/// What a record costs beside its content: header, type, tag.
pub const OVERHEAD: usize = HEADER_LEN + 1 + TAG_LEN;
/// Most records under one key with AES-GCM, below the 2^24.5 that RFC 8446, section 5.5, allows; 256 GiB of content.
pub const AES_RECORDS_MAX: u64 = 1 << 24;

const TAG_LEN: usize = 16;
const NONCE_LEN: usize = 12;
/// Content types.
pub const ALERT: u8 = 21;
/// See [`ALERT`].
pub const HANDSHAKE: u8 = 22;
/// See [`ALERT`].
pub const APPLICATION_DATA: u8 = 23;
/// The version in every record's header.
const VERSION: [u8; 2] = [3, 3];

/// One direction's key.
struct Direction {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    limit: u64,
}

impl Direction {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Direction, TlsError> {
        match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                Direction::with(&AES_128_GCM, key.as_ref(), iv.as_ref(), sequence, AES_RECORDS_MAX)
            }
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                Direction::with(&CHACHA20_POLY1305, key.as_ref(), iv.as_ref(), sequence, u64::MAX)
            }
            _ => Err(TlsError::Record("of a cipher that was not offered")),
        }
    }

    fn with(algorithm: &'static Algorithm, key: &[u8], iv: &[u8], sequence: u64, limit: u64) -> Result<Self, TlsError> {
        match (UnboundKey::new(algorithm, key), iv.try_into()) {
            (Ok(key), Ok(iv)) => Ok(Direction { key: LessSafeKey::new(key), iv, sequence, limit }),
            _ => Err(TlsError::Record("key of a wrong length")),
        }
    }

    /// The nonce of the next record: used once.
    fn nonce(&mut self) -> Result<Nonce, TlsError> {
        if self.sequence >= self.limit {
            return Err(TlsError::KeyWorn);
        }
        let mut nonce = self.iv;
        for (byte, more) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= more;
        }
        self.sequence += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

impl std::fmt::Debug for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Direction({} records)", self.sequence)
    }
}

/// Seals what is sent.
#[derive(Debug)]
pub struct Sealer(Direction);

impl Sealer {
    /// With a session's key.
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Sealer, TlsError> {
        Direction::new(secrets).map(Sealer)
    }

    /// Takes content from the front of `parts` and appends records to `out`, until the parts are used up or there is no room
    /// for another whole record within the capacity of `out`: it never allocates.
    pub fn fill(&mut self, parts: &mut Parts<'_>, out: &mut Vec<u8>) -> Result<(), TlsError> {
        while !parts.is_empty() && out.capacity() - out.len() >= CONTENT_MAX + OVERHEAD {
            // First: where there is none, nothing is left in `out` that is not sealed.
            let nonce = self.0.nonce()?;
            let at = out.len();
            out.extend_from_slice(&[0; HEADER_LEN]);
            parts.take(CONTENT_MAX, out);
            out.push(APPLICATION_DATA);
            let header = header(out.len() - at - HEADER_LEN + TAG_LEN);
            out[at..at + HEADER_LEN].copy_from_slice(&header);
            let body = &mut out[at + HEADER_LEN..];
            let tag = self.0.key.seal_in_place_separate_tag(nonce, Aad::from(header), body);
            out.extend_from_slice(tag.map_err(|_| TlsError::Record("that is too long"))?.as_ref());
        }
        Ok(())
    }
}

fn header(length: usize) -> [u8; HEADER_LEN] {
    let [high, low] = (length as u16).to_be_bytes();
    [APPLICATION_DATA, VERSION[0], VERSION[1], high, low]
}

/// Bytes in pieces, taken from the front.
#[derive(Debug)]
pub struct Parts<'a> {
    parts: &'a [&'a [u8]],
    taken: usize,
}

impl<'a> Parts<'a> {
    /// All of these.
    pub fn new(parts: &'a [&'a [u8]]) -> Parts<'a> {
        let mut all = Parts { parts, taken: 0 };
        all.skip_empty();
        all
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Moves up to `most` bytes to `out`.
    fn take(&mut self, most: usize, out: &mut Vec<u8>) {
        let end = out.len() + most;
        while out.len() < end
            && let Some(part) = self.parts.first()
        {
            let rest = &part[self.taken..];
            let now = &rest[..rest.len().min(end - out.len())];
            out.extend_from_slice(now);
            self.taken += now.len();
            self.skip_empty();
        }
    }

    fn skip_empty(&mut self) {
        while let Some(part) = self.parts.first()
            && self.taken == part.len()
        {
            (self.parts, self.taken) = (&self.parts[1..], 0);
        }
    }
}

/// Length of the record that begins here, header and all; `None` if its header is not there as a whole.
pub fn length(bytes: &[u8]) -> Result<Option<usize>, TlsError> {
    let Some([kind, major, _, high, low]) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let length = HEADER_LEN + usize::from(u16::from_be_bytes([*high, *low]));
    match (kind, major) {
        (20..=23, 3) if length <= RECORD_MAX => Ok(Some(length)),
        (20..=23, 3) => Err(TlsError::Record("that is too long")),
        _ if bytes.starts_with(&migration::wire::MAGIC.to_le_bytes()) => Err(TlsError::Plain(None)),
        _ => Err(TlsError::Record("of no known type: this is not TLS")),
    }
}

/// Opens what is received.
#[derive(Debug)]
pub struct Opener {
    direction: Direction,
    /// A record was opened.
    begun: bool,
    /// A record was refused, or was the last.
    over: bool,
}

impl Opener {
    /// With a session's key.
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Opener, TlsError> {
        Direction::new(secrets).map(Opener::with)
    }

    fn with(direction: Direction) -> Opener {
        Opener { direction, begun: false, over: false }
    }

    /// Opens the whole record at `buffer[at..]` and moves its content to the front of the buffer; gives the content's length,
    /// which is not 0.
    ///
    /// # Panics
    /// When `at` and the record's length are not within the buffer: an error of the program, not of the peer.
    pub fn open(&mut self, buffer: &mut [u8], at: usize) -> Result<usize, TlsError> {
        if self.over {
            return Err(TlsError::Record("behind the last one"));
        }
        let opened = self.open_next(buffer, at);
        self.begun = true;
        self.over = opened.is_err();
        opened
    }

    fn open_next(&mut self, buffer: &mut [u8], at: usize) -> Result<usize, TlsError> {
        let (_, record) = buffer.split_at(at);
        let Some(header) = record.first_chunk::<HEADER_LEN>().copied() else { return Err(TlsError::Damaged) };
        if header[0] == ALERT && !self.begun {
            // In the clear: from a peer that could not agree on a key. Later anybody but the peer may have put it there.
            return Err(record.get(HEADER_LEN + 1).map_or(TlsError::Damaged, |code| alert(*code)));
        }
        if header[0] != APPLICATION_DATA {
            return Err(TlsError::Record("in the clear, after the handshake"));
        }
        let nonce = self.direction.nonce()?;
        let content = self.direction.key.open_within(nonce, Aad::from(header), buffer, at + HEADER_LEN..);
        let content = content.map_err(|_| TlsError::Damaged)?;
        // The content, its type, any number of zeroes: all that is no longer than the longest content and a type.
        if content.len() > CONTENT_MAX + 1 {
            return Err(TlsError::Record("that is too long"));
        }
        let end = content.iter().rposition(|b| *b != 0).ok_or(TlsError::Record("without a type"))?;
        match (content[end], &content[..end]) {
            (APPLICATION_DATA, []) => Err(TlsError::Record("without content")),
            (APPLICATION_DATA, _) => Ok(end),
            (ALERT, [_, code]) => Err(alert(*code)),
            (HANDSHAKE, _) => Err(TlsError::Record("that asks for another key")),
            _ => Err(TlsError::Record("that is not allowed here")),
        }
    }
}

fn alert(code: u8) -> TlsError {
    match AlertDescription::from(code) {
        AlertDescription::CloseNotify => TlsError::Closed,
        description => TlsError::Refused(description),
    }
}

#[cfg(test)]
mod tests;
