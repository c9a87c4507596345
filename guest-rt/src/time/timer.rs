//! Timers: what waits for an instant, ordered by it.
use super::{Duration, Instant};
use crate::local::local;
use alloc::collections::BTreeMap;
use core::cell::{Cell, RefCell};
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

local! {
    static TIMERS: RefCell<BTreeMap<(Instant, u64), Waker>> = RefCell::new(BTreeMap::new());
}
local! {
    static NEXT_ID: Cell<u64> = Cell::new(0);
}

/// The earliest deadline.
pub(crate) fn next_deadline() -> Option<Instant> {
    TIMERS.with(|t| t.borrow().first_key_value().map(|((at, _), _)| *at))
}

/// Wakes all whose deadline has come; true if there were any.
pub(crate) fn fire(now: Instant) -> bool {
    let mut any = false;
    loop {
        let due = TIMERS.with(|t| {
            let mut t = t.borrow_mut();
            match t.first_entry() {
                Some(e) if e.key().0 <= now => Some(e.remove()),
                _ => None,
            }
        });
        match due {
            Some(waker) => waker.wake(),
            None => return any,
        }
        any = true;
    }
}

/// Waits until an instant. See [`sleep_until`].
#[derive(Debug)]
#[must_use = "does nothing unless awaited"]
pub struct Sleep {
    deadline: Instant,
    /// Key in TIMERS while registered.
    id: Option<u64>,
}

impl Sleep {
    /// When it ends.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    fn forget(&mut self) {
        if let Some(id) = self.id.take() {
            TIMERS.with(|t| t.borrow_mut().remove(&(self.deadline, id)));
        }
    }

    /// Moves the deadline.
    pub fn reset(&mut self, deadline: Instant) {
        self.forget();
        self.deadline = deadline;
    }
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            self.forget();
            return Poll::Ready(());
        }
        let id = self.id.unwrap_or_else(|| NEXT_ID.with(|n| n.replace(n.get() + 1)));
        self.id = Some(id);
        TIMERS.with(|t| t.borrow_mut().insert((self.deadline, id), cx.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Waits for a time.
pub fn sleep(d: Duration) -> Sleep {
    sleep_until(Instant::now() + d)
}

/// Waits until an instant.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, id: None }
}

/// The time of a [`timeout`] is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("time is over")]
pub struct Elapsed;

/// A future with a time limit. See [`timeout`].
#[must_use = "does nothing unless awaited"]
pub struct Timeout<F> {
    // In a box, so that no unsafe projection is needed.
    future: Pin<alloc::boxed::Box<F>>,
    sleep: Sleep,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(value) = self.future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        Pin::new(&mut self.sleep).poll(cx).map(|()| Err(Elapsed))
    }
}

/// Waits for a future, but no longer than `d`; then the future is dropped.
pub fn timeout<F: Future>(d: Duration, future: F) -> Timeout<F> {
    Timeout { future: alloc::boxed::Box::pin(future), sleep: sleep(d) }
}
