use super::*;
use crate::fs::{Credential, FileHandle, Stability, Status, VolumeId};
use crate::op::Op;
use crate::wire::{Farewell, HelloAck};

const VM: VmId = VmId(5);
const ME: Owner = Owner([1, 1]);

fn handle() -> FileHandle {
    FileHandle { volume: VolumeId(0), generation: 0, inode: 1 }
}

fn get() -> Request {
    Request { credential: Credential::ROOT, op: Op::GetAttr { handle: handle() } }
}

fn write(data: Vec<u8>) -> Request {
    let op = Op::Write { handle: handle(), offset: 0, stability: Stability::Unstable, data };
    Request { credential: Credential::ROOT, op }
}

fn sent(session: &mut ClientSession) -> Vec<Frame> {
    let mut reader = FrameReader::new();
    let mut frames = Vec::new();
    while let Some(chunk) = session.poll_transmit() {
        let mut rest = chunk.as_ref();
        while !rest.is_empty() {
            frames.extend(reader.push(&mut rest).unwrap());
        }
    }
    frames
}

fn give(session: &mut ClientSession, frame: Frame) -> Result<(), ClientError> {
    session.receive(&encode(frame).unwrap().into_vec())
}

fn acknowledge(session: &mut ClientSession, epoch: u64, boot: u64) {
    let ack = HelloAck {
        epoch: Epoch(epoch),
        boot_id: BootId(boot),
        nonce: session.nonce,
        version: 1,
        slots: 64,
        capabilities: 0,
    };
    give(session, Frame::HelloAck(ack)).unwrap();
}

fn open(epoch: u64) -> ClientSession {
    let mut s = ClientSession::new(VM, Epoch(0), ME);
    s.connected();
    assert!(matches!(sent(&mut s)[..], [Frame::Hello(Hello { epoch: Epoch(0), .. })]));
    acknowledge(&mut s, epoch, 1);
    let opened = Event::Opened { epoch: Epoch(epoch), boot_id: BootId(1), restarted: false };
    assert_eq!(s.poll_event(), Some(opened));
    s
}

fn epochs(frames: &[Frame]) -> Vec<(u64, u16, u64)> {
    frames
        .iter()
        .map(|f| match f {
            Frame::Request { epoch, slot, sequence, .. } => (epoch.0, slot.0, sequence.0),
            other => panic!("{other:?}"),
        })
        .collect()
}

fn stale(t: Ticket, epoch: u64, current: u64) -> Frame {
    let reason = Refusal::StaleEpoch { current: Epoch(current) };
    Frame::Refused { epoch: Epoch(epoch), slot: t.slot, sequence: t.sequence, reason }
}

#[test]
fn slots_are_the_bound() {
    let mut s = open(1);
    let tickets: Vec<Ticket> = (0..SLOTS).map(|_| s.submit(get()).unwrap()).collect();
    assert_eq!(s.submit(get()), Err(Rejected::Full(get())));
    let Ticket { slot, sequence } = tickets[7];
    let outcome: Outcome = Err(Status::Stale.into());
    give(&mut s, Frame::Response { slot, sequence, outcome: outcome.clone() }).unwrap();
    assert_eq!(s.poll_event(), Some(Event::Completed(tickets[7], outcome.clone())));
    assert_eq!(s.submit(get()), Ok(Ticket { slot, sequence: sequence.next() }));
    // The reply to the one before, again: it is not the new one's.
    give(&mut s, Frame::Response { slot, sequence, outcome }).unwrap();
    assert_eq!(s.poll_event(), None);
    assert_eq!(s.outstanding(), SLOTS);
}

#[test]
fn what_cannot_be_sent_takes_no_slot() {
    let mut s = open(1);
    assert_eq!(s.submit(write(vec![0; crate::fs::IO_MAX + 1])), Err(Rejected::Invalid(WireError::TooLarge)));
    assert_eq!(s.outstanding(), 0);
}

#[test]
fn a_new_epoch_sends_again_on_the_same_connection() {
    let mut s = open(1);
    let a = s.submit(write(vec![1; 100])).unwrap();
    let b = s.submit(get()).unwrap();
    // The head of the first is on its way: its data follows, nothing else of the former epoch does.
    let head = s.poll_transmit().unwrap();
    s.set_epoch(Epoch(2), ME);
    let data = s.poll_transmit().unwrap();
    let mut reader = FrameReader::new();
    assert_eq!(reader.push(&mut head.as_ref()), Ok(None));
    assert!(matches!(reader.push(&mut data.as_ref()), Ok(Some(Frame::Request { epoch: Epoch(1), .. }))));
    assert_eq!(epochs(&sent(&mut s)), [(2, a.slot.0, 1), (2, b.slot.0, 1)]);
    // The refusal of the first sending is no matter; an epoch never goes back.
    give(&mut s, stale(a, 1, 2)).unwrap();
    s.set_epoch(Epoch(1), ME);
    assert_eq!((s.poll_event(), s.is_open()), (None, true));
    assert!(sent(&mut s).is_empty());
}

#[test]
fn fenced_until_a_newer_epoch() {
    let mut s = open(1);
    let t = s.submit(get()).unwrap();
    sent(&mut s);
    give(&mut s, stale(t, 1, 2)).unwrap();
    assert_eq!(s.poll_event(), Some(Event::Fenced { current: Epoch(2) }));
    s.submit(get()).unwrap();
    assert!(sent(&mut s).is_empty(), "nothing is sent by who is fenced");
    s.set_epoch(Epoch(3), ME);
    assert!(matches!(sent(&mut s)[..], [Frame::Hello(Hello { epoch: Epoch(3), .. })]));
    acknowledge(&mut s, 3, 1);
    assert_eq!(epochs(&sent(&mut s)).len(), 2);
}

#[test]
fn a_connection_lost_is_made_good() {
    let mut s = open(1);
    let t = s.submit(get()).unwrap();
    assert_eq!(sent(&mut s).len(), 1);
    s.disconnected();
    let u = s.submit(get()).unwrap();
    assert!(sent(&mut s).is_empty());
    s.connected();
    assert_eq!(sent(&mut s).len(), 1, "HELLO first, nothing before it is acknowledged");
    acknowledge(&mut s, 1, 2);
    let opened = Event::Opened { epoch: Epoch(1), boot_id: BootId(2), restarted: true };
    assert_eq!(s.poll_event(), Some(opened));
    let (t, u) = ((1, t.slot.0, t.sequence.0), (1, u.slot.0, u.sequence.0));
    let mut again = epochs(&sent(&mut s));
    again.sort_unstable();
    let mut wanted = [t, u];
    wanted.sort_unstable();
    assert_eq!(again, wanted);
}

#[test]
fn a_hello_refused_for_an_epoch_that_has_changed_since_is_said_again() {
    let mut s = ClientSession::new(VM, Epoch(4), ME);
    s.connected();
    sent(&mut s);
    s.set_epoch(Epoch(5), ME);
    let refused = Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(5) });
    give(&mut s, refused.clone()).unwrap();
    assert!(matches!(sent(&mut s)[..], [Frame::Hello(Hello { epoch: Epoch(5), .. })]));
    give(&mut s, refused).unwrap();
    assert_eq!(s.poll_event(), Some(Event::Fenced { current: Epoch(5) }));
}

fn claims(session: &mut ClientSession) -> u64 {
    match &sent(session)[..] {
        [Frame::Hello(hello)] if hello.claims() => hello.epoch.0,
        other => panic!("{other:?}"),
    }
}

fn stale_hello(current: u64) -> Frame {
    Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(current) })
}

#[test]
fn a_claim_starts_from_what_the_d_module_tells() {
    let mut s = ClientSession::new(VM, Epoch(0), ME);
    s.connected();
    assert_eq!(claims(&mut s), 0);
    for current in [4, 6] {
        give(&mut s, stale_hello(current)).unwrap();
        assert_eq!(claims(&mut s), current);
    }
    // A D-module that contradicts itself is not asked for ever.
    assert_eq!(give(&mut s, stale_hello(6)), Err(ClientError::Unexpected("HelloRefused")));
    s.connected();
    assert_eq!(claims(&mut s), 0, "what another connection was told may be old");
    give(&mut s, stale_hello(7)).unwrap();
    assert_eq!(claims(&mut s), 7);
    acknowledge(&mut s, 8, 1);
    assert!(s.is_open());
    assert_eq!(s.epoch(), Epoch(8));
}

#[test]
fn who_has_got_an_epoch_claims_no_more() {
    let mut s = ClientSession::new(VM, Epoch(0), ME);
    s.connected();
    assert_eq!(claims(&mut s), 0);
    s.set_epoch(Epoch(5), ME);
    give(&mut s, stale_hello(5)).unwrap();
    assert!(matches!(sent(&mut s)[..], [Frame::Hello(Hello { epoch: Epoch(5), capabilities: 0, .. })]));
    acknowledge(&mut s, 5, 1);
    assert!(s.is_open());
}

#[test]
fn a_d_module_out_of_order_ends_the_connection() {
    let mut s = open(1);
    let t = s.submit(get()).unwrap();
    let busy = Frame::Refused { epoch: Epoch(1), slot: t.slot, sequence: t.sequence, reason: Refusal::Busy };
    assert_eq!(give(&mut s, busy), Err(ClientError::Refused(Refusal::Busy)));
    let goodbye = Frame::Goodbye { reason: Farewell::Superseded };
    assert_eq!(give(&mut s, goodbye), Err(ClientError::Goodbye(Farewell::Superseded)));
    assert_eq!(give(&mut s, Frame::OwnerGet { vm_id: VM }), Err(ClientError::Unexpected("kind of frame")));
    assert!(s.receive(&[0; 24]).is_err());
}

#[test]
fn pings() {
    let mut s = open(1);
    s.ping(7);
    assert_eq!(sent(&mut s), [Frame::Ping { token: 7 }]);
    give(&mut s, Frame::Pong { token: 7 }).unwrap();
    assert_eq!(s.poll_event(), Some(Event::Pong(7)));
    (0..10_000).for_each(|n| s.ping(n));
    assert!(sent(&mut s).len() <= 4 * SLOTS + CONTROL_MAX);
}

mod hostile {
    use super::*;
    use crate::wire::tests::any;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        /// A D-module that sends anything: no panic, no completion of what was not asked, at most one of each.
        #[test]
        fn any_frames(frames in prop::collection::vec((any::frame(), 0u16..66, 0u64..3), 1..60)) {
            let mut s = open(1);
            let mut asked: Vec<Ticket> = (0..SLOTS).map(|_| s.submit(get()).unwrap()).collect();
            for (frame, slot, sequence) in frames {
                let frame = match frame {
                    Frame::Response { outcome, .. } => {
                        Frame::Response { slot: Slot(slot), sequence: Sequence(sequence), outcome }
                    }
                    Frame::Refused { reason, .. } => {
                        Frame::Refused { epoch: Epoch(1), slot: Slot(slot), sequence: Sequence(sequence), reason }
                    }
                    other => other,
                };
                if give(&mut s, frame).is_err() {
                    s.connected();
                }
                while let Some(event) = s.poll_event() {
                    if let Event::Completed(ticket, _) = event {
                        let before = asked.len();
                        asked.retain(|t| *t != ticket);
                        prop_assert_eq!(asked.len(), before - 1);
                    }
                }
                prop_assert_eq!(s.outstanding(), asked.len());
                prop_assert!(sent_chunks(&mut s) <= 4 * SLOTS + CONTROL_MAX);
            }
        }
    }

    fn sent_chunks(session: &mut ClientSession) -> usize {
        std::iter::from_fn(|| session.poll_transmit()).count()
    }
}
