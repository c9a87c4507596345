//! The ELF kernel inside a bzImage, for the PVH way of booting: Debian ships no vmlinux.
//!
//! Where the payload lies is in the setup header (Linux, Documentation/arch/x86/boot.rst: `setup_sects`, `payload_offset`,
//! `payload_length`). Always true: what is left in `output` is a whole ELF file.
use super::{Kernel, run};
use crate::Error;
use std::path::Path;
use std::process::Command;

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// The build appends the unpacked size to the compressed kernel.
const SIZE_SUFFIX: usize = 4;
/// Ways in which Debian's kernels are compressed: first bytes, tool.
const TOOLS: [(&[u8], &str); 3] =
    [(&[0x02, 0x21, 0x4c, 0x18], "lz4"), (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"), (&[0x28, 0xb5, 0x2f, 0xfd], "zstd")];

/// Unpacks the kernel to `output` unless it is there.
pub fn vmlinux(kernel: &Kernel, output: &Path) -> Result<(), Error> {
    if output.exists() {
        return Ok(());
    }
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { path, source }
    };
    let bytes = std::fs::read(&kernel.vmlinuz).map_err(file(&kernel.vmlinuz))?;
    let bad = |message: &str| Error::Image { path: kernel.vmlinuz.clone(), message: message.into() };
    let payload = payload(&bytes).ok_or_else(|| bad("not a bzImage with a payload"))?;
    let (_, tool) = TOOLS
        .iter()
        .find(|(magic, _)| payload.starts_with(magic))
        .ok_or_else(|| bad("the payload is compressed in an unknown way"))?;
    let (packed, partial) = (output.with_extension("packed"), output.with_extension("partial"));
    std::fs::write(&packed, payload).map_err(file(&packed))?;
    let out = std::fs::File::create(&partial).map_err(file(&partial))?;
    run(Command::new(tool).arg("-dc").arg(&packed).stdout(out))?;
    std::fs::remove_file(&packed).map_err(file(&packed))?;
    std::fs::rename(&partial, output).map_err(file(output))
}

/// The compressed kernel in a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let start = (usize::from(image[SETUP_SECTS]) + 1) * SECTOR + word(PAYLOAD_OFFSET)?;
    image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?.checked_sub(SIZE_SUFFIX)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_found_by_the_header() {
        let mut image = vec![0; 3 * SECTOR];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 16;
        image[PAYLOAD_LENGTH] = 12;
        image[2 * SECTOR + 16..2 * SECTOR + 28].copy_from_slice(b"payload.SIZE");
        assert_eq!(payload(&image), Some(&b"payload."[..]));
        image.truncate(2 * SECTOR + 20);
        assert_eq!(payload(&image), None);
        assert_eq!(payload(&image[..SECTOR]), None);
        assert_eq!(payload(b""), None);
    }
}
