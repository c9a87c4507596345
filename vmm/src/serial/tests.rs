use std::io::Write;
use std::os::unix::net::UnixStream;

use super::*;
use crate::config::SerialOutput;

const LINE_STATUS: u8 = 5;
const DATA_READY: u8 = 1;

struct Setup {
    port: SerialPort,
    irq: EventFd,
    client: UnixStream,
    _dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let console = Console::open(&SerialOutput::Socket(path.clone())).unwrap();
    let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let port = SerialPort::new(console, Some(irq.try_clone().unwrap()));
    Setup { port, irq, client: UnixStream::connect(&path).unwrap(), _dir: dir }
}

/// Everything the guest finds in the port.
fn drain(port: &mut SerialPort) -> Vec<u8> {
    let mut bytes = Vec::new();
    while port.read(LINE_STATUS) & DATA_READY != 0 {
        bytes.push(port.read(DATA));
    }
    bytes
}

#[test]
fn input_waits_for_the_driver_and_raises_an_interrupt() {
    let mut s = setup();
    s.client.write_all(b"early").unwrap();
    s.port.take_input();
    assert_eq!(drain(&mut s.port), b"");
    assert!(s.irq.read().is_err());
    s.port.write(INTERRUPT_ENABLE, 1);
    assert!(s.irq.read().is_ok());
    assert_eq!(drain(&mut s.port), b"early");
    s.client.write_all(b"late").unwrap();
    s.port.take_input();
    assert!(s.irq.read().is_ok());
    assert_eq!(drain(&mut s.port), b"late");
}

/// As Linux finds out what the port is, before it reads and throws away what there may be.
#[test]
fn input_is_not_given_to_a_probe() {
    let mut s = setup();
    s.client.write_all(b"early").unwrap();
    s.port.take_input();
    s.port.write(INTERRUPT_ENABLE, 0);
    s.port.write(INTERRUPT_ENABLE, 0x0f);
    s.port.write(INTERRUPT_ENABLE, 0);
    s.port.read(DATA);
    s.port.write(INTERRUPT_ENABLE, 5);
    assert_eq!(drain(&mut s.port), b"early");
    // A driver that goes on with all of them gets what is typed from then on.
    s.port.write(INTERRUPT_ENABLE, 0x0f);
    s.client.write_all(b"late").unwrap();
    s.port.take_input();
    assert_eq!(drain(&mut s.port), b"late");
}

#[test]
fn much_input_comes_through_the_small_buffer_complete() {
    let mut s = setup();
    s.port.write(INTERRUPT_ENABLE, 1);
    let text: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
    s.client.write_all(&text).unwrap();
    s.port.take_input();
    assert_eq!(s.port.save().input.len(), BUFFER);
    assert_eq!(drain(&mut s.port), text);
}

#[test]
fn loopback_is_not_mixed_with_input() {
    let mut s = setup();
    s.port.write(INTERRUPT_ENABLE, 1);
    s.port.write(MODEM_CONTROL, LOOPBACK);
    s.client.write_all(b"typed").unwrap();
    s.port.take_input();
    s.port.write(DATA, b'x');
    assert_eq!(drain(&mut s.port), b"x");
    s.port.write(MODEM_CONTROL, 0);
    assert_eq!(drain(&mut s.port), b"typed");
}

#[test]
fn input_taken_is_saved_and_the_rest_is_not_taken() {
    let mut s = setup();
    s.port.write(INTERRUPT_ENABLE, 1);
    s.client.write_all(b"abc").unwrap();
    s.port.take_input();
    s.port.stop_input();
    s.client.write_all(b"def").unwrap();
    s.port.take_input();
    let state = s.port.save();
    assert_eq!(state.input, b"abc");

    let mut there = setup();
    there.client.write_all(b"there").unwrap();
    there.port.restore(&state, Some(there.irq.try_clone().unwrap())).unwrap();
    assert_eq!(drain(&mut there.port), b"abc");
    there.port.resume();
    assert_eq!(drain(&mut there.port), b"there");
    // it goes on here as well
    s.port.resume();
    assert_eq!(drain(&mut s.port), b"abcdef");

    let wrong = SerialState { input: vec![0; BUFFER + 1], ..state };
    assert!(there.port.restore(&wrong, None).is_err());
}
