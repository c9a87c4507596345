//! Images for tests, made of a few instructions each: an ELF file with the note for a direct start, whose code is
//! assembled into the test itself ([`guest_code!`]) and copied out.
#![allow(dead_code)]

use guest_abi::{DirectStart, NOTE_NAME, NOTE_TYPE, NOTE_VERSION};
use zerocopy::{FromBytes, IntoBytes};

pub const TABLES: u64 = 0x10_0000;
pub const BOOT_INFO: u64 = 0x20_0000;
pub const STACK_TOP: u64 = 0x30_0000;
pub const CODE: u64 = 0x40_0000;

/// Defines a function that returns position-independent code.
#[macro_export]
macro_rules! guest_code {
    ($vis:vis $name:ident, $start:literal, $end:literal, $asm:literal) => {
        core::arch::global_asm!(
            concat!(".pushsection .rodata.guest,\"a\"\n.globl ", $start, "\n", $start, ":\n"),
            $asm,
            concat!("\n.globl ", $end, "\n", $end, ":\n.byte 0\n.popsection")
        );
        $vis fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $start]
                static START: u8;
                #[link_name = $end]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both labels stand in one section, in this order, around constant bytes.
            unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
        }
    };
}

fn put(v: &mut Vec<u8>, words: &[u64]) {
    v.extend(words.iter().flat_map(|w| w.to_le_bytes()));
}

/// Page tables (identity, user, 2 MiB pages, the first and last GiB), GDT, TSS, an empty IDT.
fn tables() -> (Vec<u8>, DirectStart) {
    const FLAGS: u64 = 0x67; // present, writable, user, accessed, dirty
    let mut t = vec![0u64; 512 * 6];
    let page = |n: u64| TABLES + 0x1000 * n;
    t[0] = page(1) | FLAGS;
    t[512] = page(2) | FLAGS;
    t[512 + 3] = page(3) | FLAGS;
    for i in 0..512 {
        t[1024 + i] = (i as u64) << 21 | FLAGS | 0x80;
        t[1536 + i] = 3 << 30 | (i as u64) << 21 | FLAGS | 0x98;
    }
    let (gdt, tss) = (page(4), page(4) + 128);
    t[2048 + 4] = 0x00cf_f300_0000_ffff; // 0x20 user data
    t[2048 + 5] = 0x00af_fb00_0000_ffff; // 0x28 user code
    t[2048 + 6] = 0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    let mut bytes = Vec::new();
    put(&mut bytes, &t);
    let mut start = DirectStart::read_from_bytes(&[0; 80]).unwrap();
    start.version = NOTE_VERSION;
    start.cr3 = page(0);
    start.gdt_base = gdt;
    start.gdt_limit = 63;
    start.idt_base = page(5);
    start.idt_limit = 4095;
    start.tss_base = tss;
    start.tss_selector = 0x30;
    start.user_cs = 0x2b;
    start.user_ss = 0x23;
    start.entry = CODE;
    start.stack_top = STACK_TOP;
    start.boot_info = BOOT_INFO;
    (bytes, start)
}

/// An ELF file that runs `code` at [`CODE`], started directly in ring 3.
pub fn image(code: &[u8]) -> Vec<u8> {
    let (tables, start) = tables();
    let note = note(NOTE_NAME, NOTE_TYPE, start.as_bytes());
    elf(&[(1, TABLES, &tables), (1, CODE, code), (4, 0, &note)])
}

/// An ELF file that runs `code` at [`CODE`] in 32-bit protected mode (PVH).
pub fn pvh_image(code: &[u8]) -> Vec<u8> {
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    let note = note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &CODE.to_le_bytes());
    elf(&[(1, CODE, code), (4, 0, &note)])
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for n in [name.len() as u32, desc.len() as u32, kind] {
        note.extend(n.to_le_bytes());
    }
    note.extend(name);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(desc);
    note
}

fn elf(parts: &[(u32, u64, &[u8])]) -> Vec<u8> {
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut elf, &[CODE, 64, 0]);
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, parts.len() as u8, 0, 0, 0, 0, 0, 0, 0]);
    let mut at = 64 + 56 * parts.len() as u64;
    for (kind, address, bytes) in parts {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        let len = bytes.len() as u64;
        put(&mut elf, &[at, *address, *address, len, len, 4]);
        at += len;
    }
    for (_, _, bytes) in parts {
        elf.extend(*bytes);
    }
    elf
}
