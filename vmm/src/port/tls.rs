//! Who may port with whom: TLS 1.3 with certificates on both sides, and tickets.
//!
//! Owns what this process has of keys ([`Credentials`], read from files when they are named, as later the sandbox may be in the way),
//! what is trusted, and which tickets have been used here ([`Security`]). Always true: a connection is used only when the peer's
//! certificate was signed by the authority and is in its time; a source talks only to a destination whose certificate has the
//! name it was told; where an issuer is configured, no port begins without a ticket that fits the VM, its epoch, the time and both
//! certificates, on both sides. Survives: peers without TLS, strangers, idle ones (a handshake has a time limit).
//!
//! Nothing is kept for TLS but these few kilobytes until a port begins.

pub mod handshake;
pub mod record;

use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::message::{Hello, Reason, ReasonCode};
use migration::ownership::Epoch;
use migration::ticket::{Signed, Ticket, TicketError};
use ring::signature::{ED25519, UnparsedPublicKey};
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};

use crate::boot::info::host_real_ns;
use crate::config::{TlsConfig, TlsFiles};
use crate::error::{Error, FieldError, Result};
use crate::sandbox::files::{self, Use};

/// The protocol's name within TLS: a certificate of this authority used for anything else does not lead here.
const ALPN: &[u8] = b"outrigger-port/1";
/// Largest file of keys or certificates.
const FILE_MAX: u64 = 64 << 10;
/// Most used tickets remembered until they expire.
const SPENT_MAX: usize = 1024;
/// A guest with more memory is ported with ChaCha20-Poly1305: AES-GCM's keys wear out ([`record::AES_RECORDS_MAX`]).
const AES_MEMORY_MAX: u64 = 32 << 30;
/// What stands before an Ed25519 key in its SubjectPublicKeyInfo (RFC 8410).
const ED25519_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Why there is no session, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The socket.
    #[error("{0}")]
    Io(#[source] io::Error),
    /// The caller did not want to go on.
    #[error("stopped")]
    Stopped,
    /// The peer took its time.
    #[error("no TLS session within {} s", .0.as_secs())]
    Slow(Duration),
    /// The peer speaks the porting protocol in the clear; perhaps it said why it refuses.
    #[error("{}", plain(.0.as_deref()))]
    Plain(Option<String>),
    /// The handshake.
    #[error("{}", sentence(.0))]
    Handshake(#[from] rustls::Error),
    /// The peer does not accept this side.
    #[error("the other side refuses this host: {}", refusal(*.0))]
    Refused(AlertDescription),
    /// The peer has closed the session.
    #[error("the other side has closed the session")]
    Closed,
    /// A record does not have the tag it must have.
    #[error("TLS: what came was changed on the way")]
    Damaged,
    /// A record that is not allowed.
    #[error("TLS: a record {0}")]
    Record(&'static str),
    /// A key must not be used any longer.
    #[error("TLS: more than {} records under one key", record::AES_RECORDS_MAX)]
    KeyWorn,
}

fn plain(said: Option<&str>) -> String {
    let said = said.map(|s| format!(", and says: {s}")).unwrap_or_default();
    format!("the other side speaks no TLS (was it started with --tls off?){said}")
}

/// The cases an operator can do something about.
fn sentence(e: &rustls::Error) -> String {
    use CertificateError as C;
    match e {
        rustls::Error::InvalidCertificate(why) => match why {
            C::Expired | C::ExpiredContext { .. } => "the other side's certificate has expired".into(),
            C::NotValidYet | C::NotValidYetContext { .. } => {
                "the other side's certificate is not valid yet: is the clock right?".into()
            }
            C::UnknownIssuer => "the other side's certificate is of an authority that is not trusted here".into(),
            C::NotValidForName => "the other side's certificate has another name".into(),
            C::NotValidForNameContext { expected, presented } => {
                format!("the other side's certificate is for {}, not for {}", presented.join(", "), expected.to_str())
            }
            why => format!("the other side's certificate: {why}"),
        },
        rustls::Error::NoCertificatesPresented => "the other side has no certificate".into(),
        rustls::Error::AlertReceived(alert) => format!("the other side refuses this host: {}", refusal(*alert)),
        e => format!("TLS: {e}"),
    }
}

fn refusal(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateExpired => "its certificate has expired".into(),
        AlertDescription::UnknownCA => "its certificate is of an authority that is not trusted there".into(),
        AlertDescription::CertificateRequired => "it has shown no certificate".into(),
        AlertDescription::BadCertificate => "its certificate is not good there (its time, its name?)".into(),
        other => format!("TLS alert {other:?}"),
    }
}

/// Which cipher a source offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cipher {
    /// AES-128-GCM.
    Aes,
    /// ChaCha20-Poly1305, whose keys last for any amount.
    ChaCha,
}

impl Cipher {
    /// For a guest with so much memory.
    pub fn for_memory(bytes: u64) -> Cipher {
        if bytes <= AES_MEMORY_MAX { Cipher::Aes } else { Cipher::ChaCha }
    }
}

/// What this process proves itself with, and whom it trusts.
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: Vec<CertificateDer<'static>>,
    issuer: Option<[u8; 32]>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({} certificates)", self.chain.len())
    }
}

impl Credentials {
    /// Reads the files and sees whether they fit together. `path` is the configuration's.
    pub fn load(given: &TlsFiles, path: &str) -> Result<Credentials> {
        let wrong = |name: &str, what: String| Error::Config(vec![FieldError::new(format!("{path}.{name}"), what)]);
        let read = |name: &str, file: &Path| {
            // New ones will lie where the old ones do.
            files::allow_beside(file, Use::Read);
            read(file).map_err(|e| wrong(name, format!("{}: {e}{}", file.display(), files::hint(&e))))
        };
        let certificates = |name: &str, file: &Path| {
            let all: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(name, file)?).collect();
            match all {
                Ok(all) if !all.is_empty() => Ok(all),
                Ok(_) => Err(wrong(name, format!("{}: no certificate (PEM) in it", file.display()))),
                Err(e) => Err(wrong(name, format!("{}: {e}", file.display()))),
            }
        };
        let key = PrivateKeyDer::from_pem_slice(&read("key", &given.key)?)
            .map_err(|e| wrong("key", format!("{}: no private key (PEM): {e}", given.key.display())))?;
        let issuer = match &given.issuer {
            Some(file) => Some(
                ed25519(&read("issuer", file)?)
                    .ok_or_else(|| wrong("issuer", format!("{}: no Ed25519 public key (PEM)", file.display())))?,
            ),
            None => None,
        };
        let (chain, authorities) = (certificates("cert", &given.cert)?, certificates("ca", &given.ca)?);
        let credentials = Credentials { chain, key, authorities, issuer };
        credentials.roots().map_err(|e| wrong("ca", format!("{}: {e}", given.ca.display())))?;
        credentials.server().map_err(|e| wrong("key", format!("does not go with the certificate: {e}")))?;
        Ok(credentials)
    }

    fn roots(&self) -> std::result::Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        self.authorities.iter().try_for_each(|a| roots.add(a.clone()))?;
        Ok(roots)
    }

    fn client(&self, cipher: Cipher) -> std::result::Result<ClientConfig, rustls::Error> {
        let suite = match cipher {
            Cipher::Aes => provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
            Cipher::ChaCha => provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        };
        let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..provider::default_provider() });
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(config)
    }

    fn server(&self) -> std::result::Result<ServerConfig, rustls::Error> {
        let cipher_suites = vec![
            provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
            provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        let provider = Arc::new(CryptoProvider { cipher_suites, ..provider::default_provider() });
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Ok(config)
    }

    /// Whether this process's own certificate has this name.
    fn has_name(&self, name: &str) -> bool {
        self.chain.first().is_some_and(|own| is_for(own, name))
    }

    /// The ticket in these bytes, if the issuer has signed it and it fits the VM; what it says of names is not yet checked.
    /// `None` where no ticket is needed.
    fn ticket(&self, bytes: &[u8], vm_id: u64, epoch: Epoch) -> std::result::Result<Option<Ticket>, String> {
        let issuer = match (&self.issuer, bytes) {
            (None, []) => return Ok(None),
            (Some(_), []) => return Err("a ticket is needed here: an issuer of tickets is configured".into()),
            (None, _) => return Err("a ticket, and no issuer is configured here to check it with (tls.issuer)".into()),
            (Some(issuer), _) => issuer,
        };
        let signed = Signed::parse(bytes).map_err(|e| e.to_string())?;
        let key = UnparsedPublicKey::new(&ED25519, issuer);
        let ticket = signed.verify(|covered, signature| key.verify(covered, signature).is_ok());
        let checked = ticket.and_then(|t| t.check(vm_id, epoch, now()).map(|()| t));
        checked.map(Some).map_err(|e: TicketError| e.to_string())
    }
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::other(format!("more than {FILE_MAX} bytes")));
    }
    Ok(bytes)
}

/// The key in a SubjectPublicKeyInfo.
fn ed25519(pem: &[u8]) -> Option<[u8; 32]> {
    let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).ok()?;
    der.strip_prefix(&ED25519_PREFIX)?.try_into().ok()
}

/// Whether a certificate has this name, or address.
fn is_for(certificate: &CertificateDer<'_>, name: &str) -> bool {
    match (ParsedCertificate::try_from(certificate), ServerName::try_from(name)) {
        (Ok(certificate), Ok(name)) => verify_server_name(&certificate, &name).is_ok(),
        _ => false,
    }
}

fn now() -> u64 {
    host_real_ns() / 1_000_000_000
}

/// How connections are protected.
#[derive(Debug, Clone)]
pub enum Protection {
    /// Not at all, because somebody said so.
    Off,
    /// By TLS.
    Tls(Arc<Credentials>),
}

/// How a source gets to its destination.
#[derive(Debug)]
pub enum Route {
    /// In the clear.
    Plain,
    /// By TLS.
    Tls {
        /// What this side is and trusts.
        credentials: Arc<Credentials>,
        /// What must be in the destination's certificate.
        name: ServerName<'static>,
        /// The ticket, empty if none is needed.
        ticket: Vec<u8>,
    },
}

/// What a process knows of keys and tickets.
#[derive(Debug, Default)]
pub struct Security {
    set: Mutex<Option<(TlsConfig, Protection)>>,
    /// Tickets used here, and until when they would be good.
    spent: Mutex<Vec<([u8; 16], u64)>>,
}

impl Security {
    /// Reads the files; ports that begin from now on use them.
    pub fn set(&self, config: &TlsConfig, path: &str) -> Result<()> {
        let protection = match config {
            TlsConfig::Off => Protection::Off,
            TlsConfig::Files(files) => Protection::Tls(Arc::new(Credentials::load(files, path)?)),
        };
        *lock(&self.set) = Some((config.clone(), protection));
        Ok(())
    }

    /// What was set.
    pub fn config(&self) -> Option<TlsConfig> {
        lock(&self.set).as_ref().map(|(config, _)| config.clone())
    }

    /// How connections are protected; `None`: nobody has said.
    pub fn protection(&self) -> Option<Protection> {
        lock(&self.set).as_ref().map(|(_, protection)| protection.clone())
    }

    /// The source's check, before it connects: what is wrong is named by the request's field.
    pub fn route(&self, to: std::net::IpAddr, asked: Asked<'_>) -> Result<Route> {
        let wrong = |field: &str, what: String| Error::Config(vec![FieldError::new(field, what)]);
        let credentials = match self.protection() {
            None => return Err(Error::Conflict(UNSET.into())),
            Some(Protection::Off) if asked.ticket.is_empty() && asked.name.is_none() => return Ok(Route::Plain),
            Some(Protection::Off) => {
                let field = if asked.ticket.is_empty() { "name" } else { "ticket" };
                return Err(wrong(field, "can only be checked with TLS, which is off here".into()));
            }
            Some(Protection::Tls(credentials)) => credentials,
        };
        let ticket = credentials.ticket(asked.ticket, asked.vm_id, asked.epoch).map_err(|e| wrong("ticket", e))?;
        if let Some(ticket) = &ticket {
            if !credentials.has_name(&ticket.source) {
                let text = format!(
                    "the ticket is for a source named {}, which this host's certificate is not for",
                    ticket.source
                );
                return Err(wrong("ticket", text));
            }
            if asked.name.is_some_and(|name| name != ticket.destination) {
                return Err(wrong("name", format!("the ticket is for {}", ticket.destination)));
            }
        }
        let name = match (ticket.as_ref().map(|t| t.destination.as_str()), asked.name) {
            (Some(name), _) | (None, Some(name)) => {
                let bad = |_| wrong("name", format!("{name:?} is neither a host's name nor an address"));
                ServerName::try_from(name.to_owned()).map_err(bad)?
            }
            (None, None) => ServerName::IpAddress(to.into()),
        };
        Ok(Route::Tls { credentials, name, ticket: asked.ticket.to_vec() })
    }

    /// The destination's check, before it makes anything; a ticket is used up by it.
    pub fn admit(
        &self,
        with: &Credentials,
        hello: &Hello,
        peer: &CertificateDer<'_>,
    ) -> std::result::Result<(), Reason> {
        let refused = |text: String| Reason::new(ReasonCode::Permission, text);
        let Some(ticket) = with.ticket(&hello.ticket, hello.vm_id, hello.epoch).map_err(refused)? else {
            return Ok(());
        };
        if !is_for(peer, &ticket.source) {
            return Err(refused(format!("the ticket is for a source named {}, and you are not", ticket.source)));
        }
        if !with.has_name(&ticket.destination) {
            return Err(refused(format!(
                "the ticket is for a destination named {}, and this is none",
                ticket.destination
            )));
        }
        let mut spent = lock(&self.spent);
        let now = now();
        spent.retain(|(_, until)| *until >= now);
        if spent.iter().any(|(id, _)| *id == ticket.id) {
            return Err(refused("the ticket has been used: every port needs its own".into()));
        }
        if spent.len() == SPENT_MAX {
            return Err(refused(format!("{SPENT_MAX} tickets have been used that have not expired: too many")));
        }
        spent.push((ticket.id, ticket.not_after));
        Ok(())
    }
}

/// What is asked for a port.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// What must be in the destination's certificate, if not its address.
    pub name: Option<&'a str>,
    /// The ticket; empty: none.
    pub ticket: &'a [u8],
    /// The VM.
    pub vm_id: u64,
    /// Its epoch.
    pub epoch: Epoch,
}

/// What a process says that was told nothing of keys.
pub const UNSET: &str = "ports are encrypted, and this process has no keys: give it some (--tls cert=FILE,key=FILE,ca=FILE, \
    `vmm ctl tls …` while it runs; `vmm keys` makes them), or switch encryption off for a private network (--tls off)";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod tests;
