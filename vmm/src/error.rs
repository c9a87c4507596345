//! Operating errors of the monitor.

use std::io;
use std::path::PathBuf;

/// What can go wrong while a VM is configured, built, run, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong; each entry names a field.
    #[error("{}", list(.0))]
    Config(Vec<FieldError>),
    /// A file, socket or other resource of the host.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted, on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A KVM call.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
    /// The image cannot be booted.
    #[error("image {path}: {reason}")]
    Image {
        /// The image.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Guest memory could not be mapped or an address lies outside it.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A saved state does not fit this VM.
    #[error("state: {0}")]
    State(String),
    /// What is asked for is not possible in the state the VM is in.
    #[error("{0}")]
    Conflict(String),
}

/// One mistake in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Path of the field, like `nets[0].mac`.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl FieldError {
    /// A mistake in `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        FieldError { field: field.into(), message: message.into() }
    }
}

fn list(errors: &[FieldError]) -> String {
    errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>().join("\n")
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Names the KVM call that failed.
pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}

/// Names what failed on the host.
pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Host { what, source }
}
