use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::event::Events;

fn read_all(console: &Console) -> Vec<u8> {
    let mut buffer = [0; 64];
    let n = console.read(&mut buffer);
    buffer[..n].to_vec()
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let mut console = Console::open(&SerialOutput::Socket(path.clone())).unwrap();
    let events = Events::new().unwrap();
    events.add_console(console.descriptor().unwrap()).unwrap();
    console.write_all(b"nobody there").unwrap();
    assert_eq!(read_all(&console), b"");

    let mut first = UnixStream::connect(&path).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    second.write_all(b"two").unwrap();
    first.write_all(b"one").unwrap();
    assert!(!events.io.wait(Some(Duration::from_secs(10))).is_empty());
    assert_eq!(read_all(&console), b"one");
    assert_eq!(read_all(&console), b"");
    console.write_all(b"hello").unwrap();
    let mut text = [0; 5];
    first.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    // what comes later makes it ready again
    first.write_all(b"more").unwrap();
    assert!(!events.io.wait(Some(Duration::from_secs(10))).is_empty());
    assert_eq!(read_all(&console), b"more");
    drop(first);
    assert!(!events.io.wait(Some(Duration::from_secs(10))).is_empty());
    assert_eq!(read_all(&console), b"two");
    // one that does not read costs nothing but its text
    for _ in 0..10_000 {
        console.write_all(&[b'x'; 100]).unwrap();
    }
    drop(console);
    assert!(!path.exists());
}

#[test]
fn no_more_is_read_than_there_is_room_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let console = Console::open(&SerialOutput::Socket(path.clone())).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"abcdef").unwrap();
    let mut buffer = [0; 4];
    assert_eq!((console.read(&mut buffer), &buffer), (4, b"abcd"));
    assert_eq!((console.read(&mut buffer), &buffer[..2]), (2, &b"ef"[..]));
}

#[test]
fn a_pseudo_terminal_is_a_console_without_line_editing() {
    let mut console = Console::open(&SerialOutput::Pty).unwrap();
    let path = console.pty().unwrap();
    assert_eq!(read_all(&console), b"");
    console.write_all(b"login: ").unwrap();
    {
        let mut terminal = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut text = [0; 7];
        terminal.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"login: ");
        terminal.write_all(b"root\r\x03").unwrap();
        assert_eq!(read_all(&console), b"root\r\x03");
    }
    // the terminal program has gone; nobody reads: nothing waits
    assert_eq!(read_all(&console), b"");
    for _ in 0..1000 {
        console.write_all(&[b'x'; 100]).unwrap();
    }
    let mut terminal = OpenOptions::new().write(true).open(&path).unwrap();
    terminal.write_all(b"again").unwrap();
    assert_eq!(read_all(&console), b"again");
}

#[test]
fn a_file_that_takes_no_text_for_a_while_gets_what_comes_later() {
    use std::os::unix::fs::OpenOptionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name is valid for the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let reader = || OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let first = reader();
    let mut console = Console::open(&SerialOutput::File(path.clone())).unwrap();
    drop(first);
    // Fails as on a full disk: the guest is not to notice.
    assert_eq!(console.write(b"lost").unwrap(), 4);
    let mut second = reader();
    console.write_all(b"here").unwrap();
    let mut text = [0; 8];
    let n = second.read(&mut text).unwrap();
    assert_eq!(&text[..n], b"here");
}
