//! The I/O thread: serves the devices while the guest computes.
//!
//! Sleeps until a descriptor is ready, serves it, and then looks for more for a bounded time ([`super::polling`]); meanwhile
//! drivers need not ring. Always true: before it sleeps, and as soon as the vCPU is parked (its thread then serves the devices
//! itself), every driver has been asked to ring again, and what it did meanwhile was looked at.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::polling::Polling;
use crate::devices::Devices;
use crate::event::{Ready, Token};
use crate::sandbox::{self, Kind};
use crate::vcpu::Context;
use crate::virtio::Progress;

/// Looks at the rings for each look at the descriptors.
const LOOKS: usize = 4;
/// Looks in vain at the descriptors for each offer of the processor to somebody else: an offer costs up to 1 µs, which a request
/// at depth 1 feels, and without any a program on the same processor would wait out the whole time.
/// A compromise: offering at each look gave more TCP round trips, and fewer reads at depth 1.
const LOOKS_BEFORE_YIELD: u32 = 32;

/// Body of the thread; `stop` with the thread's wake descriptor ends it.
pub(super) fn io_thread(context: &Context, stop: &AtomicBool) {
    // It reads files, which the sandbox does not let this thread do.
    let mut polling = Polling::new(std::thread::available_parallelism().map_or(1, usize::from));
    if let Err(e) = sandbox::confine(Kind::Io) {
        log::error!("the I/O thread cannot be confined, so no device is served: {e}");
        return;
    }
    while !stop.load(Ordering::Acquire) {
        let begin = Instant::now();
        serve(context, &context.events.io.wait(None), Devices::handle);
        polling.slept(begin.elapsed());
        if !polling.budget().is_zero() {
            look(context, stop, polling.budget());
        }
    }
}

fn serve(context: &Context, ready: &Ready, handle: fn(&mut Devices, Token) -> Progress) {
    for token in ready.iter().filter(|t| *t != Token::Wake) {
        // The lock is given up in between, so that a long queue does not keep the guest from the other devices.
        while handle(&mut context.devices(), token) == Progress::More {}
    }
}

/// Serves what comes, until nothing has come for so long.
fn look(context: &Context, stop: &AtomicBool, patience: Duration) {
    let mut last = Instant::now();
    let mut in_vain = 0;
    while last.elapsed() < patience && !context.gate.is_asleep() && !stop.load(Ordering::Acquire) {
        // Rings are looked at more often than descriptors, which take a system call.
        let mut any = (0..LOOKS).any(|_| context.devices().poll());
        let ready = context.events.io.wait(Some(Duration::ZERO));
        serve(context, &ready, Devices::handle_polled);
        any |= !ready.is_empty();
        if any {
            last = Instant::now();
            in_vain = 0;
        } else {
            in_vain += 1;
            if in_vain % LOOKS_BEFORE_YIELD == 0 {
                // Whoever is waited for may want this very processor.
                std::thread::yield_now();
            }
        }
    }
    while context.devices().end_poll() == Progress::More {}
}
