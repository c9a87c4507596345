//! The wire format: golden bytes, any value there and back, and bytes nobody sent.
pub(crate) mod any;
mod golden;
mod hostile;
mod round_trip;
