//! The `vmm` process on a terminal.

#![allow(clippy::unwrap_used)]

mod guest;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

guest_code!(
    exit_42,
    "exit_start",
    "exit_end",
    "
    mov r15, [rdi + 24]
    mov dword ptr [r15 + 0x10], 42
2:  jmp 2b
"
);

guest_code!(
    park_for_ever,
    "park_start",
    "park_end",
    "
    mov r15, [rdi + 24]
    mov rax, -1
2:  mov [r15], rax
    jmp 2b
"
);

/// A pseudo terminal: our end, and the name of the other.
fn pseudo_terminal() -> (std::fs::File, PathBuf) {
    use std::os::fd::FromRawFd;
    let mut name = [0u8; 64];
    // SAFETY: the descriptor is checked and then has one owner; the buffer is valid for its length.
    let ours = unsafe {
        let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        assert!(fd >= 0);
        assert_eq!(libc::grantpt(fd), 0);
        assert_eq!(libc::unlockpt(fd), 0);
        assert_eq!(libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()), 0);
        std::fs::File::from_raw_fd(fd)
    };
    let name = std::ffi::CStr::from_bytes_until_nul(&name).unwrap();
    (ours, PathBuf::from(name.to_str().unwrap()))
}

/// Whether the terminal edits lines itself.
fn edits_lines(terminal: &std::fs::File) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: an all-zero termios is a value; it is valid for the call.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut settings), 0);
        settings.c_lflag & libc::ICANON != 0
    }
}

#[test]
fn a_terminal_is_the_guests_and_gets_its_settings_back_however_the_process_ends() {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    for end in ["keys", "term", "segv", "guest", "early"] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, guest::image(if end == "guest" { exit_42() } else { park_for_ever() })).unwrap();
        let (mut ours, name) = pseudo_terminal();
        let theirs = std::fs::OpenOptions::new().read(true).write(true).open(&name).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        let socket = dir.path().join("vm.sock");
        command.args(["--memory", "8M", "--serial", "stdio", "--image"]).arg(&image).arg("--api-sock").arg(&socket);
        command.stdin(theirs.try_clone().unwrap()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: only system calls between fork and exec: the terminal becomes that of a session of its own.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        assert!(edits_lines(&theirs));
        let mut child = command.spawn().unwrap();
        if end != "guest" {
            while edits_lines(&theirs) {
                assert!(child.try_wait().unwrap().is_none(), "{end}: ended early");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        if ["keys", "term"].contains(&end) {
            // From then on it ends in order.
            let mut asked = UnixStream::connect(&socket).unwrap();
            asked.write_all(b"GET /v1/vm HTTP/1.1\r\nHost: vmm\r\n\r\n").unwrap();
            asked.read_exact(&mut [0]).unwrap();
        }
        let pid = child.id() as i32;
        match end {
            // typed although the guest has no use for it
            "keys" => ours.write_all(b"hello\x01x").unwrap(),
            // SAFETY: a signal to our own child, which has not been waited for.
            "term" | "early" => assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0),
            // SAFETY: as above.
            "segv" => assert_eq!(unsafe { libc::kill(pid, libc::SIGSEGV) }, 0),
            _ => {}
        }
        let status = child.wait().unwrap();
        match end {
            "segv" => assert_eq!(status.signal(), Some(libc::SIGSEGV)),
            "guest" => assert_eq!(status.code(), Some(42)),
            // One that is just starting may end by the signal itself, whichever thread gets it.
            "early" => {
                assert!(status.code().is_some() || status.signal() == Some(libc::SIGTERM), "{end}: {status}");
            }
            _ => assert!(status.code().is_some(), "{end}: {status}"),
        }
        assert!(edits_lines(&theirs), "{end}: the terminal is left as it was made");
    }
}
