//! Numbers and byte strings, little-endian: the writer of a frame's head and the reader of an untrusted one.
use super::WireError;
use crate::fs::IO_MAX;
use alloc::vec::Vec;

/// Puts values at the end of a head. A value beyond its limit spoils the frame, which is told at the end.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
    pub(super) spoilt: bool,
}

impl Writer {
    pub(super) fn u8(&mut self, v: u8) {
        self.bytes.push(v);
    }
    pub(super) fn u16(&mut self, v: u16) {
        self.bytes.extend_from_slice(&v.to_le_bytes());
    }
    pub(super) fn u32(&mut self, v: u32) {
        self.bytes.extend_from_slice(&v.to_le_bytes());
    }
    pub(super) fn u64(&mut self, v: u64) {
        self.bytes.extend_from_slice(&v.to_le_bytes());
    }
    pub(super) fn flag(&mut self, v: bool) {
        self.u8(v.into());
    }
    /// u32 length and bytes.
    pub(super) fn string(&mut self, v: &[u8], limit: usize) {
        self.count(v.len(), limit);
        self.bytes.extend_from_slice(v);
    }
    /// u32 number of elements that follow.
    pub(super) fn count(&mut self, n: usize, limit: usize) {
        self.spoilt |= n > limit;
        self.u32(u32::try_from(n).unwrap_or(u32::MAX));
    }
    /// Presence of an optional value that follows.
    pub(super) fn option<T>(&mut self, v: Option<T>, put: impl FnOnce(&mut Self, T)) {
        self.flag(v.is_some());
        if let Some(v) = v {
            put(self, v);
        }
    }
    /// The bulk data: not written here, but sent behind the head.
    pub(super) fn data(&mut self, v: Vec<u8>) -> Vec<u8> {
        self.spoilt |= v.len() > IO_MAX;
        v
    }
}

/// Takes values from the front of an untrusted head.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    /// The bulk data, until a value takes it.
    data: Option<Vec<u8>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(rest: &'a [u8], data: Vec<u8>) -> Self {
        Reader { rest, data: Some(data) }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(WireError::Malformed("cut short"))?;
        self.rest = rest;
        Ok(taken)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::Malformed("cut short"))?;
        self.rest = rest;
        Ok(*taken)
    }
    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }
    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub(super) fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Malformed("flag")),
        }
    }
    pub(super) fn string(&mut self, limit: usize) -> Result<Vec<u8>, WireError> {
        let n = self.count(limit, 1)?;
        Ok(self.take(n)?.to_vec())
    }
    /// Number of elements that follow, each of at least `least` bytes: checked against what is there, so that
    /// nothing is allocated on a lie.
    pub(super) fn count(&mut self, limit: usize, least: usize) -> Result<usize, WireError> {
        let n = self.u32()? as usize;
        if n > limit || n > self.rest.len() / least {
            return Err(WireError::Malformed("count"));
        }
        Ok(n)
    }
    pub(super) fn option<T>(
        &mut self,
        get: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<Option<T>, WireError> {
        if self.flag()? { get(self).map(Some) } else { Ok(None) }
    }
    /// The bulk data; empty when it has been taken.
    pub(super) fn data(&mut self) -> Vec<u8> {
        self.data.take().unwrap_or_default()
    }

    /// Nothing but padding (less than 8 zero bytes) may be left, and no data that nothing asked for.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.len() >= 8 || self.rest.iter().any(|b| *b != 0) {
            return Err(WireError::Malformed("bytes behind the end"));
        }
        if self.data.is_some_and(|d| !d.is_empty()) {
            return Err(WireError::Malformed("data in a frame that has none"));
        }
        Ok(())
    }
}
