//! The executor: one queue of ready tasks, timers, devices; what the vCPU does when there is nothing to do.
//!
//! Owns the tasks. One vCPU, so futures need not be `Send`. A round polls the tasks that were ready when it began,
//! then all devices, then the timers. When a round did nothing the executor first *spins*: it looks at the devices'
//! rings for a bounded time (`spin_us=` on the command line, default [`SPIN_US`]; up to [`SPIN_GROWTH`] times as long while
//! parks are that short: a park costs more than it saves then); then it *parks* until a device
//! has something or the earliest deadline. Before a park under our VMM no doorbell is rung (the VMM looks at the
//! queues); in all other cases it is, once a round, for each queue that wants it.
//!
//! Always true: a task that is woken runs, in the order of the wakes; a waker may outlive its task.
use crate::cmdline::Cmdline;
use crate::heap::Mutex;
use crate::local::local;
use crate::lull::{self, Lull, Step};
use crate::sync::oneshot;
use crate::time::{self, Duration, Instant, timer};
use alloc::{boxed::Box, collections::VecDeque, rc::Rc, string::String, sync::Arc, task::Wake, vec::Vec};
use core::cell::{Cell, RefCell};
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};

/// Default of `spin_us=`: how long an idle guest polls before it parks.
pub const SPIN_US: u64 = 50;

/// How many times as long as that it polls while parks turn out to be short.
pub const SPIN_GROWTH: u32 = 4;

/// Longest park during a lull: whether the lull has come is seen behind each.
const LULL_PARK: Duration = Duration::from_micros(50);

/// How long an image whose main has ended waits for what is on its way out.
pub const GRACE: Duration = Duration::from_millis(200);

/// See [`log_later`].
const LOG_AFTER: Duration = Duration::from_millis(20);

/// Something the executor polls: a driver or a protocol stack.
pub trait Device {
    /// Takes what the device has finished. True if that was anything.
    fn poll(&self) -> bool;
    /// Whether `poll` would find something: a cheap look, made over and over while spinning.
    fn pending(&self) -> bool;
    /// Whether doorbells are due, as far as can be seen.
    fn wants_kick(&self) -> bool {
        false
    }
    /// Rings the doorbells that are due.
    fn kick(&self);
    /// When `poll` should run at the latest even if the device has nothing.
    fn deadline(&self) -> Option<Instant> {
        None
    }
    /// The machine is about to be stopped for a moment: as little as possible is to be under way to it by then. Or (`false`) that is over.
    fn lull(&self, _on: bool) {}
    /// Whether it has come to that.
    fn is_lulled(&self) -> bool {
        true
    }
    /// Whether the image may end: nothing is on its way out.
    fn is_quiet(&self) -> bool {
        true
    }
}

type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    /// Out while it is being polled.
    future: Option<LocalFuture>,
    waker: Waker,
}

struct TaskWaker {
    id: usize,
    /// In the queue already.
    queued: AtomicBool,
    ready: Arc<Mutex<VecDeque<Arc<TaskWaker>>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.lock().push_back(self.clone());
        }
    }
}

/// Tasks by number, and those that are ready.
#[derive(Default)]
struct Executor {
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: Arc<Mutex<VecDeque<Arc<TaskWaker>>>>,
}

impl Executor {
    fn spawn(&self, future: LocalFuture) {
        let mut tasks = self.tasks.borrow_mut();
        let id = self.free.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(None);
            tasks.len() - 1
        });
        let waker = Arc::new(TaskWaker { id, queued: AtomicBool::new(true), ready: self.ready.clone() });
        self.ready.lock().push_back(waker.clone());
        tasks[id] = Some(Task { future: Some(future), waker: waker.into() });
    }

    fn is_ready(&self) -> bool {
        !self.ready.lock().is_empty()
    }

    /// Polls the tasks that are ready now. True if there were any.
    fn round(&self) -> bool {
        let count = self.ready.lock().len();
        for _ in 0..count {
            let Some(woken) = self.ready.lock().pop_front() else { break };
            woken.queued.store(false, Ordering::Release);
            // A late wake of a task that has ended reaches whoever has its number now: one needless poll.
            let Some((mut future, waker)) = self.tasks.borrow_mut().get_mut(woken.id).and_then(|slot| {
                let task = slot.as_mut()?;
                Some((task.future.take()?, task.waker.clone()))
            }) else {
                continue;
            };
            let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
            if done {
                // Dropped outside the borrow: what it owns may spawn.
                drop(future);
                self.tasks.borrow_mut()[woken.id] = None;
                self.free.borrow_mut().push(woken.id);
            } else if let Some(task) = self.tasks.borrow_mut()[woken.id].as_mut() {
                task.future = Some(future);
            }
        }
        count > 0
    }
}

/// Executor, devices and what the idle loop needs to know.
struct Runtime {
    executor: Executor,
    devices: RefCell<Vec<Rc<dyn Device>>>,
    /// What was asked for, and how long it is now.
    spin_least: Cell<Duration>,
    spin: Cell<Duration>,
    generation: Cell<u32>,
    generation_waiters: RefCell<Vec<Waker>>,
    lull: Cell<Lull>,
    statistics: Cell<Statistics>,
}

/// What the executor did, for tests and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Rounds that found something to do.
    pub rounds: u64,
    /// Times the vCPU parked.
    pub parks: u64,
    /// Spins that ended because something came.
    pub spins_won: u64,
}

local! {
    static RUNTIME: core::cell::OnceCell<&'static Runtime> = core::cell::OnceCell::new();
}

/// The runtime, made when first asked for. Never dropped, nor are the tasks that are left when main has ended.
fn runtime() -> &'static Runtime {
    RUNTIME.with(|r| {
        *r.get_or_init(|| {
            Box::leak(Box::new(Runtime {
                executor: Executor::default(),
                devices: RefCell::default(),
                spin_least: Cell::new(Duration::from_micros(SPIN_US)),
                spin: Cell::new(Duration::from_micros(SPIN_US)),
                generation: Cell::new(time::generation()),
                generation_waiters: RefCell::default(),
                lull: Cell::default(),
                statistics: Cell::default(),
            }))
        })
    })
}

#[cfg_attr(test, allow(dead_code))]
pub(crate) fn init(cmdline: &Cmdline) {
    let r = runtime();
    if let Some(us) = cmdline.number("spin_us") {
        r.spin_least.set(Duration::from_micros(us));
        r.spin.set(Duration::from_micros(us));
    }
}

/// Adds a device to those that are polled.
pub fn register(device: Rc<dyn Device>) {
    runtime().devices.borrow_mut().push(device);
}

/// What the executor did so far.
pub fn statistics() -> Statistics {
    runtime().statistics.get()
}

/// The result of a spawned task. Dropping it lets the task run on.
pub struct JoinHandle<T>(oneshot::Receiver<T>);

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match Pin::new(&mut self.0).poll(cx) {
            Poll::Ready(Ok(value)) => Poll::Ready(value),
            // A task is only dropped when it has ended, and then it has sent its value.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

/// Starts a task.
pub fn spawn<F: Future + 'static>(future: F) -> JoinHandle<F::Output> {
    let (sender, receiver) = oneshot::channel();
    runtime().executor.spawn(Box::pin(async move {
        sender.send(future.await);
    }));
    JoinHandle(receiver)
}

/// Lets the other ready tasks and the devices have their turn.
pub async fn yield_now() {
    let mut yielded = false;
    core::future::poll_fn(|cx| {
        if core::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The generation of the clock page: grows with every restore and port.
pub fn generation() -> u32 {
    time::generation()
}

/// Waits until the VM has been restored or ported (since the call).
pub async fn generation_changed() -> u32 {
    generation_after(generation()).await
}

/// Logs, in a moment, what is to be said of a restore or a port: a line on the console leaves the guest, and its clients wait.
pub fn log_later(text: String) {
    spawn(async move {
        time::sleep(LOG_AFTER).await;
        log::info!("{text}");
    });
}

/// Waits until the generation is another.
pub(crate) async fn generation_after(before: u32) -> u32 {
    core::future::poll_fn(|cx| {
        let now = generation();
        if now != before {
            return Poll::Ready(now);
        }
        runtime().generation_waiters.borrow_mut().push(cx.waker().clone());
        Poll::Pending
    })
    .await
}

/// Runs everything until a future has ended.
pub fn block_on<F: Future + 'static>(future: F) -> F::Output {
    let r = runtime();
    let result = Rc::new(RefCell::new(None));
    let slot = result.clone();
    r.executor.spawn(Box::pin(async move {
        let value = future.await;
        *slot.borrow_mut() = Some(value);
    }));
    loop {
        let busy = r.turn();
        if let Some(value) = result.borrow_mut().take() {
            r.finish();
            return value;
        }
        if !busy {
            r.idle();
        }
    }
}

impl Runtime {
    /// Main has ended: lets the devices finish what is on its way, connections say goodbye, for a bounded time.
    fn finish(&self) {
        let end = Instant::now() + GRACE;
        while Instant::now() < end && !self.devices.borrow().iter().all(|d| d.is_quiet()) {
            if !self.turn() {
                self.kick();
                let left = end.since(Instant::now()).min(Duration::from_millis(1));
                park::park(left.as_nanos() as u64);
            }
        }
        self.kick();
    }

    /// One round of everything. True if there was anything to do.
    fn turn(&self) -> bool {
        // First: after a park no task may do anything for the VM that this was before.
        let mut busy = self.check_generation();
        busy |= self.check_lull();
        busy |= self.executor.round();
        let mut i = 0;
        // By index: polling a device must be free to register another.
        while let Some(device) = { self.devices.borrow().get(i).cloned() } {
            busy |= device.poll();
            i += 1;
        }
        busy |= timer::next_deadline().is_some_and(|_| timer::fire(Instant::now()));
        if busy {
            self.count(|s| s.rounds += 1);
            if self.executor.is_ready() {
                self.kick();
            }
        }
        busy || self.executor.is_ready()
    }

    fn check_generation(&self) -> bool {
        let now = time::generation();
        if self.generation.replace(now) == now {
            return false;
        }
        log_later(alloc::format!("clock generation is now {now}: this VM was restored or ported"));
        self.generation_waiters.take().into_iter().for_each(Waker::wake);
        true
    }

    fn check_lull(&self) -> bool {
        let mut lull = self.lull.get();
        let devices = self.devices.borrow();
        let step = lull.step(lull::asked(), Instant::now(), || devices.iter().all(|d| d.is_lulled()));
        self.lull.set(lull);
        match step {
            None => return false,
            Some(Step::Begin) => devices.iter().for_each(|d| d.lull(true)),
            Some(Step::End) => devices.iter().for_each(|d| d.lull(false)),
            Some(Step::Answer(number)) => lull::answer(number),
        }
        true
    }

    fn kick(&self) {
        for device in self.devices.borrow().iter() {
            device.kick();
        }
    }

    fn wants_kick(&self) -> bool {
        self.devices.borrow().iter().any(|d| d.wants_kick())
    }

    fn pending(&self) -> bool {
        self.devices.borrow().iter().any(|d| d.pending()) || self.lull.get().is_news(lull::asked())
    }

    fn deadline(&self) -> Option<Instant> {
        let devices = self.devices.borrow();
        devices.iter().filter_map(|d| d.deadline()).chain(timer::next_deadline()).min()
    }

    /// Nothing is ready: spin, then park.
    fn idle(&self) {
        let deadline = self.deadline().unwrap_or(Instant::FAR_FUTURE);
        let start = Instant::now();
        let (least, spin) = (self.spin_least.get(), self.spin.get());
        if self.lull.get().is_on() {
            // Others need the processor more: the clients, so that they hear of it.
            if !park::looks_at_queues() {
                self.kick();
            }
            self.park(deadline.min(start + LULL_PARK));
            return;
        }
        // A park serves the queues on this processor, for what a doorbell costs, and nobody is woken on another. Not where parks are
        // short: there whoever was woken goes on looking, and needs no doorbells.
        let serves = park::looks_at_queues() && (spin.is_zero() || (spin == least && self.wants_kick()));
        if !serves {
            self.kick();
            let until = (start + spin).min(deadline);
            while Instant::now() < until {
                if self.pending() {
                    self.count(|s| s.spins_won += 1);
                    return;
                }
                park::spin();
            }
        }
        if let Some(parked) = self.park(deadline) {
            self.spin.set(next_spin(least, spin, parked));
        }
    }

    /// Parks until `deadline`, unless there is something to do; for how long it was.
    fn park(&self, deadline: Instant) -> Option<Duration> {
        let now = Instant::now();
        if now >= deadline || self.pending() {
            return None;
        }
        self.count(|s| s.parks += 1);
        let ns = if deadline == Instant::FAR_FUTURE { u64::MAX } else { deadline.since(now).as_nanos() as u64 };
        park::park(ns);
        Some(Instant::now().since(now))
    }

    fn count(&self, f: impl FnOnce(&mut Statistics)) {
        let mut s = self.statistics.get();
        f(&mut s);
        self.statistics.set(s);
    }
}

/// How long to spin after a spin of `spin` in vain and a park of `parked`: longer if the longest would have won.
fn next_spin(least: Duration, spin: Duration, parked: Duration) -> Duration {
    let most = least.saturating_mul(SPIN_GROWTH);
    if spin.saturating_add(parked) <= most { spin.saturating_mul(2).min(most) } else { (spin / 2).max(least) }
}

#[cfg(not(test))]
mod park {
    pub(super) use crate::platform::{park, park_looks_at_queues as looks_at_queues};
    pub(super) use core::hint::spin_loop as spin;
}
/// In host tests spinning takes a microsecond a round, and a park moves the clock to its deadline.
#[cfg(test)]
mod park {
    pub(super) fn looks_at_queues() -> bool {
        true
    }
    pub(super) fn spin() {
        crate::time::source::advance(1_000);
    }
    pub(super) fn park(ns: u64) {
        assert!(ns != u64::MAX, "parked for ever: nothing can wake this test");
        crate::time::source::advance(ns);
    }
}

#[cfg(test)]
mod tests;
