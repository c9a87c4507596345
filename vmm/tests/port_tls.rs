//! Who may port with whom: certificates, names, tickets, and what happens to those who have none, lie, or are slow.
#![allow(clippy::unwrap_used)]

mod port_support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use port_support::puppet::{self, Stopped};
use port_support::{Echo, Lab, Vmm, eventually, vmm};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use time::{Duration as Span, OffsetDateTime};

/// A port that must not take place: the reason shown, with the guest as well as before.
fn refused(source: &Vmm, body: &str, echo: &mut Echo) -> String {
    let status = source.wait_port(source.order(body));
    assert_eq!(status["state"], "failed", "{status}");
    assert_eq!(source.state(), "running");
    for _ in 0..5 {
        echo.turn();
    }
    status["error"].as_str().unwrap().to_owned()
}

/// One that must.
fn taken(source: &mut Vmm, body: &str, echo: &mut Echo) {
    let status = source.wait_port(source.order(body));
    assert_eq!(status["state"], "completed", "{status}");
    assert!(source.wait().success());
    echo.turn();
}

fn to(port: u16) -> String {
    format!("{{\"to\":\"127.0.0.1:{port}\",\"verify\":true}}")
}

fn arrival(there: &Vmm, failed: u64) -> Value {
    eventually("the attempt is over", || {
        let arrival = there.api("GET", "/v1/vm", None)["arrival"].clone();
        (arrival["failed"] == failed).then_some(arrival)
    })
}

/// An authority other than `vmm keys`', for certificates that it would not make.
struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: PathBuf) -> Authority {
        std::fs::create_dir(&dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, dir.display().to_string());
        std::fs::write(dir.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    /// A certificate that is good for `days` (negative: it was) and has these names; what `--tls` needs.
    fn host(&self, file: &str, names: &[&str], days: i64) -> String {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        params.not_before = OffsetDateTime::now_utc() - Span::days(30);
        params.not_after = OffsetDateTime::now_utc() + Span::days(days);
        let (cert, dir) = (params.signed_by(&key, &self.issuer).unwrap(), self.dir.display());
        std::fs::write(self.dir.join(format!("{file}.pem")), cert.pem()).unwrap();
        std::fs::write(self.dir.join(format!("{file}.key")), key.serialize_pem()).unwrap();
        format!("cert={dir}/{file}.pem,key={dir}/{file}.key,ca={dir}/ca.pem")
    }
}

/// As JSON, what stands after `--tls`.
fn json(flag: &str) -> String {
    let fields: Vec<String> =
        flag.split(',').map(|f| f.split_once('=').unwrap()).map(|(k, v)| format!("{k:?}:{v:?}")).collect();
    format!("{{\"tls\":{{{}}}}}", fields.join(","))
}

#[test]
fn certificates_are_checked_on_both_sides_and_can_be_replaced_while_the_vm_runs() {
    let lab = Lab::plain(2);
    let (ours, strange) = (Authority::new(lab.dir.path().join("ours")), Authority::new(lab.dir.path().join("strange")));
    let good = ours.host("good", &["source", "127.0.0.1"], 30);
    let expired = ours.host("expired", &["127.0.0.1"], -1);
    let stranger = strange.host("stranger", &["127.0.0.1"], 30);
    // A stranger that knows the right authority.
    let pretender = stranger.replace("strange/ca.pem", "ours/ca.pem");
    let mut source = lab.boot("echo", &["--tls", &good]);
    let mut echo = Echo::new(&lab);
    let set = |vmm: &Vmm, tls: &str| vmm.api("PUT", "/v1/tls", Some(&json(tls)));

    // The destination's certificate.
    let there = lab.receive(1, 4000, &["--tls", &stranger]);
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("authority that is not trusted here"), "{error}");
    assert!(arrival(&there, 1)["last_error"].as_str().unwrap().contains("refuses this host"));
    set(&there, &expired);
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("has expired"), "{error}");
    set(&there, &ours.host("named", &["elsewhere.example"], 30));
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("elsewhere.example") && error.contains("127.0.0.1"), "{error}");

    // The source's.
    set(&there, &good);
    set(&source, &expired);
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("refuses this host: its certificate has expired"), "{error}");
    set(&source, &pretender);
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("refuses this host: its certificate is of an authority"), "{error}");
    assert!(arrival(&there, 5)["last_error"].as_str().unwrap().contains("authority that is not trusted here"));

    // A name that is asked for and there.
    set(&source, &good);
    set(&there, &ours.host("named", &["elsewhere.example"], 30));
    let named = |name: &str| format!("{{\"to\":\"127.0.0.1:4000\",\"name\":\"{name}\"}}");
    let error = refused(&source, &named("somewhere.example"), &mut echo);
    assert!(error.contains("not for somewhere.example"), "{error}");
    taken(&mut source, &named("elsewhere.example"), &mut echo);
    assert_eq!(there.state(), "running");
}

/// A client of TLS that trusts the destination and has nothing to show.
fn anonymous(ca: &Path, port: u16) -> Result<(), std::io::Error> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"outrigger-port/1".to_vec()];
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    while tls.is_handshaking() {
        tls.complete_io(&mut socket)?;
    }
    let mut byte = [0];
    rustls::Stream::new(&mut tls, &mut socket).read_exact(&mut byte)
}

#[test]
fn strangers_without_a_certificate_or_without_tls_are_told_so() {
    let lab = Lab::new(2);
    let there = lab.receive(1, 4000, &[]);
    let error = anonymous(&lab.keys().join("ca.pem"), 4000).unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    assert!(arrival(&there, 1)["last_error"].as_str().unwrap().contains("has no certificate"));

    // A source in the clear, to a destination with TLS.
    let mut source = lab.boot("echo", &["--tls", "off"]);
    let mut echo = Echo::new(&lab);
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("by TLS only"), "{error}");
    assert!(arrival(&there, 2)["last_error"].as_str().unwrap().contains("speaks no TLS"));

    // A source with TLS, to one in the clear.
    source.api("PUT", "/v1/tls", Some(&json(&lab.tls_of("host"))));
    there.api("PUT", "/v1/tls", Some("{\"tls\":\"off\"}"));
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("speaks no TLS") && error.contains("TLS is switched off there"), "{error}");

    // Not TLS at all.
    there.api("PUT", "/v1/tls", Some(&json(&lab.tls_of("host"))));
    let mut stranger = TcpStream::connect("127.0.0.1:4000").unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n").unwrap();
    let _ = stranger.read_to_end(&mut Vec::new());
    assert!(arrival(&there, 4)["last_error"].as_str().unwrap().contains("not TLS"));
    taken(&mut source, &to(4000), &mut echo);
}

#[test]
fn without_keys_nothing_begins() {
    let lab = Lab::plain(2);
    let image = port_support::image();
    // Neither keys nor "off".
    let cmdline = format!("test=echo ip={}/24 log=warn", port_support::GUEST);
    let net = format!("tap=tap0,mac={},id=lan", port_support::MAC);
    let args = ["--image", image.to_str().unwrap(), "--memory", "64M", "--cmdline", &cmdline, "--net", &net];
    let mut source = lab.spawn_bare("bare", &args);
    let mut echo = Echo::new(&lab);
    let (status, problem) = source.try_api("POST", "/v1/migrations", Some(&to(4000))).unwrap();
    let detail = problem["detail"].as_str().unwrap();
    assert!(status == 409 && detail.contains("vmm keys") && detail.contains("--tls off"), "{status} {problem}");
    assert_eq!(source.api("GET", "/v1/tls", None)["tls"], Value::Null);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["--receive", "127.0.0.1:4000", "--net", "id=lan,tap=tap1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && said.contains("--tls: --receive needs"), "{said}");
    // Said while it runs.
    source.api("PUT", "/v1/tls", Some("{\"tls\":\"off\"}"));
    let _there = lab.receive(1, 4000, &[]);
    taken(&mut source, &to(4000), &mut echo);
}

struct Tickets {
    issuer: String,
}

impl Tickets {
    fn issue(&self, vm_id: &str, epoch: &str, from: &str, to: &str) -> String {
        let flags = ["--vm-id", vm_id, "--epoch", epoch, "--from", from, "--to", to];
        let args: Vec<&str> = ["ticket", "--issuer", &self.issuer].into_iter().chain(flags).collect();
        vmm(&args).trim().to_owned()
    }
}

#[test]
fn a_ticket_is_for_one_port_of_one_vm_between_two_hosts() {
    let lab = Lab::new(2);
    let keys = lab.keys();
    let with_issuer = |host: &str| format!("{},issuer={}/issuer.pem", lab.host_keys(host), keys.display());
    let (here, other) = (with_issuer("here"), with_issuer("there"));
    let tickets = Tickets { issuer: keys.join("issuer.key").display().to_string() };
    let mut source = lab.boot("echo", &["--tls", &here, "--vm-id", "5"]);
    let mut echo = Echo::new(&lab);
    let with = |ticket: &str| format!("{{\"to\":\"127.0.0.1:4000\",\"ticket\":{ticket:?}}}");
    let rejected = |source: &Vmm, body: &str| {
        let (status, problem) = source.try_api("POST", "/v1/migrations", Some(body)).unwrap();
        assert_eq!((status, &problem["field"]), (400, &"ticket".into()), "{problem}");
        problem["detail"].as_str().unwrap().to_owned()
    };

    // What the source sees before it connects.
    assert!(rejected(&source, &to(4000)).contains("a ticket is needed"));
    assert!(rejected(&source, &with("%%%")).contains("base64"));
    assert!(rejected(&source, &with(&tickets.issue("6", "0", "here", "there"))).contains("for VM 6"));
    assert!(rejected(&source, &with(&tickets.issue("5", "3-9", "here", "there"))).contains("epochs 3 to 9"));
    assert!(rejected(&source, &with(&tickets.issue("5", "0", "nowhere", "there"))).contains("named nowhere"));
    assert!(rejected(&source, &with(&expired_ticket(&keys, "here", "there"))).contains("expired"));
    vmm(&["keys", "new", lab.dir.path().join("forger").to_str().unwrap()]);
    let forger = Tickets { issuer: lab.dir.path().join("forger/issuer.key").display().to_string() };
    assert!(rejected(&source, &with(&forger.issue("5", "0", "here", "there"))).contains("not signed by the issuer"));

    // For another destination: the one that is there has another name.
    let there = lab.receive(1, 4000, &["--tls", &other]);
    let error = refused(&source, &with(&tickets.issue("5", "0", "here", "host")), &mut echo);
    assert!(error.contains("not for host"), "{error}");

    // What a source that does not check would be told.
    let off = lab.tls_of("here");
    source.api("PUT", "/v1/tls", Some(&json(&off)));
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("a ticket is needed"), "{error}");
    source.api("PUT", "/v1/tls", Some(&json(&here)));

    // Once: the attempt that fails behind HELLO has used it up.
    drop(there);
    let there = lab.spawn("lacking", &["--receive", "127.0.0.1:4000", "--tls", &other]);
    let ticket = tickets.issue("5", "0-3", "here", "there");
    let error = refused(&source, &with(&ticket), &mut echo);
    assert!(error.contains("lan"), "there is no tap: {error}");
    let error = refused(&source, &with(&ticket), &mut echo);
    assert!(error.contains("has been used"), "{error}");
    drop(there);

    let there = lab.receive(1, 4000, &["--tls", &other]);
    taken(&mut source, &with(&tickets.issue("5", "0", "here", "there")), &mut echo);
    assert_eq!(there.state(), "running");
}

/// A ticket that was good until a minute ago.
fn expired_ticket(keys: &Path, from: &str, to: &str) -> String {
    use base64::prelude::{BASE64_STANDARD, Engine};
    use migration::ownership::Epoch;
    let now = OffsetDateTime::now_utc().unix_timestamp() as u64;
    let ticket = migration::ticket::Ticket {
        id: [3; 16],
        vm_id: 5,
        first_epoch: Epoch(0),
        last_epoch: Epoch(0),
        not_before: now - 600,
        not_after: now - 60,
        source: from.into(),
        destination: to.into(),
    };
    let der = rustls::pki_types::PrivatePkcs8KeyDer::from_pem_file(keys.join("issuer.key")).unwrap();
    let key = ring::signature::Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).unwrap();
    let mut bytes = ticket.encode();
    bytes.extend_from_slice(key.sign(&bytes).as_ref());
    BASE64_STANDARD.encode(bytes)
}

/// Which way a byte is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ToDestination,
    ToSource,
}

/// Passes one connection on to a port of loopback and changes a byte within a record of one direction; `usize::MAX`: none.
fn meddle(to: u16, way: Way, record: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let there = TcpStream::connect(("127.0.0.1", to)).unwrap();
        let pass = |mut from: TcpStream, mut to: TcpStream, at: usize| {
            let mut bytes = vec![0; 5 + (1 << 14) + 256];
            for n in 0.. {
                if from.read_exact(&mut bytes[..5]).is_err() {
                    break;
                }
                let end = 5 + usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
                if from.read_exact(&mut bytes[5..end]).is_err() {
                    break;
                }
                if n == at {
                    bytes[5 + (end - 5) / 2] ^= 0x40;
                }
                if to.write_all(&bytes[..end]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Write);
        };
        let back = (there.try_clone().unwrap(), source.try_clone().unwrap());
        let at = |w| if w == way { record } else { usize::MAX };
        let (forth, other) = (at(Way::ToDestination), at(Way::ToSource));
        let returning = std::thread::spawn(move || pass(back.0, back.1, other));
        pass(source, there, forth);
        returning.join().unwrap();
    });
    port
}

#[test]
fn a_byte_changed_on_the_way_ends_the_port_and_harms_nobody() {
    let lab = Lab::new(2);
    let mut source = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let there = lab.receive(1, 4000, &[]);
    // Hello, (a record without meaning), the rest of the handshake, and then a message a record, or a part of the pages.
    let ways = [(Way::ToDestination, &[0, 2, 3, 4, 5, 30][..]), (Way::ToSource, &[0, 2, 3, 4])];
    let cases = ways.iter().flat_map(|(way, records)| records.iter().map(|r| (*way, *r)));
    for (n, (way, record)) in cases.enumerate() {
        let error = refused(&source, &to(meddle(4000, way, record)), &mut echo);
        println!("{way:?}, record {record}: {error}");
        arrival(&there, n as u64 + 1);
    }
    taken(&mut source, &to(meddle(4000, Way::ToSource, usize::MAX)), &mut echo);
}

#[test]
fn the_slow_are_not_waited_for() {
    let lab = Lab::new(2);
    let there = lab.receive(1, 4000, &[]);
    // A record that begins well, a byte at a time: each byte is progress.
    let mut loris = TcpStream::connect("127.0.0.1:4000").unwrap();
    let began = Instant::now();
    let mut bytes = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3].into_iter().chain(std::iter::repeat(7));
    while loris.write_all(&[bytes.next().unwrap()]).is_ok() && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(arrival(&there, 1)["last_error"].as_str().unwrap().contains("no TLS session within 2 s"));

    // One that says nothing, while a source waits behind it.
    let _silent = TcpStream::connect("127.0.0.1:4000").unwrap();
    let mut source = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    taken(&mut source, &to(4000), &mut echo);

    // And a destination that says nothing.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let began = Instant::now();
    let error = refused(&there, &to(nobody.local_addr().unwrap().port()), &mut echo);
    assert!(error.contains("no TLS session within 5 s"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let id = there.order(&to(nobody.local_addr().unwrap().port()));
    there.api("DELETE", &format!("/v1/migrations/{id}"), None);
    assert_eq!(there.wait_port(id)["state"], "cancelled");
}

#[test]
fn keys_are_read_before_the_right_to_is_given_up() {
    let lab = Lab::new(2);
    let nobody = ["--uid", "65534", "--gid", "65534"];
    let mut source = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let there = lab.receive(1, 4000, &nobody);
    taken(&mut source, &to(4000), &mut echo);
    let (status, problem) = there.try_api("PUT", "/v1/tls", Some(&json(&lab.tls_of("host")))).unwrap();
    assert_eq!((status, &problem["field"]), (400, &"tls.key".into()), "the key is root's: {problem}");
}

#[test]
fn a_destination_that_is_taken_says_so() {
    let lab = Lab::new(2);
    let _there = lab.receive(1, 4000, &["--tls", "off"]);
    // In the clear, so that the first can be held where it is; the second has TLS.
    let mut first = Stopped::connect(4000);
    first.say(&puppet::hello());
    assert!(first.next().is_some(), "WELCOME");
    let source = lab.boot("echo", &[]);
    let mut echo = Echo::new(&lab);
    let error = refused(&source, &to(4000), &mut echo);
    assert!(error.contains("another VM is on its way here"), "{error}");
}
