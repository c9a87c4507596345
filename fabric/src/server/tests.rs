use super::*;
use crate::fs::*;
use crate::id::Owner;
use crate::op::Reply;
use crate::owner::OwnerRecord;
use crate::wire::{CLAIM, CasStatus, FrameReader, HelloAck};

mod ownership;

const VM: VmId = VmId(5);
const ME: Owner = Owner([1, 1]);
const OTHER: Owner = Owner([2, 2]);
const A: ConnectionId = ConnectionId(1);
const B: ConnectionId = ConnectionId(2);

fn hello(epoch: u64) -> Frame {
    hello_of(epoch, ME)
}

fn hello_of(epoch: u64, owner: Owner) -> Frame {
    hello_with(epoch, owner, 0)
}

fn claim(from: u64) -> Frame {
    hello_with(from, ME, CLAIM)
}

fn hello_with(epoch: u64, owner: Owner, capabilities: u64) -> Frame {
    let (epoch, version_min, version_max) = (Epoch(epoch), 1, 4);
    Frame::Hello(Hello { vm_id: VM, epoch, owner, nonce: 3, version_min, version_max, capabilities })
}

fn handle() -> FileHandle {
    FileHandle { volume: VolumeId(0), generation: 0, inode: 1 }
}

fn request(epoch: u64, slot: u16, sequence: u64, op: Op) -> Frame {
    Frame::Request {
        epoch: Epoch(epoch),
        slot: Slot(slot),
        sequence: Sequence(sequence),
        request: Request { credential: Credential::ROOT, op },
    }
}

fn read() -> Op {
    Op::Read { handle: handle(), offset: 0, length: 10 }
}

fn remove() -> Op {
    Op::Remove { dir: handle(), name: b"x".to_vec() }
}

/// What a test compares.
#[derive(Debug, PartialEq)]
enum Did {
    Sent(ConnectionId, Frame),
    Execute(Token, Op, bool),
    Write(Option<OwnerRecord>),
    Close(ConnectionId),
}

fn did(sessions: &mut Sessions) -> Vec<Did> {
    let mut all = Vec::new();
    while let Some(action) = sessions.poll_action() {
        all.push(match action {
            Action::Send(c, encoded) => {
                Did::Sent(c, FrameReader::new().push(&mut &encoded.into_vec()[..]).unwrap().unwrap())
            }
            Action::Execute { token, request, keep } => Did::Execute(token, request.op, keep.is_some()),
            Action::WriteOwners(OwnerChange::Set(record, _)) => Did::Write(Some(record)),
            Action::WriteOwners(OwnerChange::Release(..)) => Did::Write(None),
            Action::ReadKept(read) => {
                sessions.kept_read(read, Some(Vec::new()));
                continue;
            }
            Action::Close(c) => Did::Close(c),
        });
    }
    all
}

fn ack(epoch: u64) -> Frame {
    Frame::HelloAck(HelloAck {
        epoch: Epoch(epoch),
        boot_id: BootId(9),
        nonce: 3,
        version: 1,
        slots: 64,
        capabilities: 0,
    })
}

fn record(epoch: u64, session: u64, owner: Owner) -> OwnerRecord {
    OwnerRecord { vm_id: VM, epoch: Epoch(epoch), session: Epoch(session), owner }
}

fn token(session: u64, slot: u16, sequence: u64) -> Token {
    Token { vm_id: VM, session: Epoch(session), slot: Slot(slot), sequence: Sequence(sequence) }
}

fn refused(epoch: u64, slot: u16, sequence: u64, reason: Refusal) -> Frame {
    Frame::Refused { epoch: Epoch(epoch), slot: Slot(slot), sequence: Sequence(sequence), reason }
}

fn response(slot: u16, sequence: u64, outcome: Outcome) -> Frame {
    Frame::Response { slot: Slot(slot), sequence: Sequence(sequence), outcome }
}

/// Sessions with VM's open on A, epoch 1.
fn open() -> Sessions {
    let mut s = Sessions::new(BootId(9), OwnerTable::default(), 4);
    s.frame(A, hello(0));
    assert_eq!(did(&mut s), [Did::Write(Some(record(1, 1, ME)))], "not acknowledged before it is durable");
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Sent(A, ack(1))]);
    s
}

fn done() -> Outcome {
    Ok(Reply::Wcc(Wcc::default()))
}

#[test]
fn nothing_without_hello() {
    let mut s = Sessions::new(BootId(9), OwnerTable::default(), 4);
    s.frame(A, request(0, 0, 1, read()));
    assert_eq!(did(&mut s), [Did::Sent(A, refused(0, 0, 1, Refusal::NoSession))]);
    s.frame(A, hello(1));
    assert_eq!(did(&mut s), [Did::Sent(A, Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(0) }))]);
    s.frame(A, ack(1));
    assert_eq!(did(&mut s), [Did::Sent(A, Frame::Goodbye { reason: Farewell::Protocol }), Did::Close(A)]);
}

#[test]
fn a_kept_reply_is_given_again_and_a_read_is_done_again() {
    let mut s = open();
    s.frame(A, request(1, 0, 1, remove()));
    s.frame(A, request(1, 1, 1, read()));
    s.frame(A, request(1, 0, 1, remove()));
    let (t, r) = (token(1, 0, 1), token(1, 1, 1));
    assert_eq!(did(&mut s), [Did::Execute(t, remove(), true), Did::Execute(r, read(), false)]);
    s.complete(t, done());
    s.complete(r, Err(Status::Io.into()));
    let removed = Did::Sent(A, response(0, 1, done()));
    assert_eq!(did(&mut s), [removed, Did::Sent(A, response(1, 1, Err(Status::Io.into())))]);
    s.frame(A, request(1, 0, 1, remove()));
    s.frame(A, request(1, 1, 1, read()));
    assert_eq!(did(&mut s), [Did::Sent(A, response(0, 1, done())), Did::Execute(r, read(), false)]);
    // The slot goes on from a read that is being repeated; its outcome is dropped.
    s.frame(A, request(1, 1, 2, remove()));
    s.complete(r, done());
    assert_eq!(did(&mut s), [Did::Execute(token(1, 1, 2), remove(), true)]);
    assert!(!s.is_wanted(r) && s.is_wanted(token(1, 1, 2)));
}

#[test]
fn slots_and_sequences_out_of_place() {
    let mut s = open();
    s.frame(A, request(1, 64, 1, read()));
    s.frame(A, request(1, 0, 2, read()));
    s.frame(A, request(1, 0, 0, read()));
    s.frame(A, request(1, 0, 1, remove()));
    s.frame(A, request(1, 0, 2, read()));
    let bad = |n, last| Did::Sent(A, refused(1, 0, n, Refusal::BadSequence { last: Sequence(last) }));
    assert_eq!(
        did(&mut s),
        [
            Did::Sent(A, refused(1, 64, 1, Refusal::BadSlot)),
            bad(2, 0),
            bad(0, 0),
            Did::Execute(token(1, 0, 1), remove(), true),
            Did::Sent(A, refused(1, 0, 2, Refusal::Busy)),
        ]
    );
}

#[test]
fn a_client_that_does_not_wait_is_bounded() {
    let mut s = open();
    for sequence in 1..=1000 {
        s.frame(A, request(1, 0, sequence, read()));
    }
    let executing = did(&mut s).iter().filter(|d| matches!(d, Did::Execute(..))).count();
    assert_eq!(executing, EXECUTING_MAX);
}

#[test]
fn a_new_connection_takes_the_session_over() {
    let mut s = open();
    s.frame(A, request(1, 0, 1, remove()));
    did(&mut s);
    s.frame(B, hello(1));
    assert_eq!(
        did(&mut s),
        [Did::Sent(A, Frame::Goodbye { reason: Farewell::Superseded }), Did::Close(A), Did::Sent(B, ack(1))]
    );
    s.frame(A, request(1, 1, 1, read()));
    assert_eq!(did(&mut s), [Did::Sent(A, refused(1, 1, 1, Refusal::NoSession))]);
    s.complete(token(1, 0, 1), done());
    assert_eq!(did(&mut s), [Did::Sent(B, response(0, 1, done()))]);
    s.closed(A);
    s.frame(B, request(1, 0, 1, remove()));
    assert_eq!(did(&mut s), [Did::Sent(B, response(0, 1, done()))]);
}

#[test]
fn a_port_fences_the_former_epoch_on_the_same_connection() {
    let mut s = open();
    s.frame(A, request(1, 0, 1, remove()));
    s.frame(B, Frame::OwnerCas { vm_id: VM, expect: Epoch(1), owner: OTHER });
    s.frame(B, Frame::OwnerGet { vm_id: VM });
    let won = record(2, 1, OTHER);
    assert_eq!(did(&mut s), [Did::Execute(token(1, 0, 1), remove(), true), Did::Write(Some(won))]);
    s.owners_written(true);
    assert_eq!(
        did(&mut s),
        [
            Did::Sent(B, Frame::OwnerCasResult { status: CasStatus::Won, record: won }),
            Did::Sent(B, Frame::OwnerRecord(won))
        ]
    );
    s.frame(A, request(1, 1, 1, remove()));
    s.frame(A, request(2, 0, 1, remove()));
    s.complete(token(1, 0, 1), done());
    let stale = Refusal::StaleEpoch { current: Epoch(2) };
    assert_eq!(did(&mut s), [Did::Sent(A, refused(1, 1, 1, stale)), Did::Sent(A, response(0, 1, done()))]);
    s.frame(B, Frame::OwnerCas { vm_id: VM, expect: Epoch(1), owner: ME });
    assert_eq!(did(&mut s), [Did::Sent(B, Frame::OwnerCasResult { status: CasStatus::Lost, record: won })]);
}

#[test]
fn a_disk_that_fails_leaves_the_record() {
    let mut s = open();
    s.frame(B, Frame::OwnerCas { vm_id: VM, expect: Epoch(1), owner: OTHER });
    did(&mut s);
    s.owners_written(false);
    let held = record(1, 1, ME);
    assert_eq!(did(&mut s), [Did::Sent(B, Frame::OwnerCasResult { status: CasStatus::Unknown, record: held })]);
    s.frame(B, claim(1));
    did(&mut s);
    s.owners_written(false);
    assert_eq!(did(&mut s), [Did::Sent(B, Frame::HelloRefused(Refusal::Storage))]);
}

/// Connections of VMMs that ask.
const VMM: ConnectionId = ConnectionId(77);

#[test]
fn a_fresh_start_forgets_the_session_before() {
    let mut s = open();
    s.frame(A, request(1, 0, 1, remove()));
    did(&mut s);
    s.frame(B, claim(1));
    s.owners_written(true);
    let write = Did::Write(Some(record(2, 2, ME)));
    let goodbye = Did::Sent(A, Frame::Goodbye { reason: Farewell::Superseded });
    assert_eq!(did(&mut s), [write, goodbye, Did::Close(A), Did::Sent(B, ack(2))]);
    assert!(!s.is_wanted(token(1, 0, 1)));
    s.complete(token(1, 0, 1), done());
    s.frame(B, request(2, 0, 1, remove()));
    assert_eq!(did(&mut s), [Did::Execute(token(2, 0, 1), remove(), true)]);
}

#[test]
fn kept_replies_outlive_the_d_module_and_not_the_session() {
    let mut owners = OwnerTable::default();
    owners.apply(&OwnerChange::Set(record(7, 4, ME), None));
    let keep = |session, slot| KeepKey { vm_id: VM, slot: Slot(slot), session: Epoch(session), sequence: Sequence(10) };
    let kept = [(4, 0), (3, 1)].map(|(session, slot)| (Slot(slot), keep(session, slot).encode(&done())));
    let broken = (Slot(2), vec![1, 2, 3]);
    let mut s = Sessions::new(BootId(9), owners, 4);
    s.frame(A, hello(7));
    let Some(Action::ReadKept(read)) = s.poll_action() else { panic!() };
    assert!(s.poll_action().is_none(), "open before it is known what was executed");
    s.kept_read(read, Some(kept.into_iter().chain([broken]).collect()));
    s.frame(A, request(7, 0, 10, remove()));
    s.frame(A, request(7, 0, 9, remove()));
    s.frame(A, request(7, 0, 55, remove()));
    s.frame(A, request(7, 0, 57, remove()));
    s.frame(A, request(7, 1, 10, remove()));
    s.frame(A, request(7, 2, 3, remove()));
    assert_eq!(
        did(&mut s),
        [
            Did::Sent(A, ack(7)),
            Did::Sent(A, response(0, 10, done())),
            Did::Sent(A, refused(7, 0, 9, Refusal::BadSequence { last: Sequence(10) })),
            Did::Execute(token(4, 0, 55), remove(), true),
            Did::Sent(A, refused(7, 0, 57, Refusal::BadSequence { last: Sequence(55) })),
            Did::Execute(token(4, 1, 10), remove(), true),
            Did::Execute(token(4, 2, 3), remove(), true),
        ]
    );
}

fn hello_from(connection: u64, vm: u64, epoch: u64) -> (ConnectionId, Frame) {
    let Frame::Hello(h) = hello(epoch) else { unreachable!() };
    (ConnectionId(connection), Frame::Hello(Hello { vm_id: VmId(vm), ..h }))
}

#[test]
fn sessions_are_bounded_and_an_idle_one_makes_room() {
    let mut s = Sessions::new(BootId(9), OwnerTable::default(), 2);
    let open = |s: &mut Sessions, connection: u64, vm: u64, epoch: u64| {
        let (connection, hello) = hello_from(connection, vm, epoch);
        s.frame(connection, hello);
        let mut all = did(s);
        if matches!(all[..], [Did::Write(_)]) {
            s.owners_written(true);
            all = did(s);
        }
        all.pop().unwrap()
    };
    let ack = |connection: u64| Did::Sent(ConnectionId(connection), ack(1));
    let full = |connection: u64| Did::Sent(ConnectionId(connection), Frame::HelloRefused(Refusal::Full));
    assert_eq!(open(&mut s, 11, 1, 0), ack(11));
    assert_eq!(open(&mut s, 12, 2, 0), ack(12));
    assert_eq!(open(&mut s, 13, 3, 0), full(13));
    // One that is idle but has a request executing is in use.
    s.frame(ConnectionId(11), request(1, 0, 1, remove()));
    let executing = Token { vm_id: VmId(1), ..token(1, 0, 1) };
    assert_eq!(did(&mut s), [Did::Execute(executing, remove(), true)]);
    s.closed(ConnectionId(11));
    assert_eq!(open(&mut s, 14, 3, 1), full(14));
    s.complete(executing, done());
    assert_eq!(open(&mut s, 15, 3, 1), ack(15));
    // The VM that made room comes back when there is room for it: as after a restart.
    assert_eq!(open(&mut s, 16, 1, 1), full(16));
    s.closed(ConnectionId(12));
    let (connection, hello) = hello_from(17, 1, 1);
    s.frame(connection, hello);
    let Some(Action::ReadKept(read)) = s.poll_action() else { panic!() };
    let key = KeepKey { vm_id: VmId(1), slot: Slot(0), session: Epoch(1), sequence: Sequence(1) };
    s.kept_read(read, Some(vec![(Slot(0), key.encode(&done()))]));
    s.frame(connection, request(1, 0, 1, remove()));
    assert_eq!(did(&mut s), [ack(17), Did::Sent(connection, response(0, 1, done()))]);
}

#[test]
fn a_hello_waits_for_the_kept_replies_of_the_session_that_holds() {
    let mut owners = OwnerTable::default();
    owners.apply(&OwnerChange::Set(record(7, 4, ME), None));
    let restarted = || Sessions::new(BootId(9), owners.clone(), 4);
    let reads = |s: &mut Sessions| {
        let mut reads = Vec::new();
        while let Some(action) = s.poll_action() {
            match action {
                Action::ReadKept(read) => reads.push(read),
                Action::WriteOwners(_) => s.owners_written(true),
                _ => {}
            }
        }
        assert_eq!(reads.len(), 1, "they are read once");
        reads[0]
    };
    // A second connection takes the first one's place.
    let mut s = restarted();
    s.frame(A, hello(7));
    let read = reads(&mut s);
    s.frame(B, hello(7));
    assert_eq!(did(&mut s), [Did::Sent(A, Frame::Goodbye { reason: Farewell::Superseded }), Did::Close(A)]);
    s.kept_read(read, Some(Vec::new()));
    assert_eq!(did(&mut s), [Did::Sent(B, ack(7))]);
    // The epoch has gone on meanwhile.
    let mut s = restarted();
    s.frame(A, hello(7));
    s.frame(VMM, Frame::OwnerCas { vm_id: VM, expect: Epoch(7), owner: OTHER });
    let read = reads(&mut s);
    s.kept_read(read, Some(Vec::new()));
    let stale = Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(8) });
    assert_eq!(did(&mut s), [Did::Sent(A, stale)]);
    // The VM is started afresh meanwhile.
    let mut s = restarted();
    s.frame(A, hello(7));
    s.frame(B, claim(7));
    let read = reads(&mut s);
    s.kept_read(read, Some(vec![(Slot(0), vec![0; 16])]));
    s.frame(B, request(8, 0, 1, remove()));
    assert_eq!(did(&mut s), [Did::Execute(token(8, 0, 1), remove(), true)]);
    // It has gone, and been forgotten, and comes back: what was read before it did something is not what is kept.
    s.complete(token(8, 0, 1), done());
    s.closed(B);
    s.sessions.clear();
    s.frame(A, hello(8));
    let again = reads(&mut s);
    s.kept_read(read, Some(Vec::new()));
    assert_eq!(did(&mut s), []);
    let key = KeepKey { vm_id: VM, slot: Slot(0), session: Epoch(8), sequence: Sequence(1) };
    s.kept_read(again, Some(vec![(Slot(0), key.encode(&done()))]));
    s.frame(A, request(8, 0, 1, remove()));
    assert_eq!(did(&mut s), [Did::Sent(A, ack(8)), Did::Sent(A, response(0, 1, done()))]);
    // It cannot be read; and nobody waits any more.
    let mut s = restarted();
    s.frame(A, hello(7));
    let read = reads(&mut s);
    s.kept_read(read, None);
    assert_eq!(did(&mut s), [Did::Sent(A, Frame::HelloRefused(Refusal::Storage))]);
    s.frame(A, hello(7));
    s.closed(A);
    let read = reads(&mut s);
    s.kept_read(read, Some(Vec::new()));
    assert_eq!(did(&mut s), []);
    assert!(s.sessions.is_empty());
}

#[test]
fn requests_are_held_to_what_a_reply_can_carry() {
    let mut s = open();
    s.frame(A, request(1, 0, 1, Op::Read { handle: handle(), offset: 0, length: u32::MAX }));
    let list = |max_entries, max_bytes| Op::ReadDir { dir: handle(), cookie: 0, max_entries, max_bytes, plus: true };
    s.frame(A, request(1, 1, 1, list(u32::MAX, u32::MAX)));
    s.frame(A, request(1, 2, 1, list(0, 0)));
    let ops: Vec<Op> = did(&mut s)
        .into_iter()
        .map(|d| match d {
            Did::Execute(_, op, _) => op,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        ops,
        [
            Op::Read { handle: handle(), offset: 0, length: IO_MAX as u32 },
            list(wire::ENTRIES_MAX as u32, wire::ENTRY_BYTES_MAX as u32),
            list(1, 0)
        ]
    );
}

mod hostile {
    use super::*;
    use crate::wire::tests::any;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever comes on whatever connection: no panic, and never more being executed than allowed.
        #[test]
        fn any_frames(
            steps in prop::collection::vec((any::frame(), 0u64..4, 0u8..8, 0u64..4, 0u16..70, 0u64..4), 1..120)
        ) {
            let mut s = Sessions::new(BootId(9), OwnerTable::default(), 4);
            let (mut executing, mut reading, mut writing) = (Vec::new(), Vec::new(), false);
            for (frame, connection, what, epoch, slot, sequence) in steps {
                let connection = ConnectionId(connection);
                // Some of it near enough to be taken.
                let frame = match frame {
                    Frame::Request { request, .. } => {
                        Frame::Request { epoch: Epoch(epoch), slot: Slot(slot), sequence: Sequence(sequence), request }
                    }
                    Frame::Hello(h) => {
                        Frame::Hello(Hello { vm_id: VM, epoch: Epoch(epoch), owner: ME, version_min: 0, version_max: 1, ..h })
                    }
                    Frame::OwnerCas { owner, .. } => Frame::OwnerCas { vm_id: VM, expect: Epoch(epoch), owner },
                    Frame::OwnerRelease { .. } => {
                        Frame::OwnerRelease { vm_id: VM, epoch: Epoch(epoch), owner: ME }
                    }
                    other => other,
                };
                s.frame(connection, frame);
                while let Some(action) = s.poll_action() {
                    match action {
                        Action::Execute { token, .. } => executing.push(token),
                        Action::WriteOwners(_) => prop_assert!(!std::mem::replace(&mut writing, true)),
                        Action::ReadKept(read) => reading.push(read),
                        Action::Send(..) | Action::Close(_) => {}
                    }
                }
                match what {
                    0..3 if writing => {
                        writing = false;
                        s.owners_written(what > 0);
                    }
                    3 => s.closed(connection),
                    4..6 if !executing.is_empty() => s.complete(executing.remove(0), done()),
                    6 if !reading.is_empty() => s.kept_read(reading.remove(0), Some(Vec::new())),
                    7 if !reading.is_empty() => s.kept_read(reading.remove(0), None),
                    _ => {}
                }
                while let Some(action) = s.poll_action() {
                    match action {
                        Action::WriteOwners(_) => writing = true,
                        Action::ReadKept(read) => reading.push(read),
                        _ => {}
                    }
                }
                prop_assert!(s.sessions.len() + s.opening.len() <= 4);
                prop_assert!(s.opening.keys().all(|vm_id| !s.sessions.contains_key(vm_id)));
            }
        }
    }
}
