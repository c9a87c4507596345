//! The pause: the guest stops, its state and the last of its memory are collected and sent, and what each step took.
//!
//! Always true: memory is looked at for the last time behind the last write of a device; the disks' images are given up before
//! the destination can read that they are free.

use std::time::{Duration, Instant};

use migration::message::{Message, Reason, ReasonCode, Stamp};
use migration::ownership::Epoch;
use migration::source::Event;
use migration::wire::{FrameType, STATE_MAX};

use super::{Driver, SPIN, disconnected, gone, internal, micros, reset, state};
use crate::port::connection::ConnectionError;
use crate::port::job::{Breakdown, LullReport};
use crate::port::{guest, lull, stamp};
use crate::schedule::Urgent;

/// The instants of the pause.
#[derive(Debug, Default)]
pub(super) struct Pause {
    ordered: Option<Stamp>,
    pub exit: Option<Stamp>,
    lull: Option<LullReport>,
    breakdown: Breakdown,
    /// What the digest of memory took, if one was asked for.
    pub digest: Duration,
}

impl Driver<'_> {
    /// The guest lets its clients wait, and writes hardly anything then: what it has written until now need not be sent in the pause. One that
    /// had to be slowed down gets no more time than it had.
    pub(super) fn lull(&mut self) -> Event {
        if self.throttle.is_some() {
            return Event::Lulled;
        }
        self.urgent.extend(Urgent::port());
        self.pause.lull = lull::ask(self.vm);
        if self.pause.lull.as_ref().is_some_and(|lull| lull.answered)
            && let Err(event) = self.send_pages(true)
        {
            return event;
        }
        Event::Lulled
    }

    pub(super) fn stop_guest(&mut self) -> Event {
        self.paused = true;
        // First: the blackout begins when the guest last ran, and it may have been held for a while.
        self.throttle = None;
        if self.urgent.is_empty() {
            self.urgent.extend(Urgent::port());
        }
        self.pause.ordered = Some(stamp::now());
        match guest::pause(self.vm, &mut self.urgent) {
            Ok(exit) => {
                self.pause.exit = Some(exit);
                let b = &mut self.pause.breakdown;
                b.stop_us = self.pause.ordered.map_or(0, |o| exit.since(&o) / 1000);
                b.pause_us = stamp::now().since(&exit) / 1000;
                Event::Paused
            }
            Err(_) if self.vm.is_to_be_reset() => Event::Failed(reset()),
            Err(e) => Event::Failed(state(&e)),
        }
    }

    pub(super) fn collect(&mut self) -> Event {
        let mut clock = Instant::now();
        let mut lap = || {
            let us = micros(clock.elapsed());
            clock = Instant::now();
            us
        };
        let vm = self.vm;
        // Device state first: quiescing may still write to guest memory, which the bitmap then shows.
        if let Err(e) = guest::quiesce(vm) {
            return Event::Failed(state(&e));
        }
        self.pause.breakdown.quiesce_us = lap();
        let (mut sections, epoch) = match guest::save(vm) {
            Ok(saved) => saved,
            Err(e) => return Event::Failed(state(&e)),
        };
        self.pause.breakdown.state_us = lap();
        self.pending.add_own(vm.memory());
        if let Err(e) = self.pending.add_guest(vm.memory(), vm.fd(), false) {
            return Event::Failed(internal(&e));
        }
        let dead = self.dead();
        self.pause.breakdown.bitmap_us = lap();
        let Some(connection) = &mut self.connection else { return Event::Failed(gone()) };
        self.residue.clear();
        let result = self.residue.collect(&mut self.pending, (&dead, &mut self.left_out), vm.memory(), connection);
        match result {
            Ok(sent) => {
                self.last_round = sent;
                self.skipped.add(sent.skipped);
            }
            Err(e) => return Event::Failed(Reason::new(ReasonCode::State, e.to_string())),
        }
        if self.verify {
            // Only now it is known what is left out.
            let began = Instant::now();
            if let Err(e) = guest::add_digest(vm, &self.left_out, &mut sections) {
                return Event::Failed(state(&e));
            }
            self.pause.digest = began.elapsed();
        }
        self.pause.breakdown.pages_us = lap();
        // Before the state is sent: it tells the destination that they are free.
        self.gave_images = true;
        if let Err(e) = vm.give_images() {
            return Event::Failed(state(&e));
        }
        self.pause.breakdown.disks_us = lap();
        self.sections = Some(sections);
        // A guest that held none, and has not claimed one meanwhile, has what was taken for it.
        Event::Collected(if epoch == Epoch(0) { self.taken.unwrap_or(epoch) } else { epoch })
    }

    pub(super) fn send_final(&mut self, commit: Option<Epoch>) {
        let started = Instant::now();
        let (Some(connection), Some(sections)) = (&mut self.connection, self.sections.take()) else {
            self.events.push_back(Event::FinalNotSent(gone()));
            return;
        };
        let mut payload = Vec::new();
        sections.encode(&mut payload);
        if payload.len() > STATE_MAX {
            let text = format!("{} bytes of state, at most {STATE_MAX}", payload.len());
            self.events.push_back(Event::FinalNotSent(Reason::new(ReasonCode::State, text)));
            return;
        }
        let mut rest = connection.seal(FrameType::State, &[&payload]).to_vec();
        rest.append(&mut payload);
        if let Some(epoch) = commit {
            connection.seal_message(&commit_message(epoch, self.pause.exit), &mut rest);
        }
        let before = connection.sent;
        let result = self.residue.write(self.vm.memory(), connection, &rest);
        self.residue_bytes = connection.sent - before;
        self.pause.breakdown.send_us = micros(started.elapsed());
        self.spin_until = commit.is_none().then(|| Instant::now() + SPIN);
        self.sent_final(result);
    }

    pub(super) fn send_commit(&mut self, epoch: Epoch) {
        let Some(connection) = &mut self.connection else {
            self.events.push_back(Event::FinalNotSent(gone()));
            return;
        };
        let result = connection.send(&commit_message(epoch, self.pause.exit));
        self.spin_until = None;
        self.sent_final(result);
    }

    /// COMMIT is the last frame of what was written: a write that failed did not give all of it to the kernel, and the
    /// connection is closed, so the destination can never get it whole.
    fn sent_final(&mut self, result: std::result::Result<(), ConnectionError>) {
        if let Err(e) = result {
            self.connection = None;
            self.events.push_back(Event::FinalNotSent(disconnected(&e)));
        }
    }

    /// Puts together what both sides measured.
    pub(super) fn measured(&mut self, entered: &Stamp, steps: &[u64; 4]) {
        let Some(exit) = self.pause.exit else { return };
        let blackout = entered.since(&exit) / 1000;
        let b = &mut self.pause.breakdown;
        [b.apply_us, b.load_us, b.cas_us, b.run_us] = steps.map(|ns| ns / 1000);
        let known = b.pause_us + b.quiesce_us + b.state_us + b.bitmap_us + b.pages_us + b.disks_us + b.send_us;
        b.transfer_us = blackout.saturating_sub(known + b.apply_us + b.load_us + b.cas_us + b.run_us);
        let (lull, breakdown) = (self.pause.lull.clone(), b.clone());
        let (pages, bytes) = (self.last_round.pages(), self.residue_bytes);
        let (skipped, all) = (self.last_round.skipped, self.skipped);
        let sent = self.connection.as_ref().map(|c| c.sent);
        self.job.update(|s| {
            s.blackout_us = Some(blackout);
            s.lull = lull;
            s.breakdown = Some(breakdown);
            s.residue_pages = pages;
            s.bytes = sent.unwrap_or(s.bytes);
            s.residue_bytes = bytes;
            s.residue_posted_pages = skipped.posted;
            s.residue_free_pages = skipped.free;
            s.posted_pages = all.posted;
            s.free_pages = all.free;
        });
    }
}

fn commit_message(epoch: Epoch, exit: Option<Stamp>) -> Message {
    Message::Commit { epoch, paused: exit.unwrap_or_default() }
}
