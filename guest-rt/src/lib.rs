//! Bare-metal run time of the guest modules.
