//! XDR (RFC 4506): the few shapes ONC RPC and NFS need, read from bytes that are hostile and written to a buffer.
//!
//! Always true: a read never goes beyond the bytes given, never panics and allocates nothing; lengths are checked
//! against the bytes that are there before anything is taken.
use alloc::vec::Vec;

/// The bytes are not the XDR that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// The bytes end too early.
    #[error("truncated XDR")]
    Truncated,
    /// A length exceeds the bound of its type.
    #[error("XDR length above its bound")]
    TooLong,
    /// A boolean, enumeration or union discriminant has no such value.
    #[error("invalid XDR discriminant")]
    Discriminant,
}

/// Bytes of padding that follow `length` bytes of opaque data.
pub const fn padding(length: usize) -> usize {
    length.wrapping_neg() & 3
}

/// Reads XDR from the front of a byte slice.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from their beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes, position: 0 }
    }

    /// Bytes not read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The next `length` bytes, without padding.
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], XdrError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(XdrError::Truncated)?;
        self.rest = rest;
        self.position += length;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// Unsigned integer.
    pub fn u32(&mut self) -> Result<u32, XdrError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// Unsigned hyper integer.
    pub fn u64(&mut self) -> Result<u64, XdrError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Boolean: 0 or 1, nothing else.
    pub fn bool(&mut self) -> Result<bool, XdrError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(XdrError::Discriminant),
        }
    }

    /// Length of variable-length opaque data of at most `max` bytes.
    pub fn length(&mut self, max: usize) -> Result<usize, XdrError> {
        let length = self.u32()? as usize;
        if length > max { Err(XdrError::TooLong) } else { Ok(length) }
    }

    /// Variable-length opaque data (or a string) of at most `max` bytes, and its padding.
    pub fn opaque(&mut self, max: usize) -> Result<&'a [u8], XdrError> {
        let length = self.length(max)?;
        let data = self.bytes(length)?;
        self.bytes(padding(length))?;
        Ok(data)
    }
}

/// Appends XDR to a buffer of its own.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty buffer with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Writer { bytes: Vec::with_capacity(capacity) }
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Unsigned integer.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// Unsigned hyper integer.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// Boolean.
    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.u32(value as u32)
    }

    /// Fixed-length opaque data whose length is a multiple of four.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Variable-length opaque data or a string, padded.
    pub fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32);
        self.raw(bytes);
        self.raw(&[0; 3][..padding(bytes.len())])
    }
}

#[cfg(test)]
mod tests;
