//! Instances of a template, as real `vmm` processes on /dev/kvm, under the sandbox.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use port_support::arbiter::Arbiter;
use port_support::{Lab, Vmm, eventually, image};
use serde_json::{Value, json};

const ECHO: u16 = 7;
const SOURCE: u16 = 19;
const WHO: u16 = 21;

/// A template's checkpoint; the template itself is gone.
fn template(lab: &Lab, words: &str) -> PathBuf {
    let cmdline = format!("test=echo log=warn {words}");
    let image = image().to_str().unwrap();
    let mut vm = lab
        .spawn("template", &["--image", image, "--memory", "32M", "--cmdline", &cmdline, "--net", "tap=tap0,id=lan"]);
    let mark = if words.contains("template") { "prepared" } else { "serving" };
    eventually("the template is ready", || vm.api("GET", "/v1/vm", None)["boot_ms"][mark].as_f64());
    let path = lab.dir.path().join("checkpoint");
    let taken = vm.api("POST", "/v1/vm/checkpoint", Some(&json!({ "path": path }).to_string()));
    assert!(taken["pages"].as_u64().unwrap() > 100, "{taken}");
    if words.contains("template") {
        assert_eq!(taken["at_rest"], true, "{taken}");
    }
    // It goes on, and takes no second checkpoint in the same place.
    assert_eq!(vm.state(), "running");
    let (status, problem) =
        vm.try_api("POST", "/v1/vm/checkpoint", Some(&json!({ "path": path }).to_string())).unwrap();
    assert_eq!((status, problem["field"].as_str()), (400, Some("path")), "{problem}");
    vm.api("PUT", "/v1/vm/shutdown", None);
    vm.wait();
    path
}

fn ip_of(n: u32) -> String {
    format!("10.77.0.{}", 100 + n)
}

fn request(template: &Path, n: u32) -> Value {
    json!({
        "template": template,
        "vm_id": 40 + n,
        "cmdline": format!("ip={}/24", ip_of(n)),
        "nets": [{ "id": "lan", "tap": format!("tap{n}") }],
    })
}

/// By flags.
fn instance(lab: &Lab, template: &Path, n: u32) -> Vmm {
    let (id, cmdline, net) = ((40 + n).to_string(), format!("ip={}/24", ip_of(n)), format!("id=lan,tap=tap{n}"));
    let template = template.to_str().unwrap();
    let args = ["--spawn", template, "--vm-id", &id, "--cmdline", &cmdline, "--net", &net];
    lab.spawn(&format!("instance{n}"), &args)
}

/// What an instance says of itself.
fn who(lab: &Lab, n: u32) -> HashMap<String, String> {
    let mut text = String::new();
    lab.connect_to(&ip_of(n), WHO).read_to_string(&mut text).unwrap();
    let words: Vec<&str> = text.split(' ').collect();
    words.chunks_exact(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
}

fn echoes(lab: &Lab, n: u32) {
    let mut stream = lab.connect_to(&ip_of(n), ECHO);
    let mut answer = [0; 9];
    stream.write_all(format!("instance{n}").as_bytes()).unwrap();
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, format!("instance{n}").as_bytes());
}

fn mac_of(n: u32) -> String {
    let shown = Command::new("ip").args(["neigh", "show", &ip_of(n)]).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    text.split_whitespace().skip_while(|w| *w != "lladdr").nth(1).unwrap_or_else(|| panic!("{text:?}")).to_owned()
}

#[test]
fn instances_are_different_vms_and_outlive_their_template() {
    let lab = Lab::new(4);
    let template = template(&lab, "template");
    let mut one = instance(&lab, &template, 1);
    let two = lab.empty("two");
    let report = two.api("PUT", "/v1/vm/spawn", Some(&request(&template, 2).to_string()));
    assert!(!report["config"]["cmdline"].as_str().unwrap().contains("template"), "{report}");
    for n in [1, 2] {
        echoes(&lab, n);
    }
    let (a, b) = (who(&lab, 1), who(&lab, 2));
    assert_eq!((a["vm_id"].as_str(), b["vm_id"].as_str()), ("41", "42"));
    assert_eq!((a["epoch"].as_str(), b["epoch"].as_str()), ("0", "0"));
    assert_ne!(a["random"], b["random"]);
    let number = |text: &String| text.parse::<u64>().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    // Asked one after the other, and just now.
    assert!(number(&a["real_ns"]) < number(&b["real_ns"]));
    assert!(now.abs_diff(number(&b["real_ns"])) < 5_000_000_000, "{now} {b:?}");
    assert_ne!(mac_of(1), mac_of(2));

    // The files go; what was not read of them before is there all the same.
    fs::remove_dir_all(&template).unwrap();
    for n in [1, 2] {
        let mut stream = lab.connect_to(&ip_of(n), SOURCE);
        stream.write_all(&(8u64 << 20).to_le_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 8 << 20);
        assert!(bytes.iter().enumerate().all(|(i, b)| *b == (i ^ i >> 8 ^ i >> 16) as u8));
    }

    // An instance is ported as any VM, with all of its memory compared.
    let there = lab.receive(3, 4100, &[]);
    let status = one.wait_port(one.port_to(4100));
    assert_eq!(status["state"], "completed", "{status}");
    assert!(one.wait().success());
    echoes(&lab, 1);
    let ported = who(&lab, 1);
    assert_eq!(ported["vm_id"], "41");
    assert_ne!(ported["random"], a["random"]);
    assert_eq!(there.state(), "running");
}

#[test]
fn what_cannot_be_an_instance_is_refused() {
    let lab = Lab::new(2);
    let good = template(&lab, "template");
    let copy = |name: &str| {
        let to = lab.dir.path().join(name);
        let copied = Command::new("cp").arg("-r").arg("--sparse=always").args([&good, &to]).status().unwrap();
        assert!(copied.success());
        to
    };
    let flip = |path: PathBuf, at: u64| {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    };
    let (state, content, hole, short) = (copy("state"), copy("content"), copy("hole"), copy("short"));
    flip(state.join("state"), 1000);
    // Code, and heap that nobody has used.
    flip(content.join("memory"), 0x40_0000);
    flip(hole.join("memory"), (28 << 20) + 5);
    fs::OpenOptions::new().write(true).open(short.join("memory")).unwrap().set_len(16 << 20).unwrap();

    let arbiter = Arbiter::start();
    arbiter.usurp(41);
    let vm = lab.empty("vm");
    let refused = |request: &Value| {
        let (status, problem) = vm.try_api("PUT", "/v1/vm/spawn", Some(&request.to_string())).unwrap();
        assert_eq!(vm.state(), "unconfigured");
        (status, problem["field"].as_str().unwrap_or("").to_owned(), problem["detail"].as_str().unwrap().to_owned())
    };
    for (path, why) in
        [(&state, "checksum"), (&content, "damaged"), (&hole, "the zero it should be"), (&short, "was cut")]
    {
        let (status, _, detail) = refused(&request(path, 1));
        assert!(status == 422 && detail.contains(why), "{path:?}: {status} {detail}");
    }
    assert_eq!(refused(&request(Path::new("/nowhere"), 1)).1, "template");
    let change = |field: &str, value: Value| {
        let mut request = request(&good, 1);
        request[field] = value;
        request
    };
    assert_eq!(refused(&change("vm_id", json!(0))).1, "vm_id");
    assert_eq!(refused(&change("nets", json!([]))).1, "nets[0]");
    assert_eq!(refused(&change("nets", json!([{ "id": "lan", "tap": "tap9" }]))).1, "nets[0].tap");
    let (status, _, detail) = refused(&change("arbiter", json!(arbiter.address.to_string())));
    assert!(status == 409 && detail.contains("vm_id 41"), "{status} {detail}");

    // After all that the process is as good as new.
    let mut last = change("arbiter", json!(arbiter.address.to_string()));
    last["replace"] = json!(true);
    vm.api("PUT", "/v1/vm/spawn", Some(&last.to_string()));
    echoes(&lab, 1);
}

/// A process that `vmm ctl spawn` has started: killed when the test is over.
struct Started(i32);

impl Drop for Started {
    fn drop(&mut self) {
        // SAFETY: no memory is involved; the process is of this test.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

#[test]
fn people_start_several_at_once() {
    let lab = Lab::new(3);
    let template = template(&lab, "template");
    let mut spawn = Command::new(env!("CARGO_BIN_EXE_vmm"));
    spawn.args(["ctl", "--json", "spawn", template.to_str().unwrap(), "--count", "3", "--vm-id", "60"]);
    spawn.args(["--ip", "10.77.0.100/24", "--net", "lan", "--tap", "tap{}", "--dir", lab.dir.path().to_str().unwrap()]);
    let output = spawn.output().unwrap();
    let lines: Vec<Value> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let _started: Vec<Started> = lines.iter().map(|l| Started(l["pid"].as_i64().unwrap() as i32)).collect();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(lines.len(), 3);
    for n in 0..3 {
        echoes(&lab, n);
        assert_eq!(who(&lab, n)["vm_id"], (60 + n).to_string());
    }
    // Their sockets and taps are taken: each of a second set says so, and the first lives.
    let again = spawn.output().unwrap();
    assert_eq!(again.status.code(), Some(1), "{}", String::from_utf8_lossy(&again.stderr));
    (0..3).for_each(|n| echoes(&lab, n));
}

#[test]
fn a_vm_that_is_no_template_makes_no_instances() {
    let lab = Lab::new(2);
    let path = template(&lab, "ip=10.77.0.9/24");
    let started: Output = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["--spawn", path.to_str().unwrap(), "--vm-id", "1", "--net", "id=lan,tap=tap1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&started.stderr).into_owned();
    assert_eq!(started.status.code(), Some(1), "{said}");
    assert!(said.contains("is of no template"), "{said}");
    // Mistakes in flags are named before anything is looked at.
    let started = Command::new(env!("CARGO_BIN_EXE_vmm")).args(["--spawn", "nowhere"]).output().unwrap();
    assert_eq!(started.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&started.stderr).contains("--vm-id"));
}
