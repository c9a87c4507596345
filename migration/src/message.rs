//! Control messages: their values and their bytes.
//!
//! Always true: [`Message::parse`] of [`Message::encode`] gives the same value; texts and lists have the bounds below.
//! The bulk frames have modules of their own: PAGES ([`crate::pages`]), STATE ([`crate::section`]); FRAMES is [`Frames`].
mod frames;
mod reason;

use crate::Error;
use crate::ownership::{Epoch, OwnerId};
use crate::ticket::TICKET_MAX;
use crate::wire::{FrameType, Reader, put_blob};
pub use frames::{Frames, NET_FRAME_MAX, NET_FRAMES_MAX};
pub use reason::{Reason, ReasonCode, TEXT_MAX};

/// Oldest protocol version this build speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest protocol version this build speaks.
pub const VERSION_MAX: u16 = 1;
/// Longest machine configuration, in bytes.
pub const CONFIG_MAX: usize = 64 << 10;
/// Most CPUID leaves in a description.
pub const CPU_LEAVES_MAX: usize = 256;
/// Feature bits of HELLO; a bit unknown to the destination in `required` is refused.
pub mod feature {
    /// SWITCHED and OPENED are understood: the guest's frames keep their order.
    pub const ORDER: u64 = 1 << 0;
    /// Pages may be skipped ([`crate::pages::RunKind::Skipped`]): those whose content the guest has no use for.
    pub const SKIP: u64 = 1 << 1;
    /// HELLO carries a ticket ([`crate::ticket`]). Only ever required: who does not know it cannot read that HELLO's end.
    pub const TICKET: u64 = 1 << 8;
    /// Features this build offers.
    pub const OFFERED: u64 = ORDER | SKIP;
    /// Features this build has.
    pub const KNOWN: u64 = OFFERED | TICKET;
}

/// One instant on the clocks of one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Identity of the host's boot: two stamps with the same one can be compared by `mono_ns`.
    pub boot: [u8; 16],
    /// CLOCK_MONOTONIC in nanoseconds.
    pub mono_ns: u64,
    /// CLOCK_REALTIME in nanoseconds since 1970.
    pub real_ns: u64,
}

impl Stamp {
    /// Nanoseconds from `earlier` to this one: by the monotonic clock on one host, else by the real-time
    /// clocks; never negative.
    pub fn since(&self, earlier: &Stamp) -> u64 {
        if self.boot == earlier.boot {
            self.mono_ns.saturating_sub(earlier.mono_ns)
        } else {
            self.real_ns.saturating_sub(earlier.real_ns)
        }
    }
}

/// How it is decided which copy runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Ownership {
    /// By compare-and-swap at an arbiter both sides can reach.
    Arbiter = 1,
    /// By COMMIT on this connection: a source that loses the connection between COMMIT and RUNNING cannot
    /// know who runs, and stays paused.
    Stream = 2,
}

/// First message of the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// Oldest version spoken.
    pub min_version: u16,
    /// Newest version spoken.
    pub max_version: u16,
    /// Features without which the source will not port.
    pub required: u64,
    /// Features the source could use.
    pub offered: u64,
    /// Identity of this attempt (random).
    pub port: [u64; 2],
    /// Which VM; 0: none.
    pub vm_id: u64,
    /// The process that runs the VM.
    pub owner: OwnerId,
    /// Who decides.
    pub ownership: Ownership,
    /// Epoch of the VM as its guest sees it.
    pub epoch: Epoch,
    /// Guest memory in bytes, so that a destination can refuse it at once.
    pub memory_size: u64,
    /// The ticket, signed; empty without [`feature::TICKET`] in `required`.
    pub ticket: Vec<u8>,
}

impl Hello {
    /// This HELLO with a ticket.
    pub fn with_ticket(self, ticket: Vec<u8>) -> Hello {
        Hello { required: self.required | feature::TICKET, ticket, ..self }
    }
}

/// One CPUID leaf as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CpuLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// KVM's flags of the entry.
    pub flags: u32,
    /// EAX, EBX, ECX, EDX on return.
    pub registers: [u32; 4],
}

/// What the VM is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Description {
    /// Guest memory in bytes, from guest-physical 0.
    pub memory_size: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Frequency of the time stamp counter the guest reads.
    pub tsc_khz: u32,
    /// CPUID as the guest sees it.
    pub cpu: Vec<CpuLeaf>,
    /// Machine configuration (devices and their ids) in the VMM's own format.
    pub config: Vec<u8>,
}

/// Control messages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// See [`FrameType::Hello`].
    Hello(Hello),
    /// Version and features both sides use from now on.
    Welcome {
        /// Version.
        version: u16,
        /// Features.
        features: u64,
    },
    /// The VM is not taken. Nothing was allocated for it, or it has been freed.
    Refuse(Reason),
    /// See [`Description`].
    Describe(Description),
    /// All that can fail or allocate is done.
    Ready {
        /// The process that will run the VM.
        owner: OwnerId,
        /// Epoch of the ownership record as the destination read it (0 without an arbiter).
        epoch: Epoch,
    },
    /// A pre-copy round ends here.
    Round {
        /// Number, from 0.
        round: u32,
        /// Raw and zero pages sent in it; skipped ones do not count.
        pages: u64,
    },
    /// Everything up to this round is in the destination's memory.
    RoundDone {
        /// Number.
        round: u32,
    },
    /// The guest stands still; state and residue follow at once.
    Pausing,
    /// The state is loaded; only with [`Ownership::Stream`].
    Loaded,
    /// Everything has been sent; the destination may run (with an arbiter: may compete).
    Commit {
        /// Epoch at the pause: what the destination competes with.
        epoch: Epoch,
        /// Last exit of the last vCPU.
        paused: Stamp,
    },
    /// The VM runs at the destination.
    Running {
        /// Epoch it runs with.
        epoch: Epoch,
        /// First entry of the first vCPU.
        entered: Stamp,
        /// Nanoseconds the destination spent on: applying the residue, loading state, the compare-and-swap, starting.
        steps: [u64; 4],
    },
    /// The destination does not run and never will.
    Aborted {
        /// Why.
        reason: Reason,
        /// Epoch the source has to compete with: the next one if the destination had won before it failed.
        epoch: Epoch,
    },
    /// The port is off: the source runs.
    Cancel(Reason),
    /// Nothing more will be forwarded.
    Done {
        /// Network frames forwarded in all.
        frames: u64,
    },
    /// The destination's announcement has reached this device's tap at the source: all that came before it has been
    /// forwarded, and what comes now goes to the destination. Only with [`feature::ORDER`].
    Switched {
        /// Index of the network device.
        device: u32,
    },
    /// The guest gets frames from the destination's taps. Only with [`feature::ORDER`].
    Opened {
        /// Devices opened because SWITCHED came.
        switched: u32,
        /// Devices opened because it did not come in time.
        late: u32,
        /// Nanoseconds from the announcement until the last was opened.
        waited_ns: u64,
    },
}

impl Message {
    /// Type of the frame that carries it.
    pub fn frame_type(&self) -> FrameType {
        match self {
            Message::Hello(_) => FrameType::Hello,
            Message::Welcome { .. } => FrameType::Welcome,
            Message::Refuse(_) => FrameType::Refuse,
            Message::Describe(_) => FrameType::Describe,
            Message::Ready { .. } => FrameType::Ready,
            Message::Round { .. } => FrameType::Round,
            Message::RoundDone { .. } => FrameType::RoundDone,
            Message::Pausing => FrameType::Pausing,
            Message::Loaded => FrameType::Loaded,
            Message::Commit { .. } => FrameType::Commit,
            Message::Running { .. } => FrameType::Running,
            Message::Aborted { .. } => FrameType::Aborted,
            Message::Cancel(_) => FrameType::Cancel,
            Message::Done { .. } => FrameType::Done,
            Message::Switched { .. } => FrameType::Switched,
            Message::Opened { .. } => FrameType::Opened,
        }
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Message::Hello(h) => {
                put(out, &[&h.min_version.to_le_bytes(), &h.max_version.to_le_bytes()]);
                put(out, &[&(h.ownership as u8).to_le_bytes(), &[0; 3]]);
                put_u64s(out, &[h.required, h.offered, h.port[0], h.port[1], h.vm_id]);
                put_u64s(out, &[h.owner.0[0], h.owner.0[1], h.epoch.0, h.memory_size]);
                if h.required & feature::TICKET != 0 {
                    put_blob(out, &h.ticket);
                }
            }
            Message::Welcome { version, features } => {
                put(out, &[&version.to_le_bytes(), &[0; 6], &features.to_le_bytes()]);
            }
            Message::Refuse(reason) | Message::Cancel(reason) => reason.put(out),
            Message::Describe(d) => {
                put_u64s(out, &[d.memory_size]);
                put_u32s(out, &[d.vcpus, d.tsc_khz, d.cpu.len() as u32]);
                for leaf in &d.cpu {
                    put_u32s(out, &[leaf.function, leaf.index, leaf.flags]);
                    put_u32s(out, &leaf.registers);
                }
                put_blob(out, &d.config);
            }
            Message::Ready { owner, epoch } => put_u64s(out, &[owner.0[0], owner.0[1], epoch.0]),
            Message::Round { round, pages } => {
                put_u32s(out, &[*round, 0]);
                put_u64s(out, &[*pages]);
            }
            Message::RoundDone { round } => put_u32s(out, &[*round, 0]),
            Message::Pausing | Message::Loaded => {}
            Message::Commit { epoch, paused } => {
                put_u64s(out, &[epoch.0]);
                put_stamp(out, paused);
            }
            Message::Running { epoch, entered, steps } => {
                put_u64s(out, &[epoch.0]);
                put_stamp(out, entered);
                put_u64s(out, steps);
            }
            Message::Aborted { reason, epoch } => {
                put_u64s(out, &[epoch.0]);
                reason.put(out);
            }
            Message::Done { frames } => put_u64s(out, &[*frames]),
            Message::Switched { device } => put_u32s(out, &[*device, 0]),
            Message::Opened { switched, late, waited_ns } => {
                put_u32s(out, &[*switched, *late]);
                put_u64s(out, &[*waited_ns]);
            }
        }
    }

    /// Reads the payload of a control frame.
    pub fn parse(frame_type: FrameType, payload: &[u8]) -> Result<Message, Error> {
        let mut r = Reader::new(frame_type.name(), payload);
        let message = match frame_type {
            FrameType::Hello => {
                let (min_version, max_version) = (r.u16()?, r.u16()?);
                let ownership = match r.u8()? {
                    1 => Ownership::Arbiter,
                    2 => Ownership::Stream,
                    value => return Err(Error::Value { what: "ownership", value: u64::from(value) }),
                };
                zero(&r.array::<3>()?, "HELLO")?;
                let mut hello = Hello {
                    min_version,
                    max_version,
                    ownership,
                    required: r.u64()?,
                    offered: r.u64()?,
                    port: [r.u64()?, r.u64()?],
                    vm_id: r.u64()?,
                    owner: OwnerId([r.u64()?, r.u64()?]),
                    epoch: Epoch(r.u64()?),
                    memory_size: r.u64()?,
                    ticket: Vec::new(),
                };
                if hello.required & feature::TICKET != 0 {
                    hello.ticket = r.blob(TICKET_MAX, "ticket")?.to_vec();
                }
                Message::Hello(hello)
            }
            FrameType::Welcome => {
                let version = r.u16()?;
                zero(&r.array::<6>()?, "WELCOME")?;
                Message::Welcome { version, features: r.u64()? }
            }
            FrameType::Refuse => Message::Refuse(Reason::read(&mut r)?),
            FrameType::Describe => {
                let memory_size = r.u64()?;
                let (vcpus, tsc_khz) = (r.u32()?, r.u32()?);
                let leaves = r.count(CPU_LEAVES_MAX, "CPUID leaves")?;
                let mut cpu = Vec::with_capacity(leaves);
                for _ in 0..leaves {
                    cpu.push(CpuLeaf {
                        function: r.u32()?,
                        index: r.u32()?,
                        flags: r.u32()?,
                        registers: [r.u32()?, r.u32()?, r.u32()?, r.u32()?],
                    });
                }
                let config = r.blob(CONFIG_MAX, "machine configuration")?.to_vec();
                Message::Describe(Description { memory_size, vcpus, tsc_khz, cpu, config })
            }
            FrameType::Ready => Message::Ready { owner: OwnerId([r.u64()?, r.u64()?]), epoch: Epoch(r.u64()?) },
            FrameType::Round => {
                let round = r.u32()?;
                zero(&r.array::<4>()?, "ROUND")?;
                Message::Round { round, pages: r.u64()? }
            }
            FrameType::RoundDone => {
                let round = r.u32()?;
                zero(&r.array::<4>()?, "ROUND_DONE")?;
                Message::RoundDone { round }
            }
            FrameType::Pausing => Message::Pausing,
            FrameType::Loaded => Message::Loaded,
            FrameType::Commit => Message::Commit { epoch: Epoch(r.u64()?), paused: stamp(&mut r)? },
            FrameType::Running => Message::Running {
                epoch: Epoch(r.u64()?),
                entered: stamp(&mut r)?,
                steps: [r.u64()?, r.u64()?, r.u64()?, r.u64()?],
            },
            FrameType::Aborted => Message::Aborted { epoch: Epoch(r.u64()?), reason: Reason::read(&mut r)? },
            FrameType::Cancel => Message::Cancel(Reason::read(&mut r)?),
            FrameType::Done => Message::Done { frames: r.u64()? },
            FrameType::Switched => {
                let device = r.u32()?;
                zero(&r.array::<4>()?, "SWITCHED")?;
                Message::Switched { device }
            }
            FrameType::Opened => Message::Opened { switched: r.u32()?, late: r.u32()?, waited_ns: r.u64()? },
            FrameType::Pages | FrameType::State | FrameType::Frames => {
                return Err(Error::Value { what: "type of a control frame", value: frame_type as u64 });
            }
        };
        r.finish()?;
        Ok(message)
    }
}

fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn put_u32s(out: &mut Vec<u8>, values: &[u32]) {
    for value in values {
        out.extend_from_slice(&value.to_le_bytes());
    }
}

fn put_u64s(out: &mut Vec<u8>, values: &[u64]) {
    for value in values {
        out.extend_from_slice(&value.to_le_bytes());
    }
}

fn put_stamp(out: &mut Vec<u8>, stamp: &Stamp) {
    out.extend_from_slice(&stamp.boot);
    put_u64s(out, &[stamp.mono_ns, stamp.real_ns]);
}

fn stamp(r: &mut Reader<'_>) -> Result<Stamp, Error> {
    Ok(Stamp { boot: r.array()?, mono_ns: r.u64()?, real_ns: r.u64()? })
}

fn zero(bytes: &[u8], what: &'static str) -> Result<(), Error> {
    if bytes.iter().all(|b| *b == 0) { Ok(()) } else { Err(Error::Reserved(what)) }
}

#[cfg(test)]
mod tests;
