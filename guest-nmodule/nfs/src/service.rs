//! What stands behind the engines.
use alloc::rc::Rc;
use fabric::{
    fs::Credential,
    op::{Op, Outcome},
};

/// No answer from the back end, and none to be expected (it was shut down, or this instance lost its ownership). The
/// call gets no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the file service does not answer")]
pub struct Unreachable;

/// File-system primitives: a CF client in the N-module, a file system in tests. It waits, as long as it takes, while
/// the D-module is away for a time.
#[allow(async_fn_in_trait, reason = "one executor thread everywhere: futures need not be Send")]
pub trait FileService {
    /// Executes one operation on somebody's behalf.
    async fn call(&self, credential: Credential, op: Op) -> Result<Outcome, Unreachable>;
}

impl<S: FileService> FileService for Rc<S> {
    async fn call(&self, credential: Credential, op: Op) -> Result<Outcome, Unreachable> {
        (**self).call(credential, op).await
    }
}
