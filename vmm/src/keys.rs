//! `vmm keys` and `vmm ticket`: what ports are protected with, for people without an authority of their own.
//!
//! Owns the files of a private authority: `ca.pem`, `ca.key`, and `issuer.pem`, `issuer.key` for tickets. Always true: a file that is
//! there is not written over; private keys are readable by their owner alone. The authority's certificate is a function of its key, so
//! that `ca.key` is enough to sign with. Certificates of any other authority do as well.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::prelude::{BASE64_STANDARD, Engine};
use clap::Subcommand;
use migration::ownership::Epoch;
use migration::ticket::{NAME_MAX, Ticket};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519,
};
use ring::signature::Ed25519KeyPair;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use time::{Duration, OffsetDateTime};
use vmm::boot::info::random;

/// How long an authority lives.
const CA_DAYS: i64 = 3650;
/// Clocks of hosts may differ by so much.
const SKEW: Duration = Duration::hours(1);
/// Likewise for tickets, which live for minutes.
const TICKET_SKEW_SECONDS: u64 = 60;
/// Largest file read.
const FILE_MAX: u64 = 64 << 10;

/// Make the keys and certificates that ports are protected with.
#[derive(Debug, Subcommand)]
pub enum Keys {
    /// A private authority and an issuer of tickets, in a new directory.
    New {
        /// Gets ca.pem, ca.key, issuer.pem, issuer.key. Keep both .key files away from the hosts.
        dir: PathBuf,
    },
    /// Key and certificate of a host: NAME.key and NAME.pem in the authority's directory.
    Host {
        /// Directory of the authority.
        dir: PathBuf,
        /// Its names and addresses. The first gives the files their name.
        #[arg(required = true)]
        names: Vec<String>,
        /// How long it is good.
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
        days: u16,
    },
}

/// Issue a ticket for one port, and print it.
#[derive(Debug, clap::Args)]
pub struct TicketOrder {
    /// The issuer's private key (issuer.key).
    #[arg(long, value_name = "FILE")]
    issuer: PathBuf,
    /// Id of the VM; 0 for one that has none.
    #[arg(long, value_name = "N")]
    vm_id: u64,
    /// Epoch of the VM, or first and last: 7, 7-9.
    #[arg(long, value_name = "E[-E]", value_parser = epochs)]
    epoch: (u64, u64),
    /// A name in the certificate of the host that gives the VM away.
    #[arg(long, value_name = "NAME")]
    from: String,
    /// A name in the certificate of the host that takes it.
    #[arg(long, value_name = "NAME")]
    to: String,
    /// How long it is good.
    #[arg(long, value_name = "N", default_value_t = 10)]
    minutes: u32,
}

fn epochs(text: &str) -> Result<(u64, u64), String> {
    let number = |s: &str| s.parse::<u64>().map_err(|e| format!("{s:?}: {e}"));
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if first > last { Err(format!("{first} is behind {last}")) } else { Ok((first, last)) }
}

/// Does what was asked for; gives what is to be printed.
pub fn run(order: &Keys) -> Result<String, String> {
    match order {
        Keys::New { dir } => new_authority(dir),
        Keys::Host { dir, names, days } => new_host(dir, names, i64::from(*days)),
    }
}

/// The ticket in base64.
pub fn ticket(order: &TicketOrder) -> Result<String, String> {
    for (flag, name) in [("--from", &order.from), ("--to", &order.to)] {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(format!("{flag}: from 1 to {NAME_MAX} bytes"));
        }
    }
    let wrong = |what: String| format!("{}: {what}", order.issuer.display());
    let der = PrivatePkcs8KeyDer::from_pem_slice(read(&order.issuer)?.as_bytes()).map_err(|e| wrong(e.to_string()))?;
    let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
        .map_err(|e| wrong(format!("no Ed25519 key: {e}")))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let ticket = Ticket {
        id: random().map_err(|e| e.to_string())?,
        vm_id: order.vm_id,
        first_epoch: Epoch(order.epoch.0),
        last_epoch: Epoch(order.epoch.1),
        not_before: now.saturating_sub(TICKET_SKEW_SECONDS),
        not_after: now.saturating_add(u64::from(order.minutes) * 60),
        source: order.from.clone(),
        destination: order.to.clone(),
    };
    let mut bytes = ticket.encode();
    bytes.extend_from_slice(key.sign(&bytes).as_ref());
    Ok(BASE64_STANDARD.encode(bytes) + "\n")
}

fn new_authority(dir: &Path) -> Result<String, String> {
    std::fs::create_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(made)?;
    let ca = authority(&key).self_signed(&key).map_err(made)?;
    let issuer = KeyPair::generate_for(&PKCS_ED25519).map_err(made)?;
    write(&dir.join("ca.key"), &key.serialize_pem(), Secret::Yes)?;
    write(&dir.join("ca.pem"), &ca.pem(), Secret::No)?;
    write(&dir.join("issuer.key"), &issuer.serialize_pem(), Secret::Yes)?;
    write(&dir.join("issuer.pem"), &issuer.public_key_pem(), Secret::No)?;
    Ok(format!("{}: now `vmm keys host {} NAME …` for each host\n", dir.display(), dir.display()))
}

fn new_host(dir: &Path, names: &[String], days: i64) -> Result<String, String> {
    let Some(first) = names.first().filter(|n| !n.contains('/') && !n.starts_with('.') && !n.is_empty()) else {
        return Err("the first name is no name of a file".into());
    };
    let (key_file, cert_file) = (dir.join(format!("{first}.key")), dir.join(format!("{first}.pem")));
    if ["ca", "issuer"].contains(&first.as_str()) {
        return Err(format!("{first}: is the name of the authority's own files"));
    }
    let ca_key =
        KeyPair::from_pem(&read(&dir.join("ca.key"))?).map_err(|e| format!("{}/ca.key: {e}", dir.display()))?;
    let issuer = Issuer::new(authority(&ca_key), ca_key);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(made)?;
    let mut params = CertificateParams::new(names).map_err(|e| format!("{}: {e}", names.join(", ")))?;
    params.distinguished_name = named(first);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.not_before = OffsetDateTime::now_utc() - SKEW;
    params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
    let cert = params.signed_by(&key, &issuer).map_err(made)?;
    write(&key_file, &key.serialize_pem(), Secret::Yes)?;
    write(&cert_file, &cert.pem(), Secret::No)?;
    let (ca, dir) = (dir.join("ca.pem"), dir.display());
    Ok(format!(
        "--tls cert={},key={},ca={}\n(with tickets: ,issuer={dir}/issuer.pem)\n",
        cert_file.display(),
        key_file.display(),
        ca.display()
    ))
}

/// The authority with this key. Its name is its own, so that another is told apart by it.
fn authority(key: &KeyPair) -> CertificateParams {
    let id: String = key.public_key_raw().iter().rev().take(8).map(|b| format!("{b:02x}")).collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&format!("Outrigger ports {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = OffsetDateTime::now_utc() - SKEW;
    params.not_after = OffsetDateTime::now_utc() + Duration::days(CA_DAYS);
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, name);
    all
}

fn made(e: rcgen::Error) -> String {
    format!("keys: {e}")
}

fn read(file: &Path) -> Result<String, String> {
    let mut text = String::new();
    let opened = std::fs::File::open(file).and_then(|f| f.take(FILE_MAX).read_to_string(&mut text));
    opened.map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(text)
}

#[derive(PartialEq, Eq)]
enum Secret {
    Yes,
    No,
}

fn write(file: &Path, text: &str, secret: Secret) -> Result<(), String> {
    let mode = if secret == Secret::Yes { 0o600 } else { 0o644 };
    let opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(file);
    opened.and_then(|mut f| f.write_all(text.as_bytes())).map_err(|e| format!("{}: {e}", file.display()))
}
