//! Waiting for one another within one executor: a notification, a channel for one value, a bounded channel, a
//! semaphore. All for one vCPU: `Rc` inside, no locks.
use alloc::{collections::VecDeque, rc::Rc, vec::Vec};
use core::cell::{Cell, RefCell};
use core::future::{Future, poll_fn};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

/// Wakers of those that wait.
#[derive(Default)]
pub struct WaitList(RefCell<Vec<Waker>>);

impl WaitList {
    /// An empty list.
    pub const fn new() -> Self {
        WaitList(RefCell::new(Vec::new()))
    }

    /// Adds a waiter, once.
    pub fn add(&self, waker: &Waker) {
        let mut list = self.0.borrow_mut();
        if !list.iter().any(|w| w.will_wake(waker)) {
            list.push(waker.clone());
        }
    }

    /// Wakes all and forgets them.
    pub fn wake_all(&self) {
        self.0.take().into_iter().for_each(Waker::wake);
    }
}

/// Something happened: wakes all that wait at that time.
#[derive(Default)]
pub struct Notify {
    count: Cell<u64>,
    waiters: WaitList,
}

impl Notify {
    /// Nothing has happened yet.
    pub const fn new() -> Self {
        Notify { count: Cell::new(0), waiters: WaitList::new() }
    }

    /// Wakes all that wait.
    pub fn notify(&self) {
        self.count.set(self.count.get() + 1);
        self.waiters.wake_all();
    }

    /// Waits for a notification later than this call.
    pub fn notified(&self) -> impl Future<Output = ()> + '_ {
        let seen = self.count.get();
        poll_fn(move |cx| {
            if self.count.get() != seen {
                return Poll::Ready(());
            }
            self.waiters.add(cx.waker());
            Poll::Pending
        })
    }

    /// Waits until a condition holds; it is looked at now and after each notification.
    pub async fn wait_until(&self, mut condition: impl FnMut() -> bool) {
        poll_fn(|cx| {
            if condition() {
                return Poll::Ready(());
            }
            self.waiters.add(cx.waker());
            Poll::Pending
        })
        .await;
    }
}

/// A semaphore.
pub struct Semaphore {
    permits: Cell<usize>,
    waiters: WaitList,
}

/// Permits of a [`Semaphore`], given back when dropped.
pub struct Permit<'a> {
    semaphore: &'a Semaphore,
    count: usize,
}

impl Semaphore {
    /// With so many permits.
    pub const fn new(permits: usize) -> Self {
        Semaphore { permits: Cell::new(permits), waiters: WaitList::new() }
    }

    /// Waits for `count` permits. Not fair between waiters of different counts.
    pub async fn acquire(&self, count: usize) -> Permit<'_> {
        poll_fn(|cx| match self.permits.get().checked_sub(count) {
            Some(left) => {
                self.permits.set(left);
                Poll::Ready(Permit { semaphore: self, count })
            }
            None => {
                self.waiters.add(cx.waker());
                Poll::Pending
            }
        })
        .await
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.semaphore.permits.set(self.semaphore.permits.get() + self.count);
        self.semaphore.waiters.wake_all();
    }
}

/// The other end is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other end is gone")]
pub struct Closed;

/// A channel for one value.
pub mod oneshot {
    use super::*;

    struct Shared<T> {
        value: RefCell<Option<T>>,
        sender_gone: Cell<bool>,
        waker: RefCell<Option<Waker>>,
    }

    /// Sends the value.
    pub struct Sender<T>(Rc<Shared<T>>);
    /// Waits for the value.
    pub struct Receiver<T>(Rc<Shared<T>>);

    /// A new channel.
    pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let shared =
            Rc::new(Shared { value: RefCell::new(None), sender_gone: Cell::new(false), waker: RefCell::new(None) });
        (Sender(shared.clone()), Receiver(shared))
    }

    impl<T> Sender<T> {
        /// Sends; if the receiver is gone the value is dropped.
        pub fn send(self, value: T) {
            *self.0.value.borrow_mut() = Some(value);
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.sender_gone.set(true);
            if let Some(waker) = self.0.waker.take() {
                waker.wake();
            }
        }
    }

    impl<T> Future for Receiver<T> {
        type Output = Result<T, Closed>;
        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            if let Some(value) = self.0.value.take() {
                return Poll::Ready(Ok(value));
            }
            if self.0.sender_gone.get() {
                return Poll::Ready(Err(Closed));
            }
            *self.0.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        }
    }
}

/// A bounded channel, many senders, one receiver.
pub mod channel {
    use super::*;

    struct Shared<T> {
        queue: RefCell<VecDeque<T>>,
        bound: usize,
        senders: Cell<usize>,
        receiver_gone: Cell<bool>,
        waiting: WaitList,
    }

    /// Sends values.
    pub struct Sender<T>(Rc<Shared<T>>);
    /// Receives values.
    pub struct Receiver<T>(Rc<Shared<T>>);

    /// A new channel that holds at most `bound` values.
    pub fn bounded<T>(bound: usize) -> (Sender<T>, Receiver<T>) {
        let shared = Rc::new(Shared {
            queue: RefCell::new(VecDeque::new()),
            bound: bound.max(1),
            senders: Cell::new(1),
            receiver_gone: Cell::new(false),
            waiting: WaitList::new(),
        });
        (Sender(shared.clone()), Receiver(shared))
    }

    impl<T> Sender<T> {
        /// Sends a value, waiting for room.
        pub async fn send(&self, value: T) -> Result<(), Closed> {
            let mut value = Some(value);
            poll_fn(|cx| {
                if self.0.receiver_gone.get() {
                    return Poll::Ready(Err(Closed));
                }
                if self.0.queue.borrow().len() >= self.0.bound {
                    self.0.waiting.add(cx.waker());
                    return Poll::Pending;
                }
                self.0.queue.borrow_mut().extend(value.take());
                self.0.waiting.wake_all();
                Poll::Ready(Ok(()))
            })
            .await
        }

        /// Sends a value if there is room; else gives it back.
        pub fn try_send(&self, value: T) -> Result<(), T> {
            if self.0.receiver_gone.get() || self.0.queue.borrow().len() >= self.0.bound {
                return Err(value);
            }
            self.0.queue.borrow_mut().push_back(value);
            self.0.waiting.wake_all();
            Ok(())
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.senders.set(self.0.senders.get() + 1);
            Sender(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.senders.set(self.0.senders.get() - 1);
            self.0.waiting.wake_all();
        }
    }

    impl<T> Receiver<T> {
        /// The next value; `None` when all senders are gone and nothing is left.
        pub async fn recv(&mut self) -> Option<T> {
            poll_fn(|cx| {
                let value = self.0.queue.borrow_mut().pop_front();
                if value.is_some() {
                    self.0.waiting.wake_all();
                    return Poll::Ready(value);
                }
                if self.0.senders.get() == 0 {
                    return Poll::Ready(None);
                }
                self.0.waiting.add(cx.waker());
                Poll::Pending
            })
            .await
        }

        /// The next value if there is one.
        pub fn try_recv(&mut self) -> Option<T> {
            let value = self.0.queue.borrow_mut().pop_front();
            if value.is_some() {
                self.0.waiting.wake_all();
            }
            value
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            self.0.receiver_gone.set(true);
            self.0.waiting.wake_all();
        }
    }
}

#[cfg(test)]
mod tests;
