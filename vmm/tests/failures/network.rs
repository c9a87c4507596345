//! Two hosts on a switch: network namespaces with a bridge and a tap each, and cables that can be pulled or lose one way.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::port_support::ip;

/// What carries nothing: every frame is larger than its bucket.
const LOSS: &str = "tbf rate 8bit burst 1 limit 1";

/// A host with a tap (`tap0`) on its cable.
pub struct Host {
    pub namespace: File,
    /// Its own address, for connections between hosts.
    pub address: String,
    /// The switch's end of its cable.
    socket: String,
}

impl Host {
    /// Plugged into the bridge `br0` of the calling thread's namespace.
    pub fn new(number: usize) -> Host {
        let namespace = std::thread::spawn(|| {
            // SAFETY: no memory is involved; only this thread changes its namespace.
            let rc = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = namespace.join().unwrap();
        let host = Host { namespace, address: format!("10.77.0.{}", 11 + number), socket: format!("cable{number}") };
        let path = format!("/proc/{}/fd/{}", std::process::id(), host.namespace.as_raw_fd());
        ip(&format!("link add {} type veth peer name cable netns {path}", host.socket));
        ip(&format!("link set {} master br0 up", host.socket));
        for command in [
            "link set lo up",
            "link add br0 type bridge forward_delay 0",
            "link set cable master br0 up",
            "tuntap add mode tap vnet_hdr name tap0",
            "link set tap0 master br0 up",
            "link set br0 up",
        ] {
            host.run("ip", command);
        }
        host.run("ip", &format!("addr add {}/24 dev br0", host.address));
        host
    }

    /// Pulls the cable, or puts it in again.
    pub fn cable(&self, plugged: bool) {
        ip(&format!("link set {} {}", self.socket, if plugged { "up" } else { "down" }));
    }

    /// Nothing of what this host sends arrives anywhere, or all of it again.
    pub fn mute(&self, mute: bool) {
        self.run(
            "tc",
            &if mute { format!("qdisc add dev cable root {LOSS}") } else { "qdisc del dev cable root".into() },
        );
    }

    fn run(&self, program: &str, args: &str) {
        let namespace = self.namespace.as_raw_fd();
        let mut command = Command::new(program);
        command.args(args.split(' '));
        // SAFETY: setns is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(move || match libc::setns(namespace, libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
