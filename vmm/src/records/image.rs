//! All records as the bytes of a file.
//!
//! Little-endian: magic `OROF`, u32 version (1), u64 floor, u32 count, u32 0; then `count` entries of 56 bytes {u64 vm id, epoch, session,
//! 2×u64 owner, 2×u64 heir (zero: none)} by ascending vm id; at the end the xxh3-64 of all before it.
use fabric::id::{Epoch, Owner, VmId};
use fabric::owner::{OwnerChange, OwnerRecord, OwnerTable, VMS_MAX};
use migration::wire::Digest;

const MAGIC: [u8; 4] = *b"OROF";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const ENTRY: usize = 56;
const HASH: usize = 8;
/// Longest image, in bytes.
pub const IMAGE_MAX: usize = HEADER + VMS_MAX * ENTRY + HASH;

/// Why bytes are no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Other bytes, or cut off before the version.
    #[error("this is no file of ownership records")]
    Foreign,
    /// Of a newer `vmm`.
    #[error("its version is {0}; this vmm knows up to {VERSION}")]
    Version(u32),
    /// The checksum is not that of the bytes.
    #[error("it is damaged or cut off")]
    Damaged,
    /// The checksum is right, and the content is not.
    #[error("it contradicts itself: {0}")]
    Content(&'static str),
}

/// The table as bytes.
pub fn encode(table: &OwnerTable) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(IMAGE_MAX);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&table.floor().0.to_le_bytes());
    bytes.extend_from_slice(&(table.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    for (record, heir) in table.entries() {
        let [a, b] = record.owner.0;
        let [c, d] = heir.unwrap_or_default().0;
        for number in [record.vm_id.0, record.epoch.0, record.session.0, a, b, c, d] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
    }
    let hash = hash(&bytes);
    bytes.extend_from_slice(&hash.to_le_bytes());
    bytes
}

/// The table in an image.
pub fn decode(bytes: &[u8]) -> Result<OwnerTable, ImageError> {
    if bytes.get(..4) != Some(&MAGIC) {
        return Err(ImageError::Foreign);
    }
    match bytes.get(4..).and_then(|rest| rest.first_chunk()).map(|v| u32::from_le_bytes(*v)) {
        Some(VERSION) => {}
        Some(version) => return Err(ImageError::Version(version)),
        None => return Err(ImageError::Foreign),
    }
    let (body, end) = bytes.split_last_chunk::<HASH>().ok_or(ImageError::Damaged)?;
    if hash(body) != u64::from_le_bytes(*end) {
        return Err(ImageError::Damaged);
    }
    let (header, entries) = body.split_first_chunk::<HEADER>().ok_or(ImageError::Damaged)?;
    let (entries, rest) = entries.as_chunks::<ENTRY>();
    let count = u64::from(u32::from_le_bytes([header[16], header[17], header[18], header[19]]));
    if !rest.is_empty() || entries.len() as u64 != count || header[20..] != [0; 4] {
        return Err(ImageError::Content("it is not as long as it says"));
    }
    if entries.len() > VMS_MAX {
        return Err(ImageError::Content("too many records"));
    }
    let mut table = OwnerTable::above(Epoch(number(header, 8)));
    let mut last = 0;
    for entry in entries {
        let [vm_id, epoch, session, a, b, c, d] = std::array::from_fn(|i| number(entry, i * 8));
        if vm_id <= last {
            return Err(ImageError::Content("records out of order, or of VM 0"));
        }
        if session == 0 || session > epoch {
            return Err(ImageError::Content("a session of no epoch"));
        }
        last = vm_id;
        let record =
            OwnerRecord { vm_id: VmId(vm_id), epoch: Epoch(epoch), session: Epoch(session), owner: Owner([a, b]) };
        let change = OwnerChange::Set(record, ([c, d] != [0; 2]).then_some(Owner([c, d])));
        table.admits(&change).map_err(|_| ImageError::Content("more heirs than there may be"))?;
        table.apply(&change);
    }
    Ok(table)
}

/// Eight bytes at a place inside.
fn number<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn hash(bytes: &[u8]) -> u64 {
    let mut digest = Digest::default();
    digest.update(bytes);
    digest.finish()
}
