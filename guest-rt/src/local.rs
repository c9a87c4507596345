//! Statics of a program with one vCPU.
//!
//! In the image nothing runs concurrently: one vCPU, no interrupt handler in ring 3. In host tests each thread has
//! its own instance. Either way a `local!` static needs no lock.

/// A value that only the one vCPU touches.
pub struct Local<T>(T);

// SAFETY: an image has one vCPU and takes no interrupt in ring 3 (faults do not return), so there is one thread.
#[cfg(not(test))]
unsafe impl<T> Sync for Local<T> {}

impl<T> Local<T> {
    /// Wraps a value.
    pub const fn new(value: T) -> Self {
        Local(value)
    }

    /// Lends it.
    pub fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        f(&self.0)
    }
}

/// Declares a static of type `Local<T>`; thread-local in host tests.
macro_rules! local {
    ($(#[$meta:meta])* $vis:vis static $name:ident: $type:ty = $init:expr;) => {
        #[cfg(not(test))]
        $(#[$meta])*
        $vis static $name: $crate::local::Local<$type> = $crate::local::Local::new($init);
        #[cfg(test)]
        std::thread_local! {
            $(#[$meta])*
            $vis static $name: $type = const { $init };
        }
    };
}
pub(crate) use local;
