//! What the tests of porting share: a network namespace of the test's own, `vmm` processes, an arbiter.
//!
//! Nothing outlives a test: the namespace goes with the test's thread and its children, the children are killed when
//! their [`Vmm`] is dropped, files are in a temporary directory.
#![allow(dead_code)]

pub mod arbiter;
pub mod disks;
pub mod puppet;
#[path = "../guest/testguest.rs"]
mod testguest;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
pub use testguest::image;

use serde_json::Value;

/// Longest wait for anything: far longer than it takes.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The guest's address in every lab.
pub const GUEST: &str = "10.77.0.2";
/// The guest's MAC, which moves with it.
pub const MAC: &str = "02:00:00:00:77:02";

/// A network namespace with a bridge that has an address (the client's) and a tap for each `vmm`.
pub struct Lab {
    pub dir: tempfile::TempDir,
    /// What every `vmm` gets as `--tls`, unless it is given another.
    tls: String,
}

impl Lab {
    /// Moves the calling thread into a namespace of its own. Needs root and /dev/kvm, as all of porting does. Ports are
    /// encrypted, with keys made for this lab.
    pub fn new(taps: usize) -> Lab {
        let mut lab = Lab::plain(taps);
        vmm(&["keys", "new", lab.keys().to_str().unwrap()]);
        lab.tls = lab.host_keys("host");
        lab
    }

    /// The same without encryption: for tests that read and write frames themselves.
    pub fn plain(taps: usize) -> Lab {
        assert!(Path::new("/dev/kvm").exists(), "these tests need /dev/kvm");
        // SAFETY: no memory is involved; only this thread changes its namespace.
        let rc = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(rc, 0, "these tests need root: {}", std::io::Error::last_os_error());
        ip("link set lo up");
        ip("link add br0 type bridge forward_delay 0");
        ip("addr add 10.77.0.1/24 dev br0");
        ip("link set br0 up");
        for i in 0..taps {
            ip(&format!("tuntap add mode tap vnet_hdr name tap{i}"));
            ip(&format!("link set tap{i} master br0 up"));
        }
        Lab { dir: tempfile::tempdir().unwrap(), tls: "off".into() }
    }

    /// Directory of the lab's authority.
    pub fn keys(&self) -> PathBuf {
        self.dir.path().join("keys")
    }

    /// Makes keys for a host of this name at loopback; what `--tls` needs for them.
    pub fn host_keys(&self, name: &str) -> String {
        let keys = self.keys();
        vmm(&["keys", "host", keys.to_str().unwrap(), name, "127.0.0.1"]);
        self.tls_of(name)
    }

    /// What `--tls` needs for a host that has keys.
    pub fn tls_of(&self, name: &str) -> String {
        let keys = self.keys();
        let keys = keys.display();
        format!("cert={keys}/{name}.pem,key={keys}/{name}.key,ca={keys}/ca.pem")
    }

    /// Boots the test guest on tap0.
    pub fn boot(&self, test: &str, extra: &[&str]) -> Vmm {
        let cmdline = format!("test={test} ip={GUEST}/24 log=warn");
        let net = format!("tap=tap0,mac={MAC},id=lan");
        let mut args = vec!["--image", image().to_str().unwrap(), "--memory", "64M", "--cmdline", &cmdline];
        args.extend(["--net", &net]);
        args.extend(extra);
        self.protect(&mut args);
        let vmm = Vmm::spawn(self, "boot", &args);
        // The socket answers before the vCPU's thread is there.
        eventually("the VM has been started", || (vmm.state() != "created").then_some(()));
        vmm
    }

    /// A `vmm` that waits for a port, on a tap of its own. Pages that do not come are poisoned there: who needs one finds that.
    pub fn receive(&self, tap: usize, port: u16, extra: &[&str]) -> Vmm {
        self.receive_as_shipped(tap, port, &[&["--poison-skipped"], extra].concat())
    }

    /// The same without poison, to measure.
    pub fn receive_as_shipped(&self, tap: usize, port: u16, extra: &[&str]) -> Vmm {
        let net = format!("tap=tap{tap},id=lan");
        let listen = format!("127.0.0.1:{port}");
        let mut args = vec!["--receive", &listen, "--net", &net];
        args.extend(extra);
        self.protect(&mut args);
        Vmm::spawn(self, &format!("receive{port}"), &args)
    }

    /// A `vmm` with any arguments.
    pub fn spawn(&self, name: &str, args: &[&str]) -> Vmm {
        let mut args = args.to_vec();
        self.protect(&mut args);
        Vmm::spawn(self, name, &args)
    }

    /// A `vmm` that is told nothing of keys.
    pub fn spawn_bare(&self, name: &str, args: &[&str]) -> Vmm {
        Vmm::spawn(self, name, args)
    }

    fn protect<'a>(&'a self, args: &mut Vec<&'a str>) {
        if !args.contains(&"--tls") {
            args.extend(["--tls", &self.tls]);
        }
    }

    /// A `vmm` with any arguments, in another network namespace.
    pub fn spawn_in(&self, namespace: &std::fs::File, name: &str, args: &[&str]) -> Vmm {
        let mut args = args.to_vec();
        self.protect(&mut args);
        Vmm::spawn_in(self, name, &args, Some(namespace))
    }

    /// A `vmm` that waits for its configuration.
    pub fn empty(&self, name: &str) -> Vmm {
        Vmm::start(self, name, &[], false, None)
    }

    /// Boots the test guest again, in the namespaces the calling thread is in by now.
    pub fn respawn_inside(&self, old: Vmm) -> Vmm {
        drop(old);
        self.boot("echo", &[])
    }

    /// What a guest has printed.
    pub fn console(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("{name}.console"))).unwrap_or_default()
    }

    /// Connects to a port of the guest, which may not be up yet.
    pub fn connect(&self, port: u16) -> TcpStream {
        self.connect_to(GUEST, port)
    }

    /// Connects to a port of another guest.
    pub fn connect_to(&self, ip: &str, port: u16) -> TcpStream {
        let address: SocketAddr = format!("{ip}:{port}").parse().unwrap();
        eventually("the guest answers", || TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok())
    }
}

/// Runs `vmm` to its end, which must be a good one; what it prints.
pub fn vmm(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm")).args(args).output().unwrap();
    assert!(output.status.success(), "vmm {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `ip`.
pub fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Repeats until something comes of it.
pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Stops a child; all of its threads stand still then.
pub fn stop(pid: u32) {
    // SAFETY: the process is our own child and not waited for yet; an all-zero siginfo is valid, and the call writes one.
    let rc = unsafe {
        libc::kill(pid as i32, libc::SIGSTOP);
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_PID, pid, &mut info, libc::WSTOPPED)
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// A `vmm` process.
pub struct Vmm {
    child: Child,
    pub sock: PathBuf,
    pub console: PathBuf,
}

impl Vmm {
    fn spawn(lab: &Lab, name: &str, args: &[&str]) -> Vmm {
        Vmm::start(lab, name, args, true, None)
    }

    fn spawn_in(lab: &Lab, name: &str, args: &[&str], namespace: Option<&std::fs::File>) -> Vmm {
        Vmm::start(lab, name, args, true, namespace)
    }

    fn start(lab: &Lab, name: &str, args: &[&str], console_given: bool, namespace: Option<&std::fs::File>) -> Vmm {
        let sock = lab.dir.path().join(format!("{name}.sock"));
        let console = lab.dir.path().join(format!("{name}.console"));
        let log = lab.dir.path().join(format!("{name}.log"));
        let _ = std::fs::remove_file(&log);
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        // To measure another build beside this one.
        let vmm = std::env::var_os("VMM").unwrap_or(env!("CARGO_BIN_EXE_vmm").into());
        let mut command = Command::new(vmm);
        command
            .args(args)
            .arg("--api-sock")
            .arg(&sock)
            .args(if console_given { vec!["--serial".into(), console.clone()] } else { Vec::new() })
            // One that has no memory is to be gone at once: not when it has read its own symbols, while other threads go on with a port.
            .env("RUST_BACKTRACE", "0")
            .env("RUST_LOG", std::env::var("VMM_LOG").unwrap_or("info".into()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if std::env::var_os("VMM_LOG").is_some() { Stdio::inherit() } else { Stdio::from(log) });
        let namespace = namespace.map(std::os::fd::AsRawFd::as_raw_fd);
        // SAFETY: both are async-signal-safe and touch no memory. A test that dies takes its children along.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if namespace.is_some_and(|fd| libc::setns(fd, libc::CLONE_NEWNET) != 0) {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut vmm = Vmm { child: command.spawn().unwrap(), sock, console };
        eventually("the control socket answers", || {
            if let Some(status) = vmm.child.try_wait().unwrap() {
                let log = std::fs::read_to_string(lab.dir.path().join(format!("{name}.log"))).unwrap_or_default();
                panic!("vmm {name} ended: {status}: {log}");
            }
            vmm.try_api("GET", "/v1/vm", None)
        });
        vmm
    }

    /// One request; `None` if the socket does not answer.
    pub fn try_api(&self, method: &str, path: &str, body: Option<&str>) -> Option<(u16, Value)> {
        let mut socket = UnixStream::connect(&self.sock).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.unwrap_or("");
        write!(
            socket,
            "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let body = answer.split_once("\r\n\r\n")?.1;
        Some((status, serde_json::from_str(body).unwrap_or(Value::Null)))
    }

    /// An answer that is not JSON.
    pub fn api_text(&self, path: &str) -> String {
        let mut socket = UnixStream::connect(&self.sock).unwrap();
        write!(socket, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }

    /// One request that must be answered with success.
    pub fn api(&self, method: &str, path: &str, body: Option<&str>) -> Value {
        let (status, value) = self.try_api(method, path, body).expect("the control socket answers");
        assert!((200..300).contains(&status), "{method} {path}: {status} {value}");
        value
    }

    /// Orders a port, with memory compared on both sides; gives its number.
    pub fn port_to(&self, port: u16) -> u64 {
        self.order(&format!("{{\"to\":\"127.0.0.1:{port}\",\"verify\":true}}"))
    }

    /// Orders a port as in everyday life.
    pub fn port_unverified(&self, port: u16) -> u64 {
        self.order(&format!("{{\"to\":\"127.0.0.1:{port}\"}}"))
    }

    /// Orders a port with a body of the test's own.
    pub fn order(&self, body: &str) -> u64 {
        self.api("POST", "/v1/migrations", Some(body))["id"].as_u64().unwrap()
    }

    /// The port as the API shows it.
    pub fn port(&self, id: u64) -> Value {
        self.api("GET", &format!("/v1/migrations/{id}"), None)
    }

    /// Waits until the port is over, or the process ended; gives what was shown last.
    pub fn wait_port(&self, id: u64) -> Value {
        let mut last = Value::Null;
        eventually("the port is over", || {
            match self.try_api("GET", &format!("/v1/migrations/{id}"), None) {
                Some((200, value)) => last = value,
                _ => return (last != Value::Null).then_some(()),
            }
            (last["state"] != "running").then_some(())
        });
        last
    }

    /// Waits until the process has ended.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the process ends", || self.child.try_wait().unwrap())
    }

    /// The process is still there.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// SIGKILL, or any other.
    pub fn signal(&self, signal: i32) {
        // SAFETY: no memory is involved; the process is our own child and not waited for yet.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// SIGSTOP, and all of its threads stand still.
    pub fn stop(&self) {
        stop(self.child.id());
    }

    /// Id of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Phase of the VM as the API shows it.
    pub fn state(&self) -> String {
        self.api("GET", "/v1/vm", None)["state"].as_str().unwrap_or_default().to_owned()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of the guest's echo that counts on while everything happens.
pub struct Echo {
    stream: TcpStream,
    next: u64,
}

impl Echo {
    /// Over a new connection.
    pub fn new(lab: &Lab) -> Echo {
        let stream = lab.connect(7);
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Echo { stream, next: 0 }
    }

    /// One question and its answer; how long it took.
    pub fn turn(&mut self) -> Duration {
        let start = Instant::now();
        self.stream.write_all(&self.next.to_le_bytes()).unwrap();
        let mut answer = [0; 8];
        self.stream.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_le_bytes(answer), self.next, "the connection is the same one and lost nothing");
        self.next += 1;
        start.elapsed()
    }

    /// Some of them.
    pub fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.turn();
        }
    }

    /// Segments the client's kernel sent again on this connection.
    pub fn retransmits(&self) -> u32 {
        use std::os::fd::AsRawFd;
        // SAFETY: all-zero is a valid tcp_info; the kernel writes at most `length` bytes.
        unsafe {
            let mut info: libc::tcp_info = std::mem::zeroed();
            let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
            let rc = libc::getsockopt(
                self.stream.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &mut length,
            );
            assert_eq!(rc, 0);
            info.tcpi_total_retrans
        }
    }
}
