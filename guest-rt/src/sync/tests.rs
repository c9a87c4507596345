use super::*;
use core::task::Waker;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

struct Counter(AtomicU32);
impl alloc::task::Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_waiter_is_listed_and_woken_once() {
    let counter = Arc::new(Counter(AtomicU32::new(0)));
    let waker = Waker::from(counter.clone());
    let list = WaitList::new();
    list.add(&waker);
    list.add(&waker.clone());
    list.wake_all();
    list.wake_all();
    assert_eq!(counter.0.load(Relaxed), 1);
}

#[test]
fn a_full_channel_gives_the_value_back() {
    let (tx, mut rx) = channel::bounded(1);
    assert_eq!(tx.try_send(1), Ok(()));
    assert_eq!(tx.try_send(2), Err(2));
    assert_eq!(rx.try_recv(), Some(1));
    assert_eq!(rx.try_recv(), None);
    drop(rx);
    assert_eq!(tx.try_send(3), Err(3));
}
