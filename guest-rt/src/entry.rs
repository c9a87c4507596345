//! What an image's main is wrapped in, and in an image the way there (`boot`).
use alloc::{boxed::Box, string::String, string::ToString};
use core::fmt::Display;
use core::future::Future;
use core::pin::Pin;

#[cfg(not(any(test, feature = "hosted")))]
mod boot;

/// What [`crate::entry!`] wraps an image's main in.
pub type MainFuture = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// Wraps an image's main.
pub fn wrap_main<E: Display>(main: impl Future<Output = Result<(), E>> + 'static) -> MainFuture {
    Box::pin(async { main.await.map_err(|e| e.to_string()) })
}
