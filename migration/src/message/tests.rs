use super::*;
use proptest::prelude::*;

fn bytes(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// xxh3-64 of no bytes.
const NOTHING: u64 = 0x2d06_8005_38d3_94c2;

fn stamp(n: u64) -> Stamp {
    Stamp { boot: [9; 16], mono_ns: n, real_ns: n + 1 }
}

/// One of each, with the xxh3-64 of its bytes: a change here breaks ports between builds and needs a new version.
#[test]
fn golden() {
    let all: Vec<(Message, u64)> = vec![
        (Message::Hello(hello()), 0x62dc_f536_490f_5282),
        (Message::Welcome { version: 1, features: 2 }, 0x07ee_86c2_8144_6bef),
        (Message::Refuse(Reason::new(ReasonCode::Memory, "no")), 0x5c8e_21f6_e910_28c9),
        (Message::Describe(description()), 0x7300_5bc4_621e_1dc0),
        (Message::Ready { owner: OwnerId([1, 2]), epoch: Epoch(3) }, 0x7c68_b490_6e7e_a780),
        (Message::Round { round: 1, pages: 2 }, 0x07ee_86c2_8144_6bef),
        (Message::RoundDone { round: 1 }, 0x2fbc_5935_64db_792e),
        (Message::Pausing, NOTHING),
        (Message::Loaded, NOTHING),
        (Message::Commit { epoch: Epoch(1), paused: stamp(5) }, 0x5ad3_94b2_d101_bed8),
        (Message::Running { epoch: Epoch(1), entered: stamp(5), steps: [1, 2, 3, 4] }, 0x84b4_dc03_ccc1_a986),
        (Message::Aborted { reason: Reason::new(ReasonCode::State, "bad"), epoch: Epoch(4) }, 0x04ce_9bc4_1864_458e),
        (Message::Cancel(Reason::new(ReasonCode::Cancelled, "stop")), 0x0336_9d70_d538_63e4),
        (Message::Done { frames: 3 }, 0x4d92_2029_c1f4_2e7d),
        (Message::Switched { device: 1 }, 0x2fbc_5935_64db_792e),
        (Message::Opened { switched: 1, late: 2, waited_ns: 3 }, 0x9b15_0fb2_dc29_0547),
    ];
    let got: Vec<u64> = all.iter().map(|(m, _)| xxhash_rust::xxh3::xxh3_64(&bytes(m))).collect();
    let expected: Vec<u64> = all.iter().map(|(_, sum)| *sum).collect();
    assert_eq!(got, expected, "{got:#018x?}");
    // PAGES and STATE have golden bytes beside their own modules, FRAMES below.
    let bulk = [FrameType::Pages, FrameType::State, FrameType::Frames];
    for frame_type in FrameType::ALL {
        let here = all.iter().any(|(m, _)| m.frame_type() == frame_type);
        assert!(here != bulk.contains(&frame_type), "{}", frame_type.name());
    }
}

/// A ticket stands behind all that a HELLO without one has.
#[test]
fn golden_hello_with_a_ticket() {
    let with = hello().with_ticket(b"ticket".to_vec());
    assert_eq!(with.required, 3 | 1 << 8);
    let mut expected = bytes(&Message::Hello(Hello { required: with.required, ticket: Vec::new(), ..hello() }));
    assert!(expected.ends_with(&[11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    expected.truncate(expected.len() - 4);
    expected.extend_from_slice(b"\x06\0\0\0ticket");
    assert_eq!(bytes(&Message::Hello(with)), expected);
    let too_long = hello().with_ticket(vec![0; TICKET_MAX + 1]);
    assert!(matches!(Message::parse(FrameType::Hello, &bytes(&Message::Hello(too_long))), Err(Error::Bound { .. })));
}

#[test]
fn golden_frames() {
    let mut got = Vec::new();
    Frames { device: 2, frames: vec![b"abc", b""] }.encode(&mut got);
    assert_eq!(got, *b"\x02\0\0\0\x02\0\0\0\x03\0\0\0abc\0\0\0\0");
    // Counts and lengths are bounded whatever is there.
    for (at, value) in [(4, NET_FRAMES_MAX as u32 + 1), (8, NET_FRAME_MAX as u32 + 1), (4, u32::MAX), (8, u32::MAX)] {
        let mut bad = got.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(matches!(Frames::parse(&bad), Err(Error::Bound { .. })), "{value} at {at}");
    }
}

#[test]
fn golden_commit() {
    let mut expected = vec![1, 0, 0, 0, 0, 0, 0, 0];
    expected.extend_from_slice(&[9; 16]);
    expected.extend_from_slice(&[5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes(&Message::Commit { epoch: Epoch(1), paused: stamp(5) }), expected);
}

fn hello() -> Hello {
    Hello {
        min_version: 1,
        max_version: 2,
        required: 3,
        offered: 4,
        port: [5, 6],
        vm_id: 7,
        owner: OwnerId([8, 9]),
        ownership: Ownership::Arbiter,
        epoch: Epoch(10),
        memory_size: 11,
        ticket: Vec::new(),
    }
}

fn description() -> Description {
    Description {
        memory_size: 1 << 26,
        vcpus: 1,
        tsc_khz: 2_000_000,
        cpu: vec![CpuLeaf { function: 1, index: 0, flags: 0, registers: [1, 2, 3, 4] }],
        config: b"{}".to_vec(),
    }
}

#[test]
fn hostile_counts_are_bounded_before_allocation() {
    let mut b = bytes(&Message::Describe(description()));
    b[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Message::parse(FrameType::Describe, &b), Err(Error::Bound { .. })));
    let mut frames = vec![0; 4];
    frames.extend_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Frames::parse(&frames), Err(Error::Bound { .. })));
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let reason = Reason::new(ReasonCode::Internal, "ä".repeat(TEXT_MAX));
    let Message::Refuse(got) = Message::parse(FrameType::Refuse, &bytes(&Message::Refuse(reason))).unwrap() else {
        panic!("not a refusal")
    };
    assert_eq!(got.text, "ä".repeat(TEXT_MAX / 2));
}

#[test]
fn stamps_of_different_boots_are_compared_by_the_calendar() {
    let a = Stamp { boot: [1; 16], mono_ns: 100, real_ns: 1000 };
    let b = Stamp { boot: [1; 16], mono_ns: 150, real_ns: 900 };
    let c = Stamp { boot: [2; 16], mono_ns: 0, real_ns: 1300 };
    assert_eq!((b.since(&a), a.since(&b), c.since(&a), a.since(&c)), (50, 0, 300, 0));
}

fn any_reason() -> impl Strategy<Value = Reason> {
    (0..ReasonCode::ALL.len(), ".{0,40}").prop_map(|(i, text)| Reason { code: ReasonCode::ALL[i], text })
}

fn any_stamp() -> impl Strategy<Value = Stamp> {
    (any::<[u8; 16]>(), any::<u64>(), any::<u64>()).prop_map(|(boot, mono_ns, real_ns)| Stamp {
        boot,
        mono_ns,
        real_ns,
    })
}

fn any_message() -> impl Strategy<Value = Message> {
    let hello = (any::<[u16; 2]>(), any::<[u64; 9]>(), any::<bool>()).prop_map(|(v, n, arbiter)| {
        Message::Hello(Hello {
            min_version: v[0],
            max_version: v[1],
            required: n[0],
            offered: n[1],
            port: [n[2], n[3]],
            vm_id: n[4],
            owner: OwnerId([n[5], n[6]]),
            ownership: if arbiter { Ownership::Arbiter } else { Ownership::Stream },
            epoch: Epoch(n[7]),
            memory_size: n[8],
            ticket: if n[0] & feature::TICKET == 0 {
                Vec::new()
            } else {
                n[1].to_le_bytes()[..v[0] as usize % 9].to_vec()
            },
        })
    });
    let describe = (
        any::<u64>(),
        any::<[u32; 2]>(),
        prop::collection::vec(any::<[u32; 7]>(), 0..10),
        prop::collection::vec(any::<u8>(), 0..100),
    )
        .prop_map(|(memory_size, n, leaves, config)| {
            let cpu = leaves
                .into_iter()
                .map(|l| CpuLeaf { function: l[0], index: l[1], flags: l[2], registers: [l[3], l[4], l[5], l[6]] })
                .collect();
            Message::Describe(Description { memory_size, vcpus: n[0], tsc_khz: n[1], cpu, config })
        });
    prop_oneof![
        hello,
        describe,
        (any::<u16>(), any::<u64>()).prop_map(|(version, features)| Message::Welcome { version, features }),
        any_reason().prop_map(Message::Refuse),
        any_reason().prop_map(Message::Cancel),
        any::<[u64; 3]>().prop_map(|n| Message::Ready { owner: OwnerId([n[0], n[1]]), epoch: Epoch(n[2]) }),
        (any::<u32>(), any::<u64>()).prop_map(|(round, pages)| Message::Round { round, pages }),
        any::<u32>().prop_map(|round| Message::RoundDone { round }),
        Just(Message::Pausing),
        Just(Message::Loaded),
        (any::<u64>(), any_stamp()).prop_map(|(e, paused)| Message::Commit { epoch: Epoch(e), paused }),
        (any::<u64>(), any_stamp(), any::<[u64; 4]>()).prop_map(|(e, entered, steps)| Message::Running {
            epoch: Epoch(e),
            entered,
            steps
        }),
        (any_reason(), any::<u64>()).prop_map(|(reason, e)| Message::Aborted { reason, epoch: Epoch(e) }),
        any::<u64>().prop_map(|frames| Message::Done { frames }),
        any::<u32>().prop_map(|device| Message::Switched { device }),
        (any::<u32>(), any::<u32>(), any::<u64>()).prop_map(|(switched, late, waited_ns)| Message::Opened {
            switched,
            late,
            waited_ns
        }),
    ]
}

proptest! {
    #[test]
    fn round_trip(message in any_message()) {
        let b = bytes(&message);
        prop_assert!(b.len() <= crate::wire::CONTROL_MAX);
        prop_assert_eq!(Message::parse(message.frame_type(), &b), Ok(message.clone()));
        for cut in 0..b.len() {
            prop_assert!(Message::parse(message.frame_type(), &b[..cut]).is_err());
        }
        let mut longer = b;
        longer.push(0);
        prop_assert!(Message::parse(message.frame_type(), &longer).is_err());
    }

    #[test]
    fn any_bytes(number in 1u16..=FrameType::ALL.len() as u16, b in prop::collection::vec(any::<u8>(), 0..200)) {
        let frame_type = FrameType::from_number(number).unwrap();
        if let Ok(message) = Message::parse(frame_type, &b) {
            prop_assert_eq!(bytes(&message), b);
        }
    }

    #[test]
    fn frames_round_trip(device in any::<u32>(), frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
        let value = Frames { device, frames: frames.iter().map(|f| &f[..]).collect() };
        let mut b = Vec::new();
        value.encode(&mut b);
        prop_assert_eq!(Frames::parse(&b), Ok(value));
        for cut in 0..b.len() {
            prop_assert!(Frames::parse(&b[..cut]).is_err());
        }
    }
}
