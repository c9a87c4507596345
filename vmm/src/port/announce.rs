//! Announcements after the hand-over: where the guest's addresses are now.
//!
//! The first ones are the destination's own, while it still has the connection ([`REPEAT_MS`]). If the network loses all of them, because
//! a link is down for longer, neighbours go on sending to the old place until the guest happens to say something. So a thread goes on
//! for a while ([`LATER_MS`]). Always true: nothing is announced once the VM has been told to stop, for a pause or another port:
//! both happen under the devices' lock.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::guest;
use crate::vm::Vm;

/// When the addresses are announced after the VM runs, in milliseconds: at once, and again in case one gets lost.
pub const REPEAT_MS: [u64; 5] = [0, 1, 5, 20, 100];

/// And after that, for links that come back late: a spanning tree, a card that finds its speed.
const LATER_MS: [u64; 4] = [500, 1_500, 4_000, 10_000];

/// Stack of the thread: it only sleeps and writes a frame.
const STACK: usize = 64 << 10;

/// Goes on announcing a VM that has run here since `since`.
pub fn later(vm: &Arc<Vm>, since: Instant) {
    let vm = Arc::downgrade(vm);
    let thread = std::thread::Builder::new().name("announce".into()).stack_size(STACK);
    if let Err(e) = thread.spawn(move || repeat(&vm, since)) {
        log::info!("no later announcements: thread: {e}");
    }
}

fn repeat(vm: &Weak<Vm>, since: Instant) {
    for due in LATER_MS {
        std::thread::sleep(Duration::from_millis(due).saturating_sub(since.elapsed()));
        let Some(vm) = vm.upgrade() else { return };
        guest::announce_again(&vm);
    }
}
