use super::*;
use crate::sync::{Notify, Semaphore, channel, oneshot};
use crate::time::{sleep, sleep_until, timeout};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What happened, in order.
#[derive(Clone, Default)]
struct Diary(Rc<RefCell<Vec<u64>>>);

impl Diary {
    fn note(&self, what: u64) {
        self.0.borrow_mut().push(what);
    }
    fn read(&self) -> Vec<u64> {
        self.0.borrow().clone()
    }
}

#[test]
fn sleepers_wake_in_order_of_their_deadlines() {
    let diary = Diary::default();
    let d = diary.clone();
    block_on(async move {
        let start = Instant::now();
        let tasks: Vec<_> = [30, 10, 20, 10]
            .into_iter()
            .map(|n| {
                let d = d.clone();
                spawn(async move {
                    sleep(ms(n)).await;
                    d.note(n);
                    n
                })
            })
            .collect();
        let mut sum = 0;
        for t in tasks {
            sum += t.await;
        }
        assert_eq!(sum, 70);
        assert!(start.elapsed() >= ms(30));
    });
    assert_eq!(diary.read(), [10, 10, 20, 30]);
    assert_eq!(timer::next_deadline(), None, "no timer is left behind");
}

#[test]
fn a_timeout_drops_its_future() {
    block_on(async {
        let held = Rc::new(());
        let inside = held.clone();
        let late = async move {
            sleep(ms(100)).await;
            drop(inside);
        };
        assert!(timeout(ms(10), late).await.is_err());
        assert_eq!(Rc::strong_count(&held), 1);
        assert_eq!(timeout(ms(100), async { 5 }).await, Ok(5));
        let mut s = sleep(ms(500));
        s.reset(Instant::now() + ms(1));
        let before = Instant::now();
        s.await;
        assert!(before.elapsed() < ms(400));
        sleep_until(Instant::from_nanos(0)).await;
    });
    assert_eq!(timer::next_deadline(), None);
}

#[test]
fn yielding_tasks_take_turns() {
    let diary = Diary::default();
    let d = diary.clone();
    block_on(async move {
        let tasks: Vec<_> = [1, 2]
            .into_iter()
            .map(|n| {
                let d = d.clone();
                spawn(async move {
                    for _ in 0..3 {
                        d.note(n);
                        yield_now().await;
                    }
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
    });
    assert_eq!(diary.read(), [1, 2, 1, 2, 1, 2]);
}

#[test]
fn a_late_waker_does_no_harm() {
    block_on(async {
        let kept: Rc<RefCell<Option<Waker>>> = Rc::default();
        let k = kept.clone();
        spawn(async move {
            core::future::poll_fn(|cx| {
                *k.borrow_mut() = Some(cx.waker().clone());
                Poll::Ready(())
            })
            .await;
        })
        .await;
        let waker = kept.take().unwrap();
        // Its number belongs to another task now, and then to nobody.
        let other = spawn(async { sleep(ms(1)).await });
        waker.wake_by_ref();
        other.await;
        waker.wake();
        sleep(ms(1)).await;
    });
}

#[test]
fn channels_semaphores_and_notifications() {
    block_on(async {
        let (tx, mut rx) = channel::bounded(2);
        let tx2 = tx.clone();
        let sender = spawn(async move {
            for i in 0..10 {
                tx2.send(i).await.unwrap();
            }
        });
        assert!(tx.try_send(100).is_ok());
        drop(tx);
        let mut got = Vec::new();
        while let Some(v) = rx.recv().await {
            got.push(v);
        }
        sender.await;
        assert_eq!(got, [100, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);

        let (tx, rx) = oneshot::channel::<u32>();
        drop(tx);
        assert!(rx.await.is_err());

        let semaphore = Rc::new(Semaphore::new(2));
        let most = Rc::new(Cell::new((0, 0)));
        let tasks: Vec<_> = (0..7)
            .map(|_| {
                let (s, m) = (semaphore.clone(), most.clone());
                spawn(async move {
                    let permit = s.acquire(1).await;
                    let (now, max) = m.get();
                    m.set((now + 1, max.max(now + 1)));
                    sleep(ms(1)).await;
                    m.set((m.get().0 - 1, m.get().1));
                    drop(permit);
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
        assert_eq!(most.get(), (0, 2));

        let notify = Rc::new(Notify::new());
        let n = notify.clone();
        let waiter = spawn(async move { n.notified().await });
        yield_now().await;
        notify.notify();
        waiter.await;
    });
}

#[test]
fn a_port_is_noticed() {
    block_on(async {
        let waiter = spawn(generation_changed());
        sleep(ms(1)).await;
        time::source::GENERATION.set(5);
        assert_eq!(waiter.await, 5);
    });
}

/// A device that has something at certain times.
struct Clockwork {
    at: RefCell<VecDeque<Instant>>,
    polled: Cell<u32>,
    kicked: Cell<u32>,
    wants_kick: bool,
    arrived: Notify,
}

impl Device for Clockwork {
    fn poll(&self) -> bool {
        let due = self.at.borrow().front().is_some_and(|at| *at <= Instant::now());
        if due {
            self.at.borrow_mut().pop_front();
            self.polled.set(self.polled.get() + 1);
            self.arrived.notify();
        }
        due
    }
    fn pending(&self) -> bool {
        self.at.borrow().front().is_some_and(|at| *at <= Instant::now())
    }
    fn wants_kick(&self) -> bool {
        self.wants_kick
    }
    fn kick(&self) {
        self.kicked.set(self.kicked.get() + 1);
    }
    fn deadline(&self) -> Option<Instant> {
        self.at.borrow().front().copied()
    }
}

#[test]
fn spins_grow_while_parks_are_short() {
    let least = Duration::from_micros(50);
    let mut spin = least;
    for expected in [100, 200, 200] {
        spin = next_spin(least, spin, Duration::from_micros(200) - spin);
        assert_eq!(spin, Duration::from_micros(expected));
    }
    for expected in [100, 50, 50] {
        spin = next_spin(least, spin, Duration::from_millis(1));
        assert_eq!(spin, Duration::from_micros(expected));
    }
    // None at all stays none, and what is for ever does not overflow.
    assert_eq!(next_spin(Duration::ZERO, Duration::ZERO, Duration::ZERO), Duration::ZERO);
    let ever = Duration::from_secs(1_000_000);
    assert!(next_spin(ever, ever, ever) >= ever);
}

#[test]
fn idle_spins_then_parks_until_the_earliest_deadline() {
    block_on(async {
        let start = Instant::now();
        // The first within the spin, the second long after it.
        let at = [start + Duration::from_micros(20), start + ms(50)];
        let device = Rc::new(Clockwork {
            at: RefCell::new(at.into_iter().collect()),
            polled: Cell::new(0),
            kicked: Cell::new(0),
            wants_kick: false,
            arrived: Notify::new(),
        });
        let before = statistics();
        register(device.clone());
        let d = device.clone();
        device.arrived.wait_until(|| d.polled.get() == 1).await;
        let first = statistics();
        assert_eq!(first.parks, before.parks, "found while spinning");
        assert!(start.elapsed() < Duration::from_micros(SPIN_US));
        device.arrived.wait_until(|| d.polled.get() == 2).await;
        assert!(statistics().parks > first.parks);
        assert!(start.elapsed() >= ms(50) && start.elapsed() < ms(51));
        assert!(device.kicked.get() > 0, "a spinning guest rings its doorbells");
    });
}

#[test]
fn a_park_serves_what_waits_for_a_doorbell() {
    block_on(async {
        let start = Instant::now();
        let device = Rc::new(Clockwork {
            at: RefCell::new([start + ms(50)].into()),
            polled: Cell::new(0),
            kicked: Cell::new(0),
            wants_kick: true,
            arrived: Notify::new(),
        });
        let before = statistics();
        register(device.clone());
        let d = device.clone();
        device.arrived.wait_until(|| d.polled.get() == 1).await;
        // Once, for the task it has woken.
        assert_eq!((statistics().parks, device.kicked.get()), (before.parks + 1, 1));
        assert_eq!(start.elapsed(), ms(50), "nor did it spin before");
    });
}
