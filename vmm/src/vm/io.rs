//! The I/O thread: serves the devices while the guest computes.
//!
//! Sleeps until a descriptor is ready, serves it, and then looks for more for a bounded time ([`crate::polling`]); meanwhile
//! drivers need not ring. Always true: before it sleeps, and as soon as the vCPU is parked (its thread then serves the devices
//! itself), every driver has been asked to ring again, and what it did meanwhile was looked at.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::devices::Devices;
use crate::event::{Ready, Token};
use crate::polling::{Offers, Polling};
use crate::sandbox::{self, Kind};
use crate::schedule;
use crate::vcpu::Context;
use crate::virtio::Progress;

/// Looks at the rings for each look at the descriptors.
const LOOKS: usize = 4;

/// Body of the thread; `stop` with the thread's wake descriptor ends it.
pub(super) fn io_thread(context: &Context, stop: &AtomicBool) {
    schedule::prompt();
    let mut polling = Polling::new(context.processors);
    if let Err(e) = sandbox::confine(Kind::Io) {
        log::error!("the I/O thread cannot be confined, so no device is served: {e}");
        return;
    }
    let mut offers = Offers::new();
    let mut looked = Duration::ZERO;
    while !stop.load(Ordering::Acquire) {
        let begin = Instant::now();
        serve(context, &context.events.io.wait(None), Devices::handle);
        pay(context, Devices::process_all);
        polling.slept(looked, begin.elapsed());
        looked = match polling.budget(true) {
            Duration::ZERO => Duration::ZERO,
            _ => look(context, stop, &polling, &mut offers),
        };
    }
}

fn serve(context: &Context, ready: &Ready, handle: fn(&mut Devices, Token) -> Progress) {
    context.looks.begin();
    for token in ready.iter().filter(|t| *t != Token::Wake) {
        // The lock is given up in between, so that a long queue does not keep the guest from the other devices.
        while handle(&mut context.devices(), token) == Progress::More {}
    }
}

/// Comes from the devices, with what the vCPU has left to do there done.
fn pay(context: &Context, look: fn(&mut Devices) -> Progress) {
    while context.looks.end() {
        context.looks.begin();
        while look(&mut context.devices()) == Progress::More {}
    }
}

/// Serves what comes, until nothing has come for a while: how long.
fn look(context: &Context, stop: &AtomicBool, polling: &Polling, offers: &mut Offers) -> Duration {
    let mut last = Instant::now();
    offers.came();
    let mut patience = polling.budget(context.devices().await_host());
    while last.elapsed() < patience && !context.gate.is_asleep() && !stop.load(Ordering::Acquire) {
        // Rings are looked at more often than descriptors, which take a system call.
        context.looks.begin();
        let mut any = (0..LOOKS).any(|_| context.devices().poll());
        let ready = context.events.io.wait(Some(Duration::ZERO));
        serve(context, &ready, Devices::handle_polled);
        pay(context, Devices::process_all_polled);
        any |= !ready.is_empty();
        if any {
            last = Instant::now();
            offers.came();
            patience = polling.budget(context.devices().await_host());
        } else if offers.is_due() {
            // Whoever is waited for may want this very processor.
            offers.offer();
        }
    }
    let looked = last.elapsed();
    while context.devices().end_poll() == Progress::More {}
    looked
}
