use super::*;
use crate::fs::*;
use crate::id::Owner;
use crate::op::Reply;
use crate::owner::OwnerRecord;
use crate::wire::{CasStatus, FrameReader};

const VM: VmId = VmId(5);
const ME: Owner = Owner([1, 1]);
const OTHER: Owner = Owner([2, 2]);
const A: ConnectionId = ConnectionId(1);
const B: ConnectionId = ConnectionId(2);

fn hello(epoch: u64) -> Frame {
    hello_of(epoch, ME)
}

fn hello_of(epoch: u64, owner: Owner) -> Frame {
    Frame::Hello(Hello {
        vm_id: VM,
        epoch: Epoch(epoch),
        owner,
        nonce: 3,
        version_min: 1,
        version_max: 4,
        capabilities: 0,
    })
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
            Action::WriteOwners(table) => Did::Write(table.get(VM)),
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
    let mut s = Sessions::restore(BootId(9), OwnerTable::default(), []);
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
    let mut s = Sessions::restore(BootId(9), OwnerTable::default(), []);
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
    s.frame(B, hello(0));
    did(&mut s);
    s.owners_written(false);
    assert_eq!(did(&mut s), [Did::Sent(B, Frame::HelloRefused(Refusal::Storage))]);
}

const HEIR: Owner = Owner([8, 9]);
/// Connections of VMMs that ask.
const VMM: ConnectionId = ConnectionId(77);

fn reserve(s: &mut Sessions, epoch: u64, owner: Owner, heir: Owner) -> Vec<Did> {
    s.frame(VMM, Frame::OwnerReserve { vm_id: VM, epoch: Epoch(epoch), owner, heir });
    did(s)
}

fn cas(s: &mut Sessions, expect: u64, owner: Owner) -> Vec<Did> {
    s.frame(VMM, Frame::OwnerCas { vm_id: VM, expect: Epoch(expect), owner });
    did(s)
}

fn told(status: CasStatus, record: OwnerRecord) -> Did {
    Did::Sent(VMM, Frame::OwnerCasResult { status, record })
}

/// Sessions with VM's open on A, epoch 1, and HEIR named; what is on the disk.
fn named() -> (Sessions, OwnerTable) {
    let mut s = open();
    assert_eq!(reserve(&mut s, 1, ME, HEIR), [Did::Write(Some(record(1, 1, ME)))], "not told before it is durable");
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(1, 1, ME))]);
    let mut disk = OwnerTable::default();
    disk.set(record(1, 1, ME)).unwrap();
    disk.set_heir(VM, Some(HEIR));
    (s, disk)
}

#[test]
fn an_heir_does_not_wait_for_the_disk() {
    let (mut s, _) = named();
    let won = record(2, 1, HEIR);
    assert_eq!(cas(&mut s, 1, HEIR), [told(CasStatus::Won, won), Did::Write(Some(won))]);
    // It holds at once, for requests, for a HELLO and for who comes too late.
    s.frame(A, request(1, 0, 1, read()));
    let current = Epoch(2);
    assert_eq!(did(&mut s), [Did::Sent(A, refused(1, 0, 1, Refusal::StaleEpoch { current }))]);
    s.frame(A, request(2, 0, 1, read()));
    assert_eq!(did(&mut s), [Did::Execute(token(1, 0, 1), read(), false)]);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Lost, won)]);
    // The next change waits.
    assert_eq!(reserve(&mut s, 2, HEIR, ME), []);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Write(Some(won))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, won)]);
}

#[test]
fn a_grant_whose_write_fails_holds() {
    let (mut s, _) = named();
    cas(&mut s, 1, HEIR);
    s.owners_written(false);
    assert_eq!(did(&mut s), []);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Lost, record(2, 1, HEIR))]);
}

#[test]
fn others_than_the_heir_wait_for_the_disk_and_only_the_owner_names_one() {
    let (mut s, _) = named();
    assert_eq!(reserve(&mut s, 1, OTHER, OTHER), [told(CasStatus::Lost, record(1, 1, ME))]);
    assert_eq!(cas(&mut s, 1, ME), [Did::Write(Some(record(2, 1, ME)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(2, 1, ME))]);
    // The heir of epoch 1 is nobody at epoch 2.
    assert_eq!(cas(&mut s, 2, HEIR), [Did::Write(Some(record(3, 1, HEIR)))]);
}

#[test]
fn after_a_restart_the_epoch_is_the_heirs_alone() {
    let (_, disk) = named();
    let restarted = || Sessions::restore(BootId(9), disk.clone(), []);
    let held = record(1, 1, ME);
    // Somebody else, and the source that gives up waiting: nobody knows. Asking for what was won long ago changes nothing.
    let mut s = restarted();
    assert_eq!(cas(&mut s, 0, ME), [told(CasStatus::Won, held)]);
    assert_eq!(cas(&mut s, 1, OTHER), [told(CasStatus::Unknown, held)]);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Unknown, held)]);
    // The heir asks (again).
    let won = record(2, 1, HEIR);
    assert_eq!(cas(&mut s, 1, HEIR), [told(CasStatus::Won, won), Did::Write(Some(won))]);
    // Or it runs already, and says HELLO; nobody else can.
    let mut s = restarted();
    s.frame(A, hello_of(2, OTHER));
    assert_eq!(did(&mut s), [Did::Sent(A, Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(1) }))]);
    s.frame(A, hello_of(2, HEIR));
    assert_eq!(did(&mut s), [Did::Write(Some(won))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Sent(A, ack(2))]);
    assert_eq!(cas(&mut s, 2, OTHER), [Did::Write(Some(record(3, 1, OTHER)))]);
    // Or it does not have the VM.
    let mut s = restarted();
    assert_eq!(reserve(&mut s, 1, OTHER, Owner::default()), [told(CasStatus::Lost, held)]);
    assert_eq!(reserve(&mut s, 1, HEIR, Owner::default()), [Did::Write(Some(held))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, held)]);
    assert_eq!(cas(&mut s, 1, ME), [Did::Write(Some(record(2, 1, ME)))]);
    // Or it gave the VM back.
    let mut s = restarted();
    assert_eq!(cas(&mut s, 2, ME), [Did::Write(Some(record(3, 1, ME)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(3, 1, ME))]);
    // Or the owner has not handed over, and names another, or nobody.
    for (heir, next) in [(OTHER, OTHER), (Owner::default(), ME)] {
        let mut s = restarted();
        s.frame(A, hello(1));
        assert_eq!(did(&mut s), [Did::Sent(A, ack(1))]);
        assert_eq!(reserve(&mut s, 1, ME, heir), [Did::Write(Some(held))]);
        s.owners_written(true);
        assert_eq!(did(&mut s), [told(CasStatus::Won, held)]);
        let expected = record(2, 1, next);
        assert!(cas(&mut s, 1, next).contains(&Did::Write(Some(expected))));
    }
    // Or the VM is started afresh.
    let mut s = restarted();
    s.frame(A, hello(0));
    assert_eq!(did(&mut s), [Did::Write(Some(record(2, 2, ME)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Sent(A, ack(2))]);
    assert_eq!(cas(&mut s, 2, OTHER), [Did::Write(Some(record(3, 2, OTHER)))]);
}

#[test]
fn a_fresh_start_forgets_the_session_before() {
    let mut s = open();
    s.frame(A, request(1, 0, 1, remove()));
    did(&mut s);
    s.frame(B, hello(0));
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
    owners.set(record(7, 4, ME)).unwrap();
    let keep = |session, slot| KeepKey { vm_id: VM, slot: Slot(slot), session: Epoch(session), sequence: Sequence(10) };
    let kept = [(4, 0), (3, 1)].map(|(session, slot)| (VM, Slot(slot), keep(session, slot).encode(&done())));
    let broken = (VM, Slot(2), vec![1, 2, 3]);
    let mut s = Sessions::restore(BootId(9), owners, kept.into_iter().chain([broken]));
    s.frame(A, hello(7));
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
            let mut s = Sessions::restore(BootId(9), OwnerTable::default(), []);
            let (mut executing, mut writing) = (Vec::new(), false);
            for (frame, connection, what, epoch, slot, sequence) in steps {
                let connection = ConnectionId(connection);
                // Some of it near enough to be taken.
                let frame = match frame {
                    Frame::Request { request, .. } => {
                        Frame::Request { epoch: Epoch(epoch), slot: Slot(slot), sequence: Sequence(sequence), request }
                    }
                    Frame::Hello(h) => {
                        Frame::Hello(Hello { vm_id: VM, epoch: Epoch(epoch), version_min: 0, version_max: 1, ..h })
                    }
                    Frame::OwnerCas { owner, .. } => Frame::OwnerCas { vm_id: VM, expect: Epoch(epoch), owner },
                    other => other,
                };
                s.frame(connection, frame);
                while let Some(action) = s.poll_action() {
                    match action {
                        Action::Execute { token, .. } => executing.push(token),
                        Action::WriteOwners(_) => prop_assert!(!std::mem::replace(&mut writing, true)),
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
                    _ => {}
                }
                writing |= std::iter::from_fn(|| s.poll_action()).any(|a| matches!(a, Action::WriteOwners(_)));
            }
        }
    }
}
