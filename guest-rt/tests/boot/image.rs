//! The image as a file: what must hold before anything runs.
use crate::harness::image;
use guest_abi::{DirectStart, NOTE_NAME, NOTE_TYPE, NOTE_VERSION};
use std::process::Command;
use zerocopy::FromBytes;

fn tool(name: &str, arguments: &[&str]) -> String {
    let out = Command::new(name).args(arguments).arg(image()).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A KVM without VMX emulates ring 0 and knows few SSE instructions; one of them is the end of the VM.
#[test]
fn ring_0_has_no_sse() {
    let code = tool("objdump", &["-d", "-M", "intel", "-j", ".ring0"]);
    assert!(code.contains("iretq"), "the shim's code is there");
    for line in code.lines() {
        assert!(!["xmm", "ymm", "mm0", "fxsave", "st("].iter().any(|w| line.contains(w)), "{line}");
    }
}

#[test]
fn no_relocation_is_left() {
    let relocations = tool("readelf", &["-r", "-W"]);
    assert!(relocations.contains("There are no relocations"), "{relocations}");
}

/// `name` of `nm`.
fn symbol(symbols: &str, name: &str) -> u64 {
    let line = symbols.lines().find(|l| l.split_whitespace().nth(2) == Some(name));
    u64::from_str_radix(line.unwrap_or_else(|| panic!("no symbol {name}")).split_whitespace().next().unwrap(), 16)
        .unwrap()
}

#[test]
fn the_note_says_where_things_are() {
    let bytes = std::fs::read(image()).unwrap();
    let header: Vec<u8> =
        [10u32, 80, NOTE_TYPE].iter().flat_map(|w| w.to_le_bytes()).chain(*NOTE_NAME).chain([0, 0]).collect();
    let at = bytes.windows(header.len()).position(|w| w == header).expect("the note") + header.len();
    let (note, _) = DirectStart::read_from_prefix(&bytes[at..]).unwrap();
    let symbols = tool("nm", &[]);
    let expected = DirectStart {
        version: NOTE_VERSION,
        flags: 0,
        cr3: symbol(&symbols, "R0_PT"),
        gdt_base: symbol(&symbols, "R0_TABLES"),
        idt_base: 0x10_0000,
        tss_base: symbol(&symbols, "R0_TABLES") + 0x60,
        entry: symbol(&symbols, "r3_start_direct"),
        stack_top: symbol(&symbols, "__stack_top"),
        boot_info: 0x20_0000,
        gdt_limit: 63,
        idt_limit: 4095,
        tss_selector: 0x30,
        user_cs: 0x2b,
        user_ss: 0x23,
        reserved: [0; 3],
    };
    assert_eq!(note, expected);
    assert_eq!(note.stack_top % 16, 0);
}

#[test]
fn code_and_constants_lie_in_their_pages() {
    let symbols = tool("nm", &[]);
    let (start, end) = (symbol(&symbols, "__text_start"), symbol(&symbols, "__text_end"));
    assert!(start == 0x40_0000 && end <= 0x60_0000, "{start:#x}..{end:#x}");
    assert!(symbol(&symbols, "__heap_start") > 0x80_0000);
    assert!((start..end).contains(&symbol(&symbols, "r3_fault_entry")));
}
