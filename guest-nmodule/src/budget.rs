//! A number of units that tasks share: bytes of memory, calls.
//!
//! Always true: no more units are out than there are; whoever waits is served in the order of arrival, so that large
//! requests are not starved by small ones. One thread; a permit may be kept as long as one likes and moves between tasks.
use alloc::{collections::VecDeque, rc::Rc};
use core::cell::{Cell, RefCell};
use core::future::poll_fn;
use core::task::{Poll, Waker};

#[cfg(test)]
mod tests;

/// Units to be shared. Clones share the same ones.
#[derive(Clone, Debug)]
pub struct Budget(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    total: usize,
    free: Cell<usize>,
    next_turn: Cell<u64>,
    queue: RefCell<VecDeque<Waiter>>,
}

#[derive(Debug)]
struct Waiter {
    turn: u64,
    units: usize,
    waker: Waker,
}

/// Units taken from a [`Budget`], given back when dropped.
#[derive(Debug)]
pub struct Permit {
    budget: Budget,
    units: usize,
}

impl Budget {
    /// A budget of so many units.
    pub fn new(total: usize) -> Self {
        let inner = Inner { total, free: Cell::new(total), next_turn: Cell::new(0), queue: RefCell::default() };
        Budget(Rc::new(inner))
    }

    /// Units nobody has.
    pub fn free(&self) -> usize {
        self.0.free.get()
    }

    /// Units that are out.
    pub fn taken(&self) -> usize {
        self.0.total - self.0.free.get()
    }

    /// Whether anybody waits.
    pub fn is_short(&self) -> bool {
        !self.0.queue.borrow().is_empty()
    }

    /// Waits for `units`; more than there are in all are taken for all there are.
    pub async fn acquire(&self, units: usize) -> Permit {
        let mut place = Place { budget: self, units: units.min(self.0.total), turn: None };
        poll_fn(|context| place.poll(context.waker())).await
    }

    /// Lets the first in the queue look again, if there is enough for it.
    fn wake_first(&self) {
        if let Some(first) = self.0.queue.borrow().front()
            && first.units <= self.0.free.get()
        {
            first.waker.wake_by_ref();
        }
    }
}

/// A place in the queue, left when dropped.
struct Place<'a> {
    budget: &'a Budget,
    units: usize,
    turn: Option<u64>,
}

impl Place<'_> {
    fn poll(&mut self, waker: &Waker) -> Poll<Permit> {
        let inner = &self.budget.0;
        let mut queue = inner.queue.borrow_mut();
        let first = queue.front().is_none_or(|first| Some(first.turn) == self.turn);
        if first && self.units <= inner.free.get() {
            inner.free.set(inner.free.get() - self.units);
            drop(queue);
            self.leave();
            return Poll::Ready(Permit { budget: self.budget.clone(), units: self.units });
        }
        match self.turn {
            Some(turn) => {
                if let Some(own) = queue.iter_mut().find(|waiter| waiter.turn == turn) {
                    own.waker.clone_from(waker);
                }
            }
            None => {
                let turn = inner.next_turn.get();
                inner.next_turn.set(turn + 1);
                self.turn = Some(turn);
                queue.push_back(Waiter { turn, units: self.units, waker: waker.clone() });
            }
        }
        Poll::Pending
    }

    fn leave(&mut self) {
        if let Some(turn) = self.turn.take() {
            self.budget.0.queue.borrow_mut().retain(|waiter| waiter.turn != turn);
            self.budget.wake_first();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Permit {
    /// Units.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Gives back what is over `units`.
    pub fn shrink(&mut self, units: usize) {
        let over = self.units.saturating_sub(units);
        self.units -= over;
        self.budget.0.free.set(self.budget.0.free.get() + over);
        self.budget.wake_first();
    }

    /// Joins another permit of the same budget to this one.
    pub fn join(&mut self, mut other: Permit) {
        debug_assert!(Rc::ptr_eq(&self.budget.0, &other.budget.0));
        self.units += core::mem::take(&mut other.units);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let inner = &self.budget.0;
        inner.free.set(inner.free.get() + self.units);
        self.budget.wake_first();
    }
}
