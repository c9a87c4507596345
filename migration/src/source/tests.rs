use super::*;
use crate::message::{Stamp, VERSION_MAX, VERSION_MIN};
use crate::ownership::{OwnerId, Record};

fn source(ownership: Ownership) -> Source {
    let hello = Hello {
        min_version: VERSION_MIN,
        max_version: VERSION_MAX,
        required: 0,
        offered: 0,
        port: [1, 2],
        vm_id: 3,
        owner: OwnerId([4, 5]),
        ownership,
        epoch: Epoch(7),
        memory_size: 1 << 26,
        ticket: Vec::new(),
    };
    Source::new(hello, Description::default(), Policy::default())
}

fn welcome() -> Event {
    Event::Message(Message::Welcome { version: VERSION_MAX, features: 0 })
}

fn ready(epoch: u64) -> Event {
    Event::Message(Message::Ready { owner: OwnerId([6, 6]), epoch: Epoch(epoch) })
}

fn idle() -> Event {
    Event::Measured(RoundStats { dirty_pages: 1, sent_bytes: 1 << 30, elapsed_ns: 1 << 30, ..RoundStats::default() })
}

fn running() -> Event {
    Event::Message(Message::Running { epoch: Epoch(8), entered: Stamp::default(), steps: [0; 4] })
}

/// The events up to, not including, COMMIT.
fn script(ownership: Ownership) -> Vec<(Event, Phase)> {
    let mut steps = vec![
        (Event::Connected, Phase::Hello),
        (welcome(), Phase::Describe),
        (ready(7), Phase::PreCopy),
        (Event::Message(Message::RoundDone { round: 0 }), Phase::PreCopy),
        (idle(), Phase::Lull),
        (Event::Lulled, Phase::Pausing),
        (Event::Paused, Phase::Collecting),
    ];
    if ownership == Ownership::Stream {
        steps.push((Event::Collected(Epoch(7)), Phase::Handing));
    }
    steps
}

fn play(source: &mut Source, steps: &[(Event, Phase)]) {
    for (event, phase) in steps {
        source.on_event(event.clone());
        assert_eq!(source.phase(), *phase, "after {event:?}");
    }
}

#[test]
fn a_port_with_an_arbiter() {
    let mut s = source(Ownership::Arbiter);
    play(&mut s, &script(Ownership::Arbiter));
    assert!(!s.past_no_return());
    assert_eq!(s.on_event(Event::Collected(Epoch(7))), [Action::SendFinal { commit: Some(Epoch(7)) }]);
    assert!(s.past_no_return());
    assert_eq!(s.on_event(running()), [Action::Linger]);
    assert_eq!(s.on_event(Event::LingerOver), [Action::Finish, Action::TearDown]);
    assert_eq!(s.phase(), Phase::Ended);
}

#[test]
fn without_an_arbiter_commit_waits_for_loaded() {
    let mut s = source(Ownership::Stream);
    play(&mut s, &script(Ownership::Stream));
    assert!(!s.past_no_return());
    assert_eq!(s.on_event(Event::Message(Message::Loaded)), [Action::SendCommit(Epoch(7))]);
    assert!(s.past_no_return());
    // The gap: nobody can know. Paused, until told.
    assert_eq!(s.on_event(Event::Disconnected(Reason::new(ReasonCode::Disconnected, "cut"))), [Action::Close]);
    assert_eq!(s.phase(), Phase::Unknown);
    assert_eq!(s.on_event(Event::Cancel), []);
    assert_eq!(s.clone().on_event(Event::Resolve(false)), [Action::Close, Action::TearDown]);
    assert_eq!(s.on_event(Event::Resolve(true)), [Action::Close, Action::Resume(None)]);
}

#[test]
fn every_phase_before_commit_can_be_cancelled_cut_timed_out_and_failed() {
    let cut = || Reason::new(ReasonCode::Disconnected, "cut");
    for ownership in [Ownership::Arbiter, Ownership::Stream] {
        let steps = script(ownership);
        for length in 0..=steps.len() {
            for event in
                [Event::Cancel, Event::Disconnected(cut()), Event::Broken(cut()), Event::Timeout, Event::Failed(cut())]
            {
                let mut s = source(ownership);
                play(&mut s, &steps[..length]);
                let actions = s.on_event(event.clone());
                assert_eq!(actions.last(), Some(&Action::Resume(None)), "{event:?} after {length} steps");
                assert_eq!(s.phase(), Phase::Resumed);
                assert!(s.reason().is_some());
                assert_eq!(s.on_event(running()), [], "the end is the end");
            }
        }
    }
}

#[test]
fn after_commit_only_the_arbiter_brings_it_back() {
    let lost = Verdict::Lost(Record { epoch: Epoch(8), owner: OwnerId([6, 6]) });
    for (verdict, phase) in [(Verdict::Won(Epoch(8)), Phase::Resumed), (lost, Phase::Watching)] {
        let mut s = source(Ownership::Arbiter);
        play(&mut s, &script(Ownership::Arbiter));
        s.on_event(Event::Collected(Epoch(7)));
        let actions = s.on_event(Event::Disconnected(Reason::new(ReasonCode::Disconnected, "cut")));
        assert_eq!(actions, [Action::Close, Action::Compete(Epoch(7))]);
        for nothing in [Event::ArbiterSilent, Event::Timeout, Event::Cancel, Event::Resolve(true)] {
            assert_eq!(s.on_event(nothing), []);
        }
        let stale = Event::Verdict { expected: Epoch(6), verdict: Verdict::Won(Epoch(7)) };
        assert_eq!(s.on_event(stale), []);
        s.on_event(Event::Verdict { expected: Epoch(7), verdict });
        assert_eq!(s.phase(), phase);
    }
}

#[test]
fn behind_its_own_guests_claim_it_competes_from_there() {
    let mut s = source(Ownership::Arbiter);
    play(&mut s, &script(Ownership::Arbiter));
    s.on_event(Event::Collected(Epoch(7)));
    s.on_event(Event::Timeout);
    let behind = |expected, epoch| Event::Verdict { expected: Epoch(expected), verdict: Verdict::Behind(Epoch(epoch)) };
    assert_eq!(s.on_event(behind(7, 8)), [Action::Compete(Epoch(8))]);
    assert_eq!(s.on_event(behind(7, 8)), [], "the same answer again");
    assert_eq!(s.on_event(behind(8, 9)), [Action::Compete(Epoch(9))]);
    let actions = s.on_event(Event::Verdict { expected: Epoch(9), verdict: Verdict::Won(Epoch(10)) });
    assert_eq!(actions.last(), Some(&Action::Resume(Some(Epoch(10)))));
}

#[test]
fn a_destination_that_won_and_failed_gives_the_vm_back() {
    let mut s = source(Ownership::Arbiter);
    play(&mut s, &script(Ownership::Arbiter));
    s.on_event(Event::Collected(Epoch(7)));
    let reason = Reason::new(ReasonCode::State, "cannot load");
    let actions = s.on_event(Event::Message(Message::Aborted { reason: reason.clone(), epoch: Epoch(8) }));
    assert_eq!(actions, [Action::Compete(Epoch(8))]);
    let actions = s.on_event(Event::Verdict { expected: Epoch(8), verdict: Verdict::Won(Epoch(9)) });
    assert_eq!(actions.last(), Some(&Action::Resume(Some(Epoch(9)))));
    assert_eq!(s.reason(), Some(&reason));
}

#[test]
fn a_record_at_another_epoch_stops_the_port() {
    let mut s = source(Ownership::Arbiter);
    play(&mut s, &script(Ownership::Arbiter)[..2]);
    s.on_event(ready(8));
    assert_eq!(s.phase(), Phase::Resumed);
    assert_eq!(s.reason().map(|r| r.code), Some(ReasonCode::NotOwner));
}

#[test]
fn a_refusal_gives_its_reason() {
    for steps in 1..=2 {
        let mut s = source(Ownership::Arbiter);
        play(&mut s, &script(Ownership::Arbiter)[..steps]);
        let reason = Reason::new(ReasonCode::Memory, "too large");
        s.on_event(Event::Message(Message::Refuse(reason.clone())));
        assert_eq!((s.phase(), s.reason()), (Phase::Resumed, Some(&reason)));
    }
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_then_given_up() {
    let mut s = source(Ownership::Stream);
    play(&mut s, &script(Ownership::Stream)[..3]);
    // A second of work left after every round.
    let busy =
        RoundStats { dirty_pages: 1 << 18, sent_bytes: 1 << 30, elapsed_ns: 1_000_000_000, ..RoundStats::default() };
    let mut steps = Vec::new();
    while s.phase() == Phase::PreCopy {
        s.on_event(Event::Message(Message::RoundDone { round: s.round() }));
        steps.extend(s.on_event(Event::Measured(busy)).into_iter().filter_map(|action| match action {
            Action::Throttle(percent) => Some(percent),
            _ => None,
        }));
        assert!(s.round() < 40, "it comes to an end");
    }
    assert_eq!(steps, [30, 50, 70, 80, 90]);
    assert_eq!(s.phase(), Phase::Resumed);
    let reason = s.reason().unwrap();
    assert_eq!(reason.code, ReasonCode::NotConverging);
    assert!(reason.text.contains("slowed down by 90 %"), "{}", reason.text);
}

#[test]
fn a_copy_is_kept_until_the_destination_that_has_won_is_heard_of() {
    let mut lost = source(Ownership::Arbiter);
    play(&mut lost, &script(Ownership::Arbiter));
    lost.on_event(Event::Collected(Epoch(7)));
    assert_eq!(lost.on_event(Event::Timeout), [Action::Compete(Epoch(7))]);
    let verdict = Verdict::Lost(Record { epoch: Epoch(8), owner: OwnerId([6, 6]) });
    // The destination itself may have no answer yet, and may not be able to load the state.
    assert_eq!(lost.on_event(Event::Verdict { expected: Epoch(7), verdict }), []);
    for nothing in [Event::LingerOver, Event::Timeout, Event::Cancel] {
        assert_eq!(lost.on_event(nothing), []);
    }
    let mut runs = lost.clone();
    assert_eq!(runs.on_event(running()), [Action::Linger]);
    assert_eq!(runs.on_event(Event::LingerOver), [Action::Finish, Action::TearDown]);
    let mut gone = lost.clone();
    let cut = Event::Disconnected(Reason::new(ReasonCode::Disconnected, "cut"));
    assert_eq!(gone.on_event(cut), [Action::Close, Action::Watch]);
    assert_eq!(gone.phase(), Phase::Watching);
    let reason = Reason::new(ReasonCode::State, "cannot load");
    let aborted = Event::Message(Message::Aborted { reason, epoch: Epoch(8) });
    assert_eq!(lost.on_event(aborted), [Action::Compete(Epoch(8))]);
}

/// A source that has lost to the owner 6 at epoch 8, and its connection.
fn watching() -> Source {
    let mut s = source(Ownership::Arbiter);
    play(&mut s, &script(Ownership::Arbiter));
    s.on_event(Event::Collected(Epoch(7)));
    s.on_event(Event::Disconnected(Reason::new(ReasonCode::Disconnected, "cut")));
    let verdict = Verdict::Lost(Record { epoch: Epoch(8), owner: OwnerId([6, 6]) });
    assert_eq!(s.on_event(Event::Verdict { expected: Epoch(7), verdict }), [Action::Watch]);
    assert!(s.past_no_return());
    s
}

fn seen(epoch: u64, owner: u64) -> Event {
    let owner = if owner == 4 { OwnerId([4, 5]) } else { OwnerId([owner, owner]) };
    Event::Seen(Record { epoch: Epoch(epoch), owner })
}

#[test]
fn who_has_lost_and_hears_nothing_watches_the_record() {
    let mut s = watching();
    // Nothing new; an arbiter that has forgotten; nothing that counts.
    for nothing in [seen(8, 6), seen(7, 4), Event::Cancel, Event::Failed(Reason::new(ReasonCode::Internal, ""))] {
        assert_eq!(s.on_event(nothing), []);
    }
    assert_eq!(s.clone().on_event(Event::Timeout), [Action::TearDown]);
    // Started afresh, handed on, this side's own in another way, released.
    for gone in [seen(9, 6), seen(9, 1), seen(10, 4), seen(0, 0)] {
        let mut s = s.clone();
        assert_eq!(s.on_event(gone), [Action::TearDown]);
        assert_eq!(s.phase(), Phase::Ended);
        assert_eq!(s.on_event(seen(9, 4)), []);
    }
    // Given back. What was read does not count before the arbiter has confirmed it.
    assert_eq!(s.on_event(seen(9, 4)), [Action::Compete(Epoch(8))]);
    let actions = s.clone().on_event(Event::Verdict { expected: Epoch(8), verdict: Verdict::Won(Epoch(9)) });
    assert_eq!(actions.last(), Some(&Action::Resume(Some(Epoch(9)))));
    let verdict = Verdict::Lost(Record { epoch: Epoch(10), owner: OwnerId([1, 1]) });
    assert_eq!(s.on_event(Event::Verdict { expected: Epoch(8), verdict }), [Action::Watch]);
    assert_eq!(s.on_event(seen(9, 4)), [], "may be old");
    assert_eq!(s.on_event(seen(10, 1)), [Action::TearDown]);
}

/// The destination's word was there before the question of this side.
#[test]
fn who_competes_hears_that_the_vm_was_given_back() {
    for cut in [true, false] {
        let mut s = source(Ownership::Arbiter);
        play(&mut s, &script(Ownership::Arbiter));
        s.on_event(Event::Collected(Epoch(7)));
        s.on_event(if cut {
            Event::Disconnected(Reason::new(ReasonCode::Disconnected, "cut"))
        } else {
            Event::Timeout
        });
        let verdict = Verdict::Lost(Record { epoch: Epoch(9), owner: OwnerId([4, 5]) });
        assert_eq!(s.on_event(Event::Verdict { expected: Epoch(7), verdict }), [Action::Compete(Epoch(8))]);
        // ABORTED after that says nothing new.
        let reason = Reason::new(ReasonCode::State, "cannot load");
        let late = s.on_event(Event::Message(Message::Aborted { reason, epoch: Epoch(8) }));
        assert_eq!(late, []);
        let actions = s.on_event(Event::Verdict { expected: Epoch(8), verdict: Verdict::Won(Epoch(9)) });
        assert_eq!(actions.last(), Some(&Action::Resume(Some(Epoch(9)))));
    }
}
