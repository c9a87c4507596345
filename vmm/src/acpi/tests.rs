use super::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

#[test]
fn commands() {
    for (port, data, command) in [
        (0x64, &[0xfe][..], Some(Command::Reset)),
        (0x64, &[0xff], None),
        (0x64, &[0xfe, 0], None),
        (RESET_PORT, &[1], Some(Command::Reset)),
        (RESET_PORT, &[0], None),
        (0xcf9, &[0x06], Some(Command::Reset)),
        (0xcf9, &[0x02], None),
        (SLEEP_CONTROL_PORT, &[0x34], Some(Command::PowerOff)),
        (SLEEP_CONTROL_PORT, &[0x14], None),
        (SLEEP_CONTROL_PORT, &[0x2c], None),
        (SLEEP_CONTROL_PORT, &[], None),
    ] {
        assert_eq!(super::command(port, data), command, "{port:#x} {data:x?}");
    }
}

#[test]
fn an_event_stays_until_it_is_read() {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut registers = Registers::new(Some(irq.try_clone().unwrap()));
    registers.raise(Event::PowerButton);
    assert_eq!(irq.read().unwrap(), 1);
    // saved and restored: still there, and the interrupt comes again
    let state = registers.save();
    let mut registers = Registers::default();
    registers.restore(AcpiState { events: state.events | 1 << 31 }, Some(irq.try_clone().unwrap()));
    assert_eq!(irq.read().unwrap(), 1);
    registers.raise(Event::Generation);
    let mut word = [0xff; 4];
    // other widths do not take the events away
    for n in [1, 2] {
        assert!(!registers.read(EVENT_PORT, &mut word[..n]));
    }
    assert!(registers.read(EVENT_PORT, &mut word));
    assert_eq!(u32::from_le_bytes(word), 3);
    assert!(registers.read(EVENT_PORT, &mut word));
    assert_eq!(u32::from_le_bytes(word), 0);
}
