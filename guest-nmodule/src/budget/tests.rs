use super::*;
use core::pin::Pin;
use core::task::Context;
use std::boxed::Box;

type Acquiring<'a> = Pin<Box<dyn Future<Output = Permit> + 'a>>;

fn acquiring(budget: &Budget, units: usize) -> Acquiring<'_> {
    Box::pin(budget.acquire(units))
}

fn poll(future: &mut Acquiring<'_>) -> Option<Permit> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(permit) => Some(permit),
        Poll::Pending => None,
    }
}

#[test]
fn first_come_first_served() {
    let budget = Budget::new(10);
    let held = poll(&mut acquiring(&budget, 8)).unwrap();
    let mut large = acquiring(&budget, 5);
    let mut small = acquiring(&budget, 1);
    assert!(poll(&mut large).is_none());
    assert!(poll(&mut small).is_none(), "there is enough, but the large one was first");
    drop(held);
    let large = poll(&mut large).unwrap();
    let small = poll(&mut small).unwrap();
    assert_eq!(budget.free(), 4);
    drop((large, small));
    assert_eq!(budget.free(), 10);
}

#[test]
fn giving_up_lets_the_next_go() {
    let budget = Budget::new(10);
    let held = poll(&mut acquiring(&budget, 8)).unwrap();
    let mut first = acquiring(&budget, 5);
    let mut second = acquiring(&budget, 2);
    assert!(poll(&mut first).is_none());
    assert!(poll(&mut second).is_none());
    drop(first);
    assert_eq!(poll(&mut second).unwrap().units(), 2);
    drop(held);
}

#[test]
fn more_than_there_is_means_all() {
    let budget = Budget::new(10);
    let all = poll(&mut acquiring(&budget, 11)).unwrap();
    assert_eq!((all.units(), budget.free(), budget.taken()), (10, 0, 10));
}

#[test]
fn permits_join() {
    let budget = Budget::new(10);
    let mut one = poll(&mut acquiring(&budget, 3)).unwrap();
    one.join(poll(&mut acquiring(&budget, 4)).unwrap());
    assert_eq!((one.units(), budget.free()), (7, 3));
    drop(one);
    assert_eq!(budget.free(), 10);
}

#[test]
fn permits_shrink() {
    let budget = Budget::new(10);
    let mut one = poll(&mut acquiring(&budget, 8)).unwrap();
    let mut other = acquiring(&budget, 5);
    assert!(poll(&mut other).is_none() && budget.is_short());
    one.shrink(5);
    let other = poll(&mut other).unwrap();
    assert!(!budget.is_short());
    one.shrink(7);
    assert_eq!((one.units(), other.units(), budget.free()), (5, 5, 0));
}
