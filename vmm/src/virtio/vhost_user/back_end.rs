//! The process that works a device's queues: what it is told, asked, and given.
//!
//! Owns the connection, the doorbells and the interrupts. Always true: the back end works queues only between
//! [`BackEnd::start`] and [`BackEnd::take_back`], which returns when nothing it has begun is under way any more. One that does
//! not let go, or does not answer, is cut off.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::rings::{Ring, Running, regions, vring};
use super::watch::Watch;
use crate::error::{Error, Result, host};
use crate::memory::Memory;
use crate::virtio::Work;
use crate::virtio::queue::{QueueError, VirtQueue};

/// A back end has this long for an answer, and to complete what it has begun when its queues are taken back.
pub const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Time between looks at whether it has.
const SETTLE_PAUSE: Duration = Duration::from_micros(500);

/// VHOST_USER_F_PROTOCOL_FEATURES.
const F_PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What a kind of device needs of its back end.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// Protocol features without which the device cannot be; MQ and REPLY_ACK are used where offered.
    pub protocol: VhostUserProtocolFeatures,
    /// Whether it uses every buffer sooner or later, whatever happens outside: then that is waited for.
    pub completes: bool,
}

/// A connection that lives, or did until a moment ago.
struct Link {
    frontend: Frontend,
    watch: Watch,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    queues: usize,
}

/// The process that works a device's queues.
pub struct BackEnd {
    path: PathBuf,
    needs: Needs,
    link: Option<Link>,
    /// Readable when the connection has ended.
    ended: EventFd,
    /// Rung by the guest, heard by the back end.
    doorbells: Vec<EventFd>,
    /// Rung by the back end when the driver is to be interrupted.
    calls: Vec<EventFd>,
    /// Where the driver stood when the back end was last rung by the monitor.
    seen: Vec<Option<u16>>,
    running: Option<Running>,
}

impl BackEnd {
    /// Connects, for a device of `queues` queues.
    pub fn connect(path: &Path, queues: usize, needs: Needs) -> Result<BackEnd> {
        let eventfd = || EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"));
        let mut back_end = BackEnd {
            path: path.to_owned(),
            needs,
            link: None,
            ended: eventfd()?,
            doorbells: Vec::new(),
            calls: (0..queues).map(|_| eventfd()).collect::<Result<_>>()?,
            seen: vec![None; queues],
            running: None,
        };
        back_end.reconnect()?;
        Ok(back_end)
    }

    fn what(&self) -> String {
        format!("vhost-user back end {}", self.path.display())
    }

    fn failed(&self, call: &str, e: impl std::fmt::Display) -> Error {
        Error::Conflict(format!("{}: {call}: {e}", self.what()))
    }

    /// Connects if there is no connection.
    pub fn reconnect(&mut self) -> Result<()> {
        if self.is_connected() {
            return Ok(());
        }
        self.link = None;
        let what = self.what();
        let stream = UnixStream::connect(&self.path).map_err(host(&what))?;
        let watch =
            Watch::start(stream.try_clone().map_err(host(&what))?, self.ended.try_clone().map_err(host(&what))?)?;
        let queues = self.calls.len();
        let mut frontend = Frontend::from_stream(stream, queues as u64);
        let asked = watch.during(|| {
            frontend.set_owner()?;
            let features = frontend.get_features()?;
            let mut protocol = VhostUserProtocolFeatures::empty();
            let mut most = queues;
            if features & F_PROTOCOL != 0 {
                let use_if_there = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
                protocol = frontend.get_protocol_features()? & (self.needs.protocol | use_if_there);
                frontend.set_protocol_features(protocol)?;
                if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
                }
                if protocol.contains(VhostUserProtocolFeatures::MQ) {
                    most = frontend.get_queue_num()? as usize;
                }
            }
            Ok::<_, vhost::Error>((features, protocol, most))
        });
        let (features, protocol, most) = asked.map_err(|e| self.failed("set-up", e))?;
        let wanted = self.needs.protocol;
        if !protocol.contains(wanted) {
            return Err(self.failed("set-up", format!("it lacks {:?}", wanted - protocol)));
        }
        if most < queues {
            return Err(self.failed("set-up", format!("it has {most} queues, {queues} are configured")));
        }
        self.link = Some(Link { frontend, watch, features, protocol, queues });
        Ok(())
    }

    /// The virtio features it offers; none without a connection.
    pub fn features(&self) -> u64 {
        self.link.as_ref().map_or(0, |l| l.features & !F_PROTOCOL)
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.link.as_ref().is_some_and(|l| !l.watch.has_ended())
    }

    /// Whether it works the queues.
    pub fn is_started(&self) -> bool {
        self.running.is_some()
    }

    fn ask<T>(&mut self, call: &str, f: impl FnOnce(&mut Frontend) -> vhost::Result<T>) -> Result<T> {
        let Some(link) = &mut self.link else {
            return Err(Error::Conflict(format!("{}: it is gone", self.what())));
        };
        let frontend = &mut link.frontend;
        link.watch.during(|| f(frontend)).map_err(|e| self.failed(call, e))
    }

    /// The device's configuration space.
    pub fn read_config(&mut self, len: usize) -> Result<Vec<u8>> {
        let zeros = vec![0; len];
        let flags = VhostUserConfigFlags::empty();
        self.ask("get configuration", |f| f.get_config(0, len as u32, flags, &zeros)).map(|(_, bytes)| bytes)
    }

    /// Writes to the device's configuration space.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.ask("set configuration", |f| f.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes))
    }

    /// Keeps the doorbells: what [`crate::virtio::Device::take_doorbells`] gets.
    pub fn take_doorbells(&mut self, doorbells: &[EventFd]) -> Result<()> {
        self.doorbells =
            doorbells.iter().map(EventFd::try_clone).collect::<std::io::Result<_>>().map_err(host("eventfd"))?;
        Ok(())
    }

    /// What the device must wait for.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.calls.iter().chain([&self.ended]).map(AsRawFd::as_raw_fd).collect()
    }

    /// Gives it memory and queues; it works them from now on. Guest memory must be shared.
    pub fn start(&mut self, features: u64, work: &mut Work<'_>) -> Result<()> {
        let regions = regions(work.memory)?;
        let vrings = work.queues.iter().enumerate().filter(|(_, q)| q.ready());
        let vrings =
            vrings.map(|(n, q)| Ok((n, q.save(), vring(work.memory, &q.save())?))).collect::<Result<Vec<_>>>()?;
        let rings = vrings.iter().map(|(n, q, _)| Ring::of(*n, q)).collect();
        let Some(link) = &self.link else { return Err(Error::Conflict(format!("{}: it is gone", self.what()))) };
        let with_protocol = link.features & F_PROTOCOL;
        let (calls, doorbells) = (std::mem::take(&mut self.calls), std::mem::take(&mut self.doorbells));
        let result = self.ask("start", |f| {
            f.set_features(features | with_protocol)?;
            f.set_mem_table(&regions)?;
            for (n, queue, vring) in &vrings {
                f.set_vring_num(*n, queue.size)?;
                f.set_vring_addr(*n, vring)?;
                f.set_vring_base(*n, queue.next_avail)?;
                f.set_vring_call(*n, &calls[*n])?;
                f.set_vring_kick(*n, &doorbells[*n])?;
            }
            if with_protocol != 0 {
                for (n, ..) in &vrings {
                    f.set_vring_enable(*n, true)?;
                }
            }
            Ok(())
        });
        (self.calls, self.doorbells) = (calls, doorbells);
        if result.is_err() {
            // Some of the queues it may work already.
            self.link = None;
        }
        result?;
        self.running = Some(Running { memory: work.memory.clone(), rings });
        self.seen.fill(None);
        self.ring(work);
        Ok(())
    }

    /// Takes the queues back: it works none any more, has completed all it had begun, and has forgotten doorbells and
    /// interrupts. Gives how many buffers of which queue it has taken. One that does not let go is cut off.
    pub fn take_back(&mut self) -> Result<Vec<(usize, u16)>> {
        let Some(running) = self.running.take() else { return Ok(Vec::new()) };
        let result = self.let_go(&running);
        if result.is_err() {
            self.link = None;
        }
        result
    }

    fn let_go(&mut self, running: &Running) -> Result<Vec<(usize, u16)>> {
        let Running { memory, rings } = running;
        if self.needs.completes {
            // QEMU's back end answers at once while requests are in flight, and breaks down when the first of them is
            // complete and its interrupt gone (seen with 7.2). So it is not asked before there are none.
            rings.iter().for_each(|ring| drop(self.doorbells[ring.queue].write(1)));
            self.wait(|| !rings.iter().any(|ring| ring.has_work(memory)))?;
        }
        let mut bases = Vec::new();
        for ring in rings {
            // An index of 16 bits in this kind of ring.
            let base = self.ask("stop", |f| f.get_vring_base(ring.queue))? as u16;
            bases.push((ring.queue, base));
        }
        // Now it takes nothing more, but may still write to what it had taken.
        self.wait(|| rings.iter().zip(&bases).all(|(ring, (_, base))| ring.is_settled(*base, memory)))?;
        Ok(bases)
    }

    /// Waits for the back end to complete what it has begun.
    fn wait(&self, is_complete: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + ANSWER_TIME;
        while !is_complete() {
            if !self.is_connected() || Instant::now() >= deadline {
                return Err(self.failed("stop", "it does not complete what it has begun"));
            }
            std::thread::sleep(SETTLE_PAUSE);
        }
        Ok(())
    }

    /// [`BackEnd::take_back`]; the queues then stand as the back end left them.
    pub fn stop(&mut self, queues: &mut [VirtQueue], memory: &Memory) -> Result<()> {
        for (n, base) in self.take_back()? {
            queues[n].moved_elsewhere(memory, base).map_err(|e| self.failed("stop", e))?;
        }
        Ok(())
    }

    /// Rings for what the driver has added without ringing itself (before it parked).
    pub fn ring(&mut self, work: &Work<'_>) {
        if !self.is_started() {
            return;
        }
        for ((queue, seen), doorbell) in work.queues.iter().zip(&mut self.seen).zip(&self.doorbells) {
            let at = queue.avail_index(work.memory);
            if at.is_some() && at != *seen {
                *seen = at;
                let _ = doorbell.write(1);
            }
        }
    }

    /// The guest has parked: the back end is to ring for the next thing it uses, whatever the driver has asked for. The
    /// driver has looked at its ring before, but the back end may have used something since and have told nobody.
    pub fn awaited(&self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        if self.is_started() {
            work.queues.iter_mut().try_for_each(|q| q.awaited_elsewhere(work.memory))?;
        }
        Ok(())
    }

    /// Looks at the descriptors: marks queues in which something was used. An error is the end of the connection, if queues
    /// were worked over it.
    pub fn look(&mut self, queues: &mut [VirtQueue]) -> Result<()> {
        for (call, queue) in self.calls.iter().zip(queues) {
            if call.read().is_ok() {
                queue.used_elsewhere();
            }
        }
        if self.ended.read().is_ok() && self.link.as_ref().is_some_and(|l| l.watch.has_ended()) {
            self.link = None;
            if self.running.take().is_some() {
                return Err(self.failed("connection", "it was closed by the other side, or an answer took too long"));
            }
        }
        Ok(())
    }

    /// For messages: features of the protocol, number of queues.
    pub fn description(&self) -> String {
        self.link.as_ref().map_or_else(
            || "not connected".to_owned(),
            |l| format!("features {:#x}, protocol {:?}, {} queues", l.features, l.protocol, l.queues),
        )
    }
}
