use super::*;
use crate::message::Stamp;
use crate::ownership::Record;

const MEMORY: u64 = 64 << 20;

fn hello(ownership: Ownership) -> Hello {
    Hello {
        min_version: VERSION_MIN,
        max_version: VERSION_MAX,
        required: 0,
        offered: 0,
        port: [1, 2],
        vm_id: 3,
        owner: OwnerId([4, 5]),
        ownership,
        epoch: Epoch(7),
        memory_size: MEMORY,
        ticket: Vec::new(),
    }
}

#[test]
fn an_arbiter_does_not_decide_from_epoch_0() {
    for (ownership, phase) in [(Ownership::Arbiter, Phase::Destroyed), (Ownership::Stream, Phase::Describe)] {
        let mut d = Destination::new(MEMORY);
        let actions = d.on_event(Event::Message(Message::Hello(Hello { epoch: Epoch(0), ..hello(ownership) })));
        assert_eq!(d.phase(), phase);
        let refused = matches!(&actions[0], Action::Send(Message::Refuse(r)) if r.code == ReasonCode::NotOwner);
        assert_eq!(refused, ownership == Ownership::Arbiter, "{actions:?}");
    }
}

fn commit() -> Event {
    Event::Message(Message::Commit { epoch: Epoch(7), paused: Stamp::default() })
}

fn cut() -> Event {
    Event::Disconnected(Reason::new(ReasonCode::Disconnected, "cut"))
}

/// The events up to, not including, COMMIT.
fn script(ownership: Ownership) -> Vec<(Event, Phase)> {
    let description = Description { memory_size: MEMORY, ..Description::default() };
    let mut steps = vec![
        (Event::Message(Message::Hello(hello(ownership))), Phase::Describe),
        (Event::Message(Message::Describe(description)), Phase::Preparing),
        (Event::Prepared { owner: OwnerId([6, 6]), epoch: Epoch(7) }, Phase::Receiving),
        (Event::Bulk(FrameType::Pages), Phase::Receiving),
        (Event::Message(Message::Round { round: 0, pages: 1 }), Phase::Receiving),
        (Event::Message(Message::Pausing), Phase::Receiving),
    ];
    if ownership == Ownership::Stream {
        steps.push((Event::Bulk(FrameType::State), Phase::Loading));
        steps.push((Event::Loaded, Phase::Loaded));
    } else {
        steps.push((Event::Bulk(FrameType::State), Phase::Receiving));
    }
    steps
}

fn at(ownership: Ownership, length: usize) -> Destination {
    let mut d = Destination::new(MEMORY);
    for (event, phase) in &script(ownership)[..length] {
        d.on_event(event.clone());
        assert_eq!(d.phase(), *phase, "after {event:?}");
    }
    d
}

#[test]
fn runs_when_loaded_and_won_in_either_order() {
    for loaded_first in [true, false] {
        let mut d = at(Ownership::Arbiter, 7);
        assert_eq!(d.on_event(commit()), [Action::Compete(Epoch(7)), Action::Load]);
        let mut events = [Event::Loaded, Event::Verdict(Verdict::Won(Epoch(8)))];
        if !loaded_first {
            events.reverse();
        }
        let [first, second] = events;
        assert_eq!(d.on_event(first), []);
        // Losing the source now changes nothing.
        assert_eq!(d.on_event(cut()), []);
        assert_eq!(d.on_event(second), [Action::Run(Some(Epoch(8)))]);
    }
}

#[test]
fn does_not_run_when_lost_or_failed() {
    let mut d = at(Ownership::Arbiter, 7);
    d.on_event(commit());
    let lost = Verdict::Lost(Record { epoch: Epoch(8), owner: OwnerId([4, 5]) });
    let actions = d.on_event(Event::Verdict(lost));
    assert!(actions.contains(&Action::Destroy));
    assert!(!actions.iter().any(|a| matches!(a, Action::GiveBack { .. })), "it was not this side's");
    assert_eq!(d.on_event(Event::Loaded), []);

    let mut d = at(Ownership::Arbiter, 7);
    d.on_event(commit());
    let reason = Reason::new(ReasonCode::State, "bad");
    assert_eq!(d.on_event(Event::Failed(reason.clone())), [], "the arbiter may have said yes already");
    let actions = d.on_event(Event::Verdict(Verdict::Won(Epoch(8))));
    assert_eq!(actions[0], Action::Send(Message::Aborted { reason, epoch: Epoch(8) }));
    assert_eq!(actions[1], Action::GiveBack { epoch: Epoch(8), owner: OwnerId([4, 5]) });
    assert!(actions.contains(&Action::Destroy));
}

#[test]
fn commit_without_state_is_not_taken() {
    for ownership in [Ownership::Arbiter, Ownership::Stream] {
        for length in 0..=6 {
            let mut d = at(ownership, length);
            let actions = d.on_event(commit());
            assert!(actions.contains(&Action::Destroy), "{ownership:?} after {length} steps: {actions:?}");
        }
    }
}

#[test]
fn every_phase_before_commit_can_be_cancelled_cut_timed_out_and_failed() {
    for ownership in [Ownership::Arbiter, Ownership::Stream] {
        for length in 0..=script(ownership).len() {
            let reason = Reason::new(ReasonCode::Cancelled, "stop");
            let cancel = Event::Message(Message::Cancel(reason.clone()));
            for event in [cancel, Event::Cancel, cut(), Event::Timeout, Event::Failed(reason.clone())] {
                let mut d = at(ownership, length);
                let actions = d.on_event(event.clone());
                assert!(actions.contains(&Action::Destroy), "{event:?} after {length} steps: {actions:?}");
                assert_eq!(d.phase(), Phase::Destroyed);
                assert_eq!(d.on_event(commit()), []);
            }
        }
    }
}

#[test]
fn refuses_before_anything_is_made() {
    let refused = |hello: Hello, memory: u64| {
        let mut d = Destination::new(memory);
        let actions = d.on_event(Event::Message(Message::Hello(hello)));
        assert!(!actions.iter().any(|a| matches!(a, Action::Prepare(_))));
        match &actions[0] {
            Action::Send(Message::Refuse(reason)) => reason.code,
            other => panic!("{other:?}"),
        }
    };
    let good = hello(Ownership::Arbiter);
    assert_eq!(refused(Hello { min_version: 9, max_version: 12, ..good.clone() }, MEMORY), ReasonCode::Version);
    assert_eq!(refused(Hello { min_version: 0, max_version: 0, ..good.clone() }, MEMORY), ReasonCode::Version);
    assert_eq!(refused(Hello { required: 1 << 40, ..good.clone() }, MEMORY), ReasonCode::Feature);
    assert_eq!(refused(good.clone(), MEMORY - 1), ReasonCode::Memory);
    let mut d = at(Ownership::Arbiter, 1);
    let swollen = Description { memory_size: MEMORY * 2, ..Description::default() };
    assert!(!d.on_event(Event::Message(Message::Describe(swollen))).iter().any(|a| matches!(a, Action::Prepare(_))));
}

#[test]
fn a_vm_that_runs_here_outlives_the_source() {
    let mut d = at(Ownership::Stream, 8);
    assert_eq!(d.on_event(commit()), [Action::Run(None)]);
    assert_eq!(d.on_event(Event::Bulk(FrameType::Frames)), []);
    assert_eq!(d.on_event(cut()), []);
    let running = Message::Running { epoch: Epoch(7), entered: Stamp::default(), steps: [0; 4] };
    assert_eq!(d.on_event(Event::Entered(running)), [Action::Close]);
    assert_eq!(d.phase(), Phase::Ended);
}

#[test]
fn opened_is_told_when_agreed_on_and_running() {
    let opened = Message::Opened { switched: 1, late: 0, waited_ns: 5 };
    for offered in [0, feature::KNOWN | 1 << 40] {
        let mut d = Destination::new(MEMORY);
        let hello = Hello { offered, ..hello(Ownership::Stream) };
        let features = offered & feature::KNOWN;
        let welcome = Message::Welcome { version: VERSION_MAX, features };
        assert_eq!(d.on_event(Event::Message(Message::Hello(hello))), [Action::Send(welcome)]);
        assert_eq!(d.features(), features);
        for (event, _) in &script(Ownership::Stream)[1..] {
            d.on_event(event.clone());
        }
        d.on_event(commit());
        // SWITCHED is the driver's; it may come before the first entry.
        assert_eq!(d.on_event(Event::Message(Message::Switched { device: 0 })), []);
        assert_eq!(d.on_event(Event::Opened(opened.clone())), [], "before RUNNING");
        d.on_event(Event::Entered(Message::Loaded));
        assert_eq!(d.phase(), Phase::Running);
        let told = d.on_event(Event::Opened(opened.clone()));
        assert_eq!(told, if features == 0 { vec![] } else { vec![Action::Send(opened.clone())] });
    }
    // Before COMMIT it is a violation.
    let mut d = at(Ownership::Arbiter, 7);
    d.on_event(Event::Message(Message::Switched { device: 0 }));
    assert_eq!(d.phase(), Phase::Destroyed);
}
