//! Sections: opaque state with a name and a version of its own, on the wire (STATE frame) and in checkpoints.
//!
//! ```text
//!  0  u32 count      at most [`SECTIONS_MAX`]
//!  4  count × { u32 length, name; u32 version; u32 length, bytes }
//! ```
//!
//! Always true of a parsed [`Sections`]: names are unique, at most [`NAME_MAX`] bytes of UTF-8.
use crate::Error;
use crate::wire::{Reader, put_blob};

/// Most sections.
pub const SECTIONS_MAX: usize = 256;
/// Longest name, in bytes.
pub const NAME_MAX: usize = 64;
/// Longest content of one section, in bytes.
pub const SECTION_MAX: usize = 1 << 20;

/// State of one device, of the vCPU, of the clock, …
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Whose state: `"vcpu0"`, `"net/lan"`.
    pub name: String,
    /// Version of the content; a reader refuses one that is newer than it knows.
    pub version: u32,
    /// Content.
    pub bytes: Vec<u8>,
}

/// All sections of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections(Vec<Section>);

impl Sections {
    /// No section yet.
    pub fn new() -> Sections {
        Sections::default()
    }

    /// Adds a section.
    pub fn push(&mut self, section: Section) -> Result<(), Error> {
        bound("sections", self.0.len() + 1, SECTIONS_MAX)?;
        bound("name of a section", section.name.len(), NAME_MAX)?;
        bound("section", section.bytes.len(), SECTION_MAX)?;
        if self.0.iter().any(|s| s.name == section.name) {
            return Err(Error::DuplicateSection(section.name));
        }
        self.0.push(section);
        Ok(())
    }

    /// The section with this name, whose version must be at most `known`.
    pub fn get(&self, name: &str, known: u32) -> Result<&Section, Error> {
        let section = self.0.iter().find(|s| s.name == name).ok_or_else(|| Error::MissingSection(name.to_owned()))?;
        if section.version > known {
            return Err(Error::SectionVersion { name: name.to_owned(), got: section.version, known });
        }
        Ok(section)
    }

    /// All of them, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Section> {
        self.0.iter()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.0.len() as u32).to_le_bytes());
        for section in &self.0 {
            put_blob(out, section.name.as_bytes());
            out.extend_from_slice(&section.version.to_le_bytes());
            put_blob(out, &section.bytes);
        }
    }

    /// Reads what [`Sections::encode`] wrote.
    pub fn parse(payload: &[u8]) -> Result<Sections, Error> {
        let mut r = Reader::new("STATE", payload);
        let mut sections = Sections::new();
        for _ in 0..r.count(SECTIONS_MAX, "sections")? {
            let name = r.text(NAME_MAX, "name of a section")?;
            let version = r.u32()?;
            let bytes = r.blob(SECTION_MAX, "section")?.to_vec();
            sections.push(Section { name, version, bytes })?;
        }
        r.finish()?;
        Ok(sections)
    }
}

fn bound(what: &'static str, value: usize, bound: usize) -> Result<(), Error> {
    if value > bound { Err(Error::Bound { what, value: value as u64, bound: bound as u64 }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
