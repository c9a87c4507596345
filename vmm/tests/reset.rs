//! Resets and power off on /dev/kvm.

#![allow(clippy::unwrap_used)]

mod guest;

use std::sync::Arc;
use std::time::Duration;

use vmm::config::{Config, MemorySize, OnReset, SerialOutput};
use vmm::control::Control;
use vmm::stats::Stats;
use vmm::vcpu::End;

guest_code!(
    letter_and_reset,
    "reset_start",
    "reset_end",
    "
    .code32
    mov ebx, 0x300000
    inc dword ptr [ebx]              // memory is zero after each start
    mov al, 0x40
    add al, [ebx]
    mov dx, 0x3f8
    out dx, al
    mov al, 1
    mov dx, 0x602
    out dx, al
2:  jmp 2b
    .code64
"
);

guest_code!(
    letter_and_fault,
    "fault_start",
    "fault_end",
    "
    .code32
    mov al, 0x42
    mov dx, 0x3f8
    out dx, al
    ud2
    .code64
"
);

guest_code!(
    power_off,
    "off_start",
    "off_end",
    "
    .code32
    mov al, 0x34
    mov dx, 0x600
    out dx, al
2:  jmp 2b
    .code64
"
);

/// Runs it to its end; what it printed, and how it ended.
fn run(code: &[u8], on_reset: OnReset) -> (String, End) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, guest::pvh_image(code)).unwrap();
    let mut config = Config::for_image(image);
    config.memory = MemorySize::from_bytes(8 << 20);
    config.serial = SerialOutput::File(dir.path().join("console"));
    config.on_reset = on_reset;
    let control = Control::new(Arc::new(Stats::default()));
    control.start(config).unwrap();
    let ended = control.ended();
    let mut patience = 6000;
    let end = loop {
        if let Some(end) = ended.borrow().clone() {
            break end;
        }
        patience -= 1;
        assert!(patience > 0, "no end");
        std::thread::sleep(Duration::from_millis(10));
    };
    (std::fs::read_to_string(dir.path().join("console")).unwrap(), end)
}

#[test]
fn a_reset_ends_the_vm_where_that_is_wanted() {
    assert_eq!(run(letter_and_reset(), OnReset::Exit), ("A".into(), End::Reset));
    let (text, end) = run(letter_and_fault(), OnReset::Exit);
    assert_eq!(text, "B");
    assert!(matches!(end, End::Crash(_)));
}

#[test]
fn a_guest_can_switch_itself_off() {
    assert_eq!(run(power_off(), OnReset::Exit), (String::new(), End::PowerOff));
}
