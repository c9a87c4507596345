//! What a peer sends during a port: frames, control messages, state sections, network frames, pages.
//!
//! Asserted: what is parsed says the same after it was encoded again; both state machines take any message at any time; pages
//! end up in guest memory or are refused.

use migration::destination::{self, Destination};
use migration::message::{CpuLeaf, Description, Frames, Hello, Message, Ownership, Reason, ReasonCode, Stamp, feature};
use migration::ownership::{Epoch, OwnerId};
use migration::pages::{Pages, RunKind, Table};
use migration::section::{Section, Sections};
use migration::wire::{FrameType, HEADER_LEN, Receiver, Sender};
use vmm::memory::{HUGE_PAGE, Memory};
use vmm::port::transfer;

use crate::Target;
use crate::input::Input;

/// A stream of frames, headers and all.
pub const FRAME: Target = Target { name: "wire_frame", run: frames, seeds: frame_seeds, memory: 8 << 20, rounds: 4000 };
/// A payload of any type; and a conversation, with what it makes a destination do.
pub const MESSAGE: Target =
    Target { name: "wire_message", run: messages, seeds: message_seeds, memory: 4 << 20, rounds: 4000 };
/// A PAGES payload, applied to guest memory.
pub const PAGES: Target = Target { name: "wire_pages", run: pages, seeds: page_seeds, memory: 4 << 20, rounds: 500 };

fn frames(input: &[u8]) {
    let mut receiver = Receiver::new();
    let mut rest = input;
    while let Some((header, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let Ok(header) = receiver.header(header) else { return };
        assert!(header.length <= header.frame_type.max_length());
        let Some((payload, after)) = after.split_at_checked(header.length) else { return };
        if header.verify(payload).is_err() {
            return;
        }
        payload_of(header.frame_type, payload);
        rest = after;
    }
}

/// Reads a payload by its type; gives the message, if it is one.
fn payload_of(frame_type: FrameType, payload: &[u8]) -> Option<Message> {
    match frame_type {
        FrameType::State => {
            let sections = Sections::parse(payload).ok()?;
            let mut again = Vec::new();
            sections.encode(&mut again);
            assert_eq!(Sections::parse(&again).as_ref(), Ok(&sections));
            None
        }
        FrameType::Frames => {
            let frames = Frames::parse(payload).ok()?;
            let mut again = Vec::new();
            frames.encode(&mut again);
            assert_eq!(again, payload);
            None
        }
        FrameType::Pages => {
            let parsed = Pages::parse(payload, &[0..64 << 20, 4 << 30..5 << 30], feature::SKIP).ok()?;
            assert!(parsed.runs().all(|(run, data)| data.is_empty() || data.len() as u64 == run.bytes()));
            None
        }
        _ => {
            let message = Message::parse(frame_type, payload).ok()?;
            assert_eq!(message.frame_type(), frame_type);
            let mut again = Vec::new();
            message.encode(&mut again);
            assert_eq!(Message::parse(frame_type, &again).as_ref(), Ok(&message));
            Some(message)
        }
    }
}

/// Records of type, length, payload, or of something that happens at the destination.
fn messages(input: &[u8]) {
    let mut input = Input::new(input);
    let mut destination = Destination::new(8 << 20);
    while !input.is_empty() {
        let kind = input.u8();
        if kind & 0x80 != 0 {
            let event = match kind % 4 {
                0 => destination::Event::Prepared { owner: OwnerId([3; 2]), epoch: Epoch(input.value()) },
                1 => destination::Event::Loaded,
                2 => destination::Event::Timeout,
                _ => destination::Event::ArbiterSilent,
            };
            destination.on_event(event);
            continue;
        }
        let frame_type = FrameType::ALL[usize::from(kind) % FrameType::ALL.len()];
        let length = usize::from(input.u16());
        let event = match payload_of(frame_type, input.bytes(length)) {
            Some(message) => destination::Event::Message(message),
            None => destination::Event::Bulk(frame_type),
        };
        destination.on_event(event);
    }
}

fn pages(input: &[u8]) {
    let Ok(memory) = Memory::new(HUGE_PAGE) else { panic!("no memory") };
    let Ok(pages) = Pages::parse(input, &memory.ranges(), feature::SKIP) else { return };
    let mut arrived = transfer::Arrived::new(&memory);
    let told: u64 = pages.runs().map(|(run, _)| u64::from(run.pages)).sum();
    match arrived.apply(&pages, &memory) {
        Ok(applied) => assert_eq!(applied, told),
        Err(e) => panic!("pages that were checked cannot be applied: {e}"),
    }
}

fn conversation() -> Vec<Message> {
    let reason = Reason::new(ReasonCode::Version, "no room");
    let stamp = Stamp { boot: [1; 16], mono_ns: 2, real_ns: 3 };
    let hello = Hello {
        min_version: 1,
        max_version: 1,
        required: 0,
        offered: 1,
        port: [1, 2],
        vm_id: 3,
        owner: OwnerId([4; 2]),
        ownership: Ownership::Arbiter,
        epoch: Epoch(5),
        memory_size: 8 << 20,
        ticket: Vec::new(),
    };
    vec![
        Message::Hello(hello.clone().with_ticket(crate::ticket::signed())),
        Message::Hello(hello),
        Message::Welcome { version: 1, features: 1 },
        Message::Describe(Description {
            memory_size: 8 << 20,
            vcpus: 1,
            tsc_khz: 2_000_000,
            cpu: vec![CpuLeaf { function: 1, index: 0, flags: 0, registers: [1, 2, 3, 4] }],
            config: b"{}".to_vec(),
        }),
        Message::Ready { owner: OwnerId([5; 2]), epoch: Epoch(6) },
        Message::Round { round: 0, pages: 3 },
        Message::RoundDone { round: 0 },
        Message::Pausing,
        Message::Loaded,
        Message::Commit { epoch: Epoch(6), paused: stamp },
        Message::Running { epoch: Epoch(7), entered: stamp, steps: [1, 2, 3, 4] },
        Message::Aborted { reason: reason.clone(), epoch: Epoch(7) },
        Message::Refuse(reason.clone()),
        Message::Cancel(reason),
        Message::Done { frames: 1 },
        Message::Switched { device: 0 },
        Message::Opened { switched: 1, late: 0, waited_ns: 5 },
    ]
}

fn payloads() -> Vec<(FrameType, Vec<u8>)> {
    let mut all: Vec<_> = conversation()
        .iter()
        .map(|m| {
            let mut out = Vec::new();
            m.encode(&mut out);
            (m.frame_type(), out)
        })
        .collect();
    let mut sections = Sections::new();
    let _ = sections.push(Section { name: "clock".into(), version: 1, bytes: vec![1, 2, 3] });
    let mut state = Vec::new();
    sections.encode(&mut state);
    let mut net = Vec::new();
    Frames { device: 0, frames: vec![&[1; 60], &[2; 14]] }.encode(&mut net);
    all.extend([(FrameType::State, state), (FrameType::Frames, net)]);
    all.extend(page_seeds().into_iter().map(|p| (FrameType::Pages, p)));
    all
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let mut sender = Sender::new();
    let mut all = Vec::new();
    let mut alone = Vec::new();
    for (kind, payload) in payloads() {
        sender.frame(kind, &payload, &mut all);
        let mut one = Vec::new();
        Sender::new().frame(kind, &payload, &mut one);
        alone.push(one);
    }
    alone.push(all);
    alone
}

fn message_seeds() -> Vec<Vec<u8>> {
    let record = |(kind, payload): &(FrameType, Vec<u8>)| {
        let number = (*kind as u16 - 1) as u8;
        [&[number][..], &(payload.len() as u16).to_le_bytes(), payload].concat()
    };
    let mut seeds: Vec<_> = payloads().iter().map(record).collect();
    // A port as it should go, from the destination's side.
    let order = [FrameType::Hello, FrameType::Describe];
    let then = [FrameType::Round, FrameType::Pausing, FrameType::State, FrameType::Commit];
    let of = |kinds: &[FrameType]| -> Vec<u8> {
        kinds
            .iter()
            .flat_map(|k| payloads().iter().find(|(kind, _)| kind == k).map(record).unwrap_or_default())
            .collect()
    };
    seeds.push([of(&order), vec![0x80, 0, 6], of(&then), vec![0x81]].concat());
    seeds
}

fn page_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kinds in [&[RunKind::Zero][..], &[RunKind::Raw, RunKind::Zero, RunKind::Raw, RunKind::Skipped]] {
        let mut table = Table::new();
        for (n, kind) in kinds.iter().enumerate() {
            let _ = table.push(n as u64 * 8192, *kind);
        }
        let mut out = Vec::new();
        table.encode(&mut out);
        out.resize(out.len() + table.raw_pages() * 4096, 7);
        seeds.push(out);
    }
    seeds
}
