//! System tests: real processes in the lab. `cargo xtask test` runs them.
mod lab;
mod probe;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One system test at a time: they share two cores.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}
