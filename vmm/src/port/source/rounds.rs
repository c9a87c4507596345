//! Memory on its way while the guest runs: the rounds, what is dirty after each, and the guest's throttle.

use std::time::Instant;

use migration::convergence::RoundStats;
use migration::message::Message;
use migration::source::Event;

use super::{Driver, FIXED_NS, internal, micros, reset};
use crate::port::connection::ConnectionError;
use crate::port::dead::Dead;
use crate::port::guest;
use crate::port::job::RoundReport;
use crate::port::transfer::{SendError, Sent};
use crate::vm::Throttle;

impl Driver<'_> {
    pub(super) fn send_round(&mut self, round: u32) -> std::result::Result<(), Event> {
        self.round_started = Instant::now();
        let before = self.connection.as_ref().map_or(0, |c| c.sent);
        let Some(sent) = self.send_pages(round > 0)? else { return Ok(()) };
        self.send(&Message::Round { round, pages: sent.pages() });
        // However long that took: memory may be large and the connection slow. What is limited is the wait for the answer.
        self.phase_since = Instant::now();
        self.last_round = sent;
        let bytes = self.connection.as_ref().map_or(before, |c| c.sent);
        self.round_bytes = bytes - before;
        self.job.update(|s| {
            s.bytes = bytes;
            s.round = round;
        });
        Ok(())
    }

    /// Sends what the log says, or (not `logged`: the first time) what is pending and what the guest has no use for. `None`: the connection is
    /// gone; its next poll says so, behind what the destination had said.
    pub(super) fn send_pages(&mut self, logged: bool) -> std::result::Result<Option<Sent>, Event> {
        let (vm, job) = (self.vm, self.job);
        if logged {
            self.pending.add_own(vm.memory());
            self.pending.add_guest(vm.memory(), vm.fd(), true).map_err(|e| Event::Failed(internal(&e)))?;
        }
        let dead = self.dead();
        if !logged {
            // Those that have never been sent count as well: the destination has nothing of them.
            self.pending.add(dead.words());
        }
        let Some(connection) = &mut self.connection else { return Ok(None) };
        let stop = || job.cancelled() || vm.is_to_be_reset();
        let result = self.writer.send(&mut self.pending, (&dead, &mut self.left_out), vm.memory(), connection, &stop);
        let sent = match result {
            Ok(sent) => sent,
            Err(SendError::Memory(e)) => return Err(Event::Failed(internal(&e))),
            Err(SendError::Connection(ConnectionError::Stopped)) => {
                // A frame may be half written: this connection can say nothing more.
                self.connection = None;
                return Err(if vm.is_to_be_reset() { Event::Failed(reset()) } else { Event::Cancel });
            }
            Err(SendError::Connection(_)) => return Ok(None),
        };
        self.skipped.add(sent.skipped);
        Ok(Some(sent))
    }

    /// The guest writes more than the connection takes: it gets less of its time.
    pub(super) fn slow_down(&mut self, percent: u8) {
        match &self.throttle {
            Some(throttle) => throttle.set(percent),
            None => match Throttle::begin(self.vm, percent) {
                Ok(throttle) => self.throttle = Some(throttle),
                Err(e) => return self.events.push_back(Event::Failed(internal(&e))),
            },
        }
        log::info!("port {}: the guest is held for {percent} % of its time", self.job.id);
        self.job.update(|s| s.throttle_percent = percent);
    }

    pub(super) fn measure(&mut self) -> Event {
        let elapsed = self.round_started.elapsed();
        if let Err(e) = guest::flush_disks(self.vm) {
            return Event::Failed(internal(&e));
        }
        let (vm, skip) = (self.vm, self.skips());
        let dead = || if skip { Dead::look(vm) } else { Dead::none() };
        let dirty_pages = match self.pending.outlook(vm.memory(), vm.fd(), dead) {
            Ok(pages) => pages,
            Err(e) => return Event::Failed(internal(&e)),
        };
        let sent = self.last_round;
        self.job.update(|s| {
            s.rounds.push(RoundReport {
                raw_pages: sent.raw,
                zero_pages: sent.zero,
                posted_pages: sent.skipped.posted,
                free_pages: sent.skipped.free,
                elapsed_us: micros(elapsed),
                dirty_pages,
            });
        });
        Event::Measured(RoundStats {
            sent_bytes: self.round_bytes,
            elapsed_ns: elapsed.as_nanos() as u64,
            dirty_pages,
            fixed_ns: FIXED_NS,
            ..RoundStats::default()
        })
    }
}
