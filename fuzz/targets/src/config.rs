//! The configuration: a JSON file, and flags.
//!
//! Asserted: a mistake names its field; what was accepted is accepted again as it is written out.

use clap::Parser;
use vmm::Error;
use vmm::config::Config;
use vmm::config::cli::Args;

use crate::Target;

/// A configuration file.
pub const JSON: Target = Target { name: "config_json", run: json, seeds: json_seeds, memory: 4 << 20, rounds: 4000 };
/// A command line, one argument a line.
pub const FLAGS: Target = Target { name: "config_flags", run: flags, seeds: flag_seeds, memory: 8 << 20, rounds: 300 };

/// Arguments at most.
const ARGUMENTS_MAX: usize = 64;

fn check(e: &Error) {
    if let Error::Config(mistakes) = e {
        assert!(!mistakes.is_empty(), "refused without a reason");
        assert!(mistakes.iter().all(|m| !m.field.is_empty() && !m.message.is_empty()), "{mistakes:?}");
    }
}

fn json(input: &[u8]) {
    let mut config = match Config::from_json(input) {
        Ok(config) => config,
        Err(e) => return check(&e),
    };
    let written = serde_json::to_vec(&config).unwrap_or_else(|e| panic!("cannot be written: {e}"));
    match Config::from_json(&written) {
        Ok(again) => assert_eq!(again, config),
        Err(e) => panic!("accepted, but not as it is written out: {e}"),
    }
    if let Err(e) = config.validate() {
        check(&e);
    }
}

fn flags(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // A file that is named is read; which files there are is not the input's to say.
    let args = text.lines().filter(|a| !a.starts_with("--c") || a.starts_with("--cm") || a.starts_with("--cp"));
    let args = std::iter::once("vmm").chain(args.take(ARGUMENTS_MAX));
    let Ok(args) = Args::try_parse_from(args) else { return };
    if let Err(e) = args.order() {
        check(&e);
    }
}

fn json_seeds() -> Vec<Vec<u8>> {
    [
        r#"{"image":"x"}"#,
        r#"{"image":"x","name":"n","memory":"32M","cpus":2,"boot":"pvh","cmdline":"a=b","initrd":"i","vm_id":7,
            "memory_shared":true,"on_reset":"exit","arbiter":"127.0.0.1:7"}"#,
        r#"{"image":"x","disks":[{"path":"d","readonly":true,"queues":4,"serial":"s","direct":false,
            "limits":{"ops":{"rate":100,"burst":10},"bytes":{"rate":1000000}}},{"path":"e","format":"qcow2"}]}"#,
        r#"{"image":"x","nets":[{"tap":"t0","mac":"02:00:00:00:00:01","mtu":1500,"queues":2,"vhost":"off",
            "rx_limits":{"ops":{"rate":1}}},{"vhost_user":"/run/x"},{"fd":5}]}"#,
        r#"{"image":"x","rng":{"limits":{}},"balloon":{"target":"1M","reporting":true,"stats_seconds":3},
            "vsock":{"cid":3,"path":"/run/v"},"serial":{"socket":"/run/s"}}"#,
        r#"{"image":"x","serial":{"file":"s"},"memory":1073741824}"#,
        "[]",
    ]
    .map(|s| s.as_bytes().to_vec())
    .to_vec()
}

fn flag_seeds() -> Vec<Vec<u8>> {
    [
        "--image\nx\n--memory\n32M\n--net\ntap=t0,mac=02:00:00:00:00:01,mtu=1500,queues=2\n--disk\npath=d,readonly=true",
        "--image\nx\n--rng\nops=100/10,bytes=1M\n--balloon\ntarget=1M,reporting=true\n--vsock\npath=/run/v,cid=4",
        "--receive\n127.0.0.1:7000\n--net\nid=net0,tap=t1\n--memory\n1G\n--arbiter\n127.0.0.1:8",
        "--image\nx\n--boot\nlinux\n--initrd\ni\n--cmdline\nconsole=ttyS0\n--cpus\n4\n--serial\nsocket=/run/s\n--on-reset\nexit",
        "--api-sock\ns",
    ]
    .map(|s| s.as_bytes().to_vec())
    .to_vec()
}
