//! Pages on their way into a memory file.
//!
//! Owns what is known of each page so far. Always true, once [`PageFile::finish`] has returned: the file has at each page's place what its
//! checksum is of, and zeros (holes, if the file system can) everywhere else, so that it can be mapped as a whole.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use migration::checkpoint::{Content, PageTable, page_sum};

use crate::memory::PAGE_SIZE;
use crate::port::transfer::is_zero;

/// Bytes written at once, at most.
const WRITE_MAX: usize = 1 << 20;

/// See the module.
pub(super) struct PageFile<'a> {
    file: &'a File,
    /// Whether zero pages must be told of: they hide a parent's.
    incremental: bool,
    /// By page number.
    sums: Vec<u64>,
    /// Bit n of word m is page 64 m + n.
    raw: Vec<u64>,
    zero: Vec<u64>,
    waiting: Vec<u8>,
    /// Offset of what is waiting.
    at: u64,
}

impl<'a> PageFile<'a> {
    /// Of a guest whose memory ends at `limit`.
    pub fn new(file: &'a File, limit: u64, incremental: bool) -> io::Result<PageFile<'a>> {
        file.set_len(limit)?;
        let pages = (limit / PAGE_SIZE as u64) as usize;
        let words = || vec![0; pages.div_ceil(64)];
        Ok(PageFile {
            file,
            incremental,
            sums: vec![0; pages],
            raw: words(),
            zero: words(),
            waiting: Vec::with_capacity(WRITE_MAX),
            at: 0,
        })
    }

    /// What a page contains now; the last word counts.
    pub fn put(&mut self, page: u64, bytes: &[u8]) -> io::Result<()> {
        if is_zero(bytes) {
            return self.clear(page);
        }
        let offset = page * PAGE_SIZE as u64;
        let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
        let Some(sum) = self.sums.get_mut(page as usize) else { return Err(io::ErrorKind::InvalidInput.into()) };
        *sum = page_sum(bytes);
        self.raw[word] |= bit;
        self.zero[word] &= !bit;
        if self.at + self.waiting.len() as u64 != offset || self.waiting.len() == WRITE_MAX {
            self.flush()?;
            self.at = offset;
        }
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    /// A page is zero, or without content, which is the same here: a hole, and what a parent has there is hidden.
    pub fn clear(&mut self, page: u64) -> io::Result<()> {
        let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
        if page as usize >= self.sums.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.zero[word] |= bit;
        if self.raw[word] & bit != 0 {
            self.raw[word] &= !bit;
            self.flush()?;
            self.punch(page * PAGE_SIZE as u64)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.waiting, self.at)?;
        self.waiting.clear();
        Ok(())
    }

    fn punch(&self, offset: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as libc::off_t, PAGE_SIZE as libc::off_t) } {
            0 => Ok(()),
            _ => self.file.write_all_at(&[0; PAGE_SIZE], offset),
        }
    }

    /// Writes what waits; what the checkpoint says of its pages.
    pub fn finish(mut self) -> io::Result<PageTable> {
        self.flush()?;
        let mut table = PageTable::new();
        for (index, (raw, zero)) in self.raw.iter().zip(&self.zero).enumerate() {
            let mut bits = if self.incremental { raw | zero } else { *raw };
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                let page = index as u64 * 64 + u64::from(bit);
                let content = match raw >> bit & 1 {
                    1 => Content::Raw(self.sums[page as usize]),
                    _ => Content::Zero,
                };
                table.push(page, content);
            }
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LIMIT: u64 = 200 * PAGE_SIZE as u64;

    fn page(file: &File, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE];
        file.read_exact_at(&mut bytes, number * PAGE_SIZE as u64).unwrap();
        bytes
    }

    #[test]
    fn the_last_word_on_a_page_counts() {
        let file = tempfile::tempfile().unwrap();
        for incremental in [false, true] {
            let mut pages = PageFile::new(&file, LIMIT, incremental).unwrap();
            let (ones, twos, zeros) = ([1; PAGE_SIZE], [2; PAGE_SIZE], [0; PAGE_SIZE]);
            for (number, bytes) in [
                (70, &ones),
                (71, &ones),
                (9, &ones),
                (9, &zeros),
                (70, &twos),
                (12, &zeros),
                (12, &twos),
                (13, &zeros),
            ] {
                pages.put(number, bytes).unwrap();
            }
            let table: Vec<_> = pages.finish().unwrap().iter().collect();
            let mut expected = vec![
                (9, Content::Zero),
                (12, Content::Raw(page_sum(&twos))),
                (13, Content::Zero),
                (70, Content::Raw(page_sum(&twos))),
                (71, Content::Raw(page_sum(&ones))),
            ];
            if !incremental {
                expected.retain(|(_, content)| *content != Content::Zero);
            }
            assert_eq!(table, expected);
            assert_eq!((page(&file, 9), page(&file, 70), page(&file, 71)), (zeros.into(), twos.into(), ones.into()));
            assert_eq!(file.metadata().unwrap().len(), LIMIT);
        }
    }

    #[test]
    fn a_page_without_content_is_a_hole_until_it_has_some() {
        let file = tempfile::tempfile().unwrap();
        let mut pages = PageFile::new(&file, LIMIT, true).unwrap();
        let ones = [1; PAGE_SIZE];
        // Written, then free: what was there is gone, also if it has not reached the file yet.
        for number in [3, 4, 5] {
            pages.put(number, &ones).unwrap();
        }
        pages.clear(4).unwrap();
        // Free, then used.
        pages.clear(9).unwrap();
        pages.put(9, &ones).unwrap();
        // Free all the time: a parent's content is not to come back.
        pages.clear(12).unwrap();
        let table: Vec<_> = pages.finish().unwrap().iter().collect();
        let raw = Content::Raw(page_sum(&ones));
        assert_eq!(table, [(3, raw), (4, Content::Zero), (5, raw), (9, raw), (12, Content::Zero)]);
        assert_eq!((page(&file, 4), page(&file, 5)), (vec![0; PAGE_SIZE], ones.to_vec()));
    }

    #[test]
    fn a_page_beyond_the_end_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let mut pages = PageFile::new(&file, LIMIT, false).unwrap();
        assert!(pages.put(200, &[1; PAGE_SIZE]).is_err());
        assert!(pages.clear(200).is_err());
    }
}
