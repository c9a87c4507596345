use super::*;
use migration::ticket::SIGNATURE_LEN;
use ring::signature::{Ed25519KeyPair, KeyPair};
use std::path::PathBuf;

const HOUR: u64 = 3600;

/// An authority with two hosts and an issuer, made here.
pub(in crate::port) struct World {
    dir: tempfile::TempDir,
    issuer: Ed25519KeyPair,
}

impl World {
    pub(in crate::port) fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::default();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        std::fs::write(dir.path().join("ca.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
        let authority = rcgen::Issuer::new(ca, ca_key);
        for name in ["a", "b"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let names = [name.to_owned(), "127.0.0.1".to_owned()];
            let cert = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
            std::fs::write(dir.path().join(format!("{name}.pem")), cert.pem()).unwrap();
            std::fs::write(dir.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        let issuer = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        std::fs::write(dir.path().join("issuer.pem"), issuer.public_key_pem()).unwrap();
        let issuer = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&issuer.serialize_der()).unwrap();
        World { dir, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn files(&self, host: &str, tickets: bool) -> TlsFiles {
        TlsFiles {
            cert: self.path(&format!("{host}.pem")),
            key: self.path(&format!("{host}.key")),
            ca: self.path("ca.pem"),
            issuer: tickets.then(|| self.path("issuer.pem")),
        }
    }

    pub(in crate::port) fn host(&self, host: &str, tickets: bool) -> Security {
        let security = Security::default();
        security.set(&TlsConfig::Files(self.files(host, tickets)), "tls").unwrap();
        security
    }

    fn sign(&self, ticket: &Ticket) -> Vec<u8> {
        let mut bytes = ticket.encode();
        bytes.extend_from_slice(self.issuer.sign(&bytes).as_ref());
        bytes
    }
}

fn ticket(id: u8) -> Ticket {
    Ticket {
        id: [id; 16],
        vm_id: 1,
        first_epoch: Epoch(2),
        last_epoch: Epoch(2),
        not_before: now() - HOUR,
        not_after: now() + HOUR,
        source: "a".into(),
        destination: "b".into(),
    }
}

fn asked(ticket: &[u8]) -> Asked<'_> {
    Asked { name: None, ticket, vm_id: 1, epoch: Epoch(2) }
}

fn hello(ticket: Vec<u8>) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        required: 0,
        offered: 0,
        port: [1, 2],
        vm_id: 1,
        owner: Default::default(),
        ownership: migration::message::Ownership::Stream,
        epoch: Epoch(2),
        memory_size: 0,
        ticket: Vec::new(),
    }
    .with_ticket(ticket)
}

pub(in crate::port) fn credentials(security: &Security) -> Arc<Credentials> {
    match security.protection() {
        Some(Protection::Tls(credentials)) => credentials,
        other => panic!("{other:?}"),
    }
}

/// Both sides' verdicts on a ticket for a port from `a` to `b`.
fn both(w: &World, b: &Security, bytes: Vec<u8>) -> [Option<String>; 2] {
    let a = w.host("a", true);
    let to = [127, 0, 0, 1].into();
    let peer = CertificateDer::from_pem_file(w.path("a.pem")).unwrap();
    let here = a.route(to, asked(&bytes)).err().map(|e| e.to_string());
    [here, b.admit(&credentials(b), &hello(bytes), &peer).err().map(|e| e.text)]
}

#[test]
fn a_ticket_is_checked_by_both_sides_and_used_once() {
    let w = World::new();
    let b = w.host("b", true);
    let good = w.sign(&ticket(1));
    assert_eq!(both(&w, &b, good.clone()), [None, None]);
    let again = both(&w, &b, good.clone());
    assert!(again[0].is_none() && again[1].as_ref().unwrap().contains("used"), "{again:?}");

    let bad = |change: fn(&mut Ticket), why: &str| {
        let mut t = ticket(2);
        change(&mut t);
        for verdict in both(&w, &b, w.sign(&t)) {
            assert!(verdict.as_ref().is_some_and(|v| v.contains(why)), "{why}: {verdict:?}");
        }
    };
    bad(|t| t.vm_id = 9, "for VM 9");
    bad(|t| (t.first_epoch, t.last_epoch) = (Epoch(3), Epoch(4)), "epochs 3 to 4");
    bad(|t| t.not_after = now() - 5, "expired");
    bad(|t| t.not_before = now() + 50, "good only in");
    bad(|t| t.source = "c".into(), "source named c");
    let mut other = ticket(3);
    other.destination = "c".into();
    let elsewhere = both(&w, &b, w.sign(&other));
    assert!(elsewhere[0].is_none() && elsewhere[1].as_ref().unwrap().contains("named c"), "{elsewhere:?}");

    for at in 0..good.len() {
        let mut forged = good.clone();
        forged[at] ^= 1;
        assert!(both(&w, &b, forged).iter().all(Option::is_some), "byte {at}");
    }
    let stranger = World::new();
    for verdict in both(&w, &b, stranger.sign(&ticket(4))) {
        assert!(verdict.unwrap().contains("not signed by the issuer"));
    }
    for verdict in both(&w, &b, Vec::new()) {
        assert!(verdict.unwrap().contains("a ticket is needed"));
    }
    // What was refused is not used up.
    assert_eq!(both(&w, &b, w.sign(&ticket(2))), [None, None]);
}

#[test]
fn used_tickets_are_remembered_until_they_expire_and_no_more_than_so_many() {
    let w = World::new();
    let b = w.host("b", true);
    lock(&b.spent).extend((0..SPENT_MAX as u64).map(|n| ([n as u8; 16], now() - 1)));
    assert_eq!(both(&w, &b, w.sign(&ticket(1))), [None, None], "expired ones are forgotten");
    assert_eq!(lock(&b.spent).len(), 1);
    lock(&b.spent).extend((0..SPENT_MAX as u64 - 1).map(|_| ([0; 16], now() + HOUR)));
    assert!(both(&w, &b, w.sign(&ticket(2)))[1].as_ref().unwrap().contains("too many"));
}

#[test]
fn without_an_issuer_certificates_suffice_and_tickets_are_refused() {
    let w = World::new();
    let (a, b) = (w.host("a", false), w.host("b", false));
    let to = [127, 0, 0, 1].into();
    match a.route(to, asked(&[])) {
        Ok(Route::Tls { name, .. }) => assert_eq!(name, ServerName::IpAddress(to.into())),
        other => panic!("{other:?}"),
    }
    match a.route(to, Asked { name: Some("b"), ..asked(&[]) }) {
        Ok(Route::Tls { name, .. }) => assert_eq!(name.to_str(), "b"),
        other => panic!("{other:?}"),
    }
    assert!(a.route(to, Asked { name: Some("not a name"), ..asked(&[]) }).is_err());
    let signed = w.sign(&ticket(1));
    assert!(a.route(to, asked(&signed)).unwrap_err().to_string().contains("no issuer"));
    let peer = CertificateDer::from_pem_file(w.path("a.pem")).unwrap();
    assert_eq!(b.admit(&credentials(&b), &hello(Vec::new()), &peer), Ok(()));
    assert!(b.admit(&credentials(&b), &hello(signed), &peer).is_err());
}

#[test]
fn off_and_unset_are_two_things() {
    let to = [127, 0, 0, 1].into();
    let unset = Security::default();
    assert!(unset.route(to, asked(&[])).unwrap_err().to_string().contains("--tls off"));
    let off = Security::default();
    off.set(&TlsConfig::Off, "tls").unwrap();
    assert!(matches!(off.route(to, asked(&[])), Ok(Route::Plain)));
    assert!(off.route(to, asked(&[0; SIGNATURE_LEN])).unwrap_err().to_string().starts_with("ticket:"));
    assert!(off.route(to, Asked { name: Some("b"), ..asked(&[]) }).unwrap_err().to_string().starts_with("name:"));
}

#[test]
fn a_bad_file_is_named_by_its_field_and_changes_nothing() {
    let w = World::new();
    let security = w.host("a", true);
    std::fs::write(w.path("empty"), "").unwrap();
    std::fs::write(w.path("large"), vec![b'x'; FILE_MAX as usize + 1]).unwrap();
    let good = || w.files("a", true);
    let cases = [
        (TlsFiles { cert: w.path("empty"), ..good() }, "tls.cert"),
        (TlsFiles { cert: w.path("nowhere"), ..good() }, "tls.cert"),
        (TlsFiles { key: w.path("a.pem"), ..good() }, "tls.key"),
        (TlsFiles { key: w.path("b.key"), ..good() }, "tls.key"),
        (TlsFiles { ca: w.path("large"), ..good() }, "tls.ca"),
        (TlsFiles { issuer: Some(w.path("a.pem")), ..good() }, "tls.issuer"),
    ];
    for (files, field) in cases {
        match security.set(&TlsConfig::Files(files.clone()), "tls") {
            Err(Error::Config(e)) => assert_eq!(e[0].field, field, "{}", e[0].message),
            other => panic!("{files:?}: {other:?}"),
        }
        assert_eq!(security.config(), Some(TlsConfig::Files(good())));
    }
    assert_eq!(w.issuer.public_key().as_ref(), credentials(&security).issuer.unwrap());
}
