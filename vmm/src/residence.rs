//! What of its own program this process keeps in memory.
//!
//! Starting a VM runs code that is never run again: command line, configuration, image loader, CPUID, sandbox, keys. The kernel
//! maps it in pieces of 64 KiB, and it would stay in the process's resident memory for as long as it lives. Always true: only
//! pages that are as they are in the file are given back, and whoever needs one again finds it in the page cache.

use std::ffi::CStr;

use libc::{PF_W, PT_LOAD, c_int, c_void, dl_iterate_phdr, dl_phdr_info};

/// Takes the pages of this program and its libraries that cannot be written out of this process's memory; what it goes on using comes
/// back by itself.
pub fn give_start_code_back() {
    // SAFETY: the callback has the type that is called, lives for ever and takes no data.
    unsafe { dl_iterate_phdr(Some(give_back), std::ptr::null_mut()) };
}

extern "C" fn give_back(object: *mut dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the loader gives a valid object for the duration of the call.
    let object = unsafe { &*object };
    if !is_file(object) || object.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the loader says that there are so many program headers at this place.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)) };
    // SAFETY: no memory is involved.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    for header in headers.iter().filter(|h| h.p_type == PT_LOAD && h.p_flags & PF_W == 0) {
        // Pages that a neighbouring segment shares stay.
        let begin = (object.dlpi_addr + header.p_vaddr).next_multiple_of(page);
        let end = (object.dlpi_addr + header.p_vaddr + header.p_memsz) / page * page;
        if begin < end {
            // SAFETY: these pages are mapped privately from a file, cannot be written and have not been: the loader relocates
            // only what it may write, and nothing that is built today has relocations in its text (DT_TEXTREL). Their content is
            // read from the file again when it is needed.
            unsafe { libc::madvise(begin as *mut c_void, (end - begin) as usize, libc::MADV_DONTNEED) };
        }
    }
    0
}

/// Whether it is mapped from a file: the program itself (which has no name), or a library (by its path); not the kernel's.
fn is_file(object: &dl_phdr_info) -> bool {
    if object.dlpi_name.is_null() {
        return false;
    }
    // SAFETY: a name the loader gives ends with a zero.
    let name = unsafe { CStr::from_ptr(object.dlpi_name) }.to_bytes();
    name.is_empty() || name.starts_with(b"/")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of what is mapped from this program's file and cannot be written.
    fn resident() -> u64 {
        let program = std::env::current_exe().unwrap().display().to_string();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut ours, mut sum) = (false, 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if !first.ends_with(':') {
                ours = line.ends_with(&program) && !words.next().unwrap_or_default().contains('w');
            } else if ours && first == "Rss:" {
                sum += words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        sum
    }

    #[test]
    fn what_is_not_used_leaves_and_what_is_used_comes_back() {
        let before = resident();
        give_start_code_back();
        let after = resident();
        assert!(after < before, "{before} KiB, then {after} KiB");
        // It all still works: code, constants and libraries.
        let text = format!("{:?}", (0..100).map(|i| f64::from(i).sqrt()).collect::<Vec<_>>());
        assert!(text.starts_with("[0.0, 1.0, 1.414"));
        assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
    }
}
