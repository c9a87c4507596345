//! A `vmm` process under test and its control socket.
//!
//! Nothing outlives a test: the process is killed when its [`Process`] is dropped.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::guest;

crate::guest_code!(
    pub park_for_ever,
    "park_start",
    "park_end",
    "
    mov r15, [rdi + 24]
    mov dword ptr [r15 + 0x14], 2
    mov rax, -1
2:  mov [r15], rax
    jmp 2b
"
);

/// See the module.
pub struct Process {
    pub child: Child,
    pub socket: PathBuf,
}

impl Process {
    pub fn start(dir: &Path, code: &[u8], more: &[&str]) -> Process {
        Process::boot(dir, &guest::image(code), more)
    }

    /// One whose guest starts in protected mode, with interrupt controllers.
    pub fn pvh(dir: &Path, code: &[u8], more: &[&str]) -> Process {
        Process::boot(dir, &guest::pvh_image(code), more)
    }

    fn boot(dir: &Path, bytes: &[u8], more: &[&str]) -> Process {
        let (image, socket) = (dir.join("image"), dir.join("api.sock"));
        std::fs::write(&image, bytes).unwrap();
        let child = vmm()
            .args(["--memory", "8M", "--serial", "none", "--name", "test", "--vm-id", "9", "--image"])
            .arg(&image)
            .arg("--api-sock")
            .arg(&socket)
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Process { child, socket }
    }

    /// One that waits for its configuration.
    pub fn empty(dir: &Path) -> Process {
        let socket = dir.join("api.sock");
        let child = vmm().arg("--api-sock").arg(&socket).current_dir(dir).stdin(Stdio::null()).spawn().unwrap();
        Process { child, socket }
    }

    pub fn connect(&mut self) -> UnixStream {
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return stream,
                Err(_) => {
                    assert!(self.child.try_wait().unwrap().is_none(), "it has ended");
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Status code and body.
    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = self.connect();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        // At once: a server that needs no body may have answered and closed after the head.
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    pub fn json(&mut self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let (status, text) = self.ask(method, path, body);
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}: {text}")))
    }

    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    pub fn serving(&mut self) {
        while self.json("GET", "/v1/vm", "").1["boot_ms"]["serving"].is_null() {
            std::thread::yield_now();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The binary under test.
pub fn vmm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vmm"))
}
