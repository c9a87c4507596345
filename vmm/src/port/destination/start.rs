//! From the decision that the VM is this side's to its first entry, and what the network hears of it: frames that were kept, the
//! announcements, the taps that wait for what the source forwards.

use std::time::{Duration, Instant};

use migration::destination::{Event, Phase};
use migration::message::{Message, Reason, ReasonCode, feature};
use migration::ownership::Epoch;

use super::Driver;
use crate::port::announce::REPEAT_MS;
use crate::port::order::Gate;
use crate::port::{guest, stamp};

/// How long the guest's first entry is waited for before its addresses are announced all the same.
const ENTRY_MAX: Duration = Duration::from_millis(1);
/// How long the vCPUs stay urgent, from the order to run: until the guest has answered what waited for it.
pub(super) const START: Duration = Duration::from_millis(3);

impl Driver<'_> {
    pub(super) fn start(&mut self, epoch: Option<Epoch>) {
        let Some(shell) = &self.shell else { return };
        let vm = shell.vm.clone();
        self.run_at = Some(Instant::now());
        // What is in the taps now came by flooding, and to the source before the announcement can.
        guest::discard_frames(&shell.vm);
        let ordered = self.machine.features() & feature::ORDER != 0;
        if ordered {
            guest::hold_taps(&shell.vm);
        }
        for frame in self.frames.drain(..) {
            guest::inject(&shell.vm, &frame);
        }
        if let Err(e) = guest::start(shell, epoch) {
            // The VM is ours and cannot run: that is a crash of the VM, as any other error of KVM.
            log::error!("the VM that arrived cannot run: {e}");
            shell.vm.stop();
        }
        self.gate = Some(Gate::new(guest::nets(&vm), Instant::now(), ordered));
        self.arrival.runs(&vm);
    }

    /// Opens the taps that have waited long enough; tells the source when all are open.
    pub(super) fn gate(&mut self, quiet: bool) {
        let (Some(shell), Some(gate)) = (&self.shell, &mut self.gate) else { return };
        for device in gate.overdue(Instant::now(), self.connection.is_none(), quiet) {
            guest::open_tap(&shell.vm, device, |frame| gate.is_new(device, frame));
        }
        if self.machine.phase() == Phase::Running
            && !self.told
            && let Some(opened) = gate.result()
        {
            self.told = true;
            log::debug!("{opened:?}");
            self.events.push_back(Event::Opened(Message::Opened {
                switched: opened.switched,
                late: opened.late,
                waited_ns: opened.waited.as_nanos() as u64,
            }));
        }
    }

    /// All that came to the source before the announcement has been injected.
    pub(super) fn switched(&mut self, device: u32) {
        let (Some(shell), Some(gate)) = (&self.shell, &mut self.gate) else { return };
        if gate.switch(device, Instant::now()) {
            guest::open_tap(&shell.vm, device, |frame| gate.is_new(device, frame));
        }
    }

    /// Sends the announcements that are due. The first waits for the guest's entry, if that comes soon: passing a frame on would take its
    /// processor.
    pub(super) fn announce(&mut self) {
        let (Some(at), Some(shell)) = (self.run_at, &self.shell) else { return };
        if self.machine.phase() == Phase::Starting && at.elapsed() < ENTRY_MAX {
            return;
        }
        while let Some(due) = REPEAT_MS.get(self.announced)
            && at.elapsed() >= Duration::from_millis(*due)
        {
            guest::announce(&shell.vm);
            self.announced += 1;
        }
    }

    /// When something is to be done next, from the order to run on.
    pub(super) fn next_due(&self) -> Duration {
        let announcement = REPEAT_MS.get(self.announced).map_or(Duration::MAX, |due| Duration::from_millis(*due));
        if self.urgent.is_empty() { announcement } else { announcement.min(START) }
    }

    /// The guest has had its start: from now on it is one among others.
    pub(super) fn settle(&mut self) {
        if self.run_at.is_some_and(|at| at.elapsed() >= START) {
            self.urgent.clear();
        }
    }

    pub(super) fn entered(&mut self) {
        let Some(shell) = &self.shell else { return };
        if let Some(entered) = guest::entered(&shell.vm) {
            let run = self.run_at.map_or(Duration::ZERO, |at| at.elapsed());
            let late = stamp::now().since(&entered);
            let steps = [self.applied, self.load_took, self.cas_took, run].map(|d| d.as_nanos() as u64);
            let steps = [steps[0], steps[1], steps[2], steps[3].saturating_sub(late)];
            let epoch = Epoch(guest::epoch(&shell.vm));
            self.progress.lock().blackout_us = self.paused.map(|p| entered.since(&p) / 1000);
            self.events.push_back(Event::Entered(Message::Running { epoch, entered, steps }));
        } else if shell.vm.end().is_some() {
            // It ended before its first entry; the source must not wait for it.
            self.connection = None;
            let running = Message::Running { epoch: Epoch(0), entered: stamp::now(), steps: [0; 4] };
            self.events.push_back(Event::Disconnected(Reason::new(ReasonCode::Internal, "the VM ended")));
            self.events.push_back(Event::Entered(running));
        }
    }
}
