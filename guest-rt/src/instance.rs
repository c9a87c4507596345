//! Templates: an image that prepares all that needs no identity, and goes on as one of many instances.
//!
//! Its command line has the word `template` ([`guest_abi::TEMPLATE_WORD`]). It makes ready what it can, says so
//! ([`crate::BOOT_MARK_PREPARED`]) and waits here; then its VM is checkpointed. Of the checkpoint the VMM makes instances, each with
//! a command line, an identity, entropy and network addresses of its own, all there before the first instruction. Always true: nothing
//! runs between the end of the park and the wake-up here but what is woken by the same change of generation.
use crate::boot;
use crate::cmdline::Cmdline;
use crate::exec::{generation, generation_after};
use guest_abi::TEMPLATE_WORD;

/// Why a template cannot become an instance.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// There is no boot-info page, so nobody can say that this is an instance.
    #[error("{TEMPLATE_WORD}: this VMM makes no instances")]
    Foreign,
    /// The new command line.
    #[error("{0}")]
    Boot(#[from] boot::BootError),
}

/// Waits until this VM has been made another instance; its command line.
pub async fn next_instance() -> Result<Cmdline, InstanceError> {
    let page = boot::page().ok_or(InstanceError::Foreign)?;
    // SAFETY: mapped for the life of the image; the VMM writes it only while the vCPU is stopped.
    let number = || unsafe { (&raw const (*page).instance).read_volatile() };
    let before = number();
    loop {
        let seen = generation();
        if number() != before {
            break;
        }
        generation_after(seen).await;
    }
    Ok(Cmdline::parse(&boot::cmdline_now(page)?))
}
