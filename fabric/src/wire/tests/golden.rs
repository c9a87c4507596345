//! The bytes of one frame of every kind. They are the protocol: they change with [`VERSION`] only.
use crate::fs::*;
use crate::id::*;
use crate::op::*;
use crate::owner::OwnerRecord;
use crate::wire::*;

fn check(frame: Frame, golden: &str) {
    let bytes = encode(frame.clone()).unwrap().into_vec();
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let golden: String = golden.split_whitespace().collect();
    assert_eq!(hex, golden, "{frame:?}");
    assert_eq!(FrameReader::new().push(&mut &bytes[..]).unwrap(), Some(frame));
}

const VM: VmId = VmId(0x1122);
const OWNER: Owner = Owner([0xa1, 0xb2]);
const RECORD: OwnerRecord = OwnerRecord { vm_id: VM, epoch: Epoch(6), session: Epoch(5), owner: OWNER };

#[test]
fn hello() {
    check(
        Frame::Hello(Hello {
            vm_id: VM,
            epoch: Epoch(5),
            owner: OWNER,
            nonce: 0x77,
            version_min: 1,
            version_max: 1,
            capabilities: 0,
        }),
        "4f52434601000100 5000000000000000 9129606cc02537bd 2211000000000000 0500000000000000 a100000000000000 \
         b200000000000000 7700000000000000 0100010000000000 0000000000000000",
    );
    check(
        Frame::Hello(Hello {
            vm_id: VM,
            epoch: Epoch(5),
            owner: OWNER,
            nonce: 0x77,
            version_min: 1,
            version_max: 1,
            capabilities: CLAIM,
        }),
        "4f52434601000100 5000000000000000 454511126a067243 2211000000000000 0500000000000000 a100000000000000 \
         b200000000000000 7700000000000000 0100010000000000 0100000000000000",
    );
    check(
        Frame::HelloAck(HelloAck {
            epoch: Epoch(5),
            boot_id: BootId(0x99),
            nonce: 0x77,
            version: 1,
            slots: 64,
            capabilities: 0,
        }),
        "4f52434601000200 4000000000000000 4871bfb75a36e686 0500000000000000 9900000000000000 7700000000000000 \
         0100400000000000 0000000000000000",
    );
    check(
        Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(6) }),
        "4f52434601000300 2800000000000000 4008097423b46098 0100060000000000 0000000000000000",
    );
}

#[test]
fn request() {
    check(
        Frame::Request {
            epoch: Epoch(5),
            slot: Slot(3),
            sequence: Sequence(9),
            request: Request {
                credential: Credential { uid: 1000, gid: 100, groups: vec![4, 24] },
                op: Op::Write {
                    handle: FileHandle { volume: VolumeId(1), generation: 2, inode: 0x42 },
                    offset: 4096,
                    stability: Stability::FileSync,
                    data: b"hello".to_vec(),
                },
            },
        },
        "4f52434601000400 6500000005000000 990be0913ff6d8ba 0500000000000000 0900000000000000 0300e80300006400 \
         0000020000000400 0000180000000800 0100000002000000 4200000000000000 0010000000000000 0200000000000000 \
         68656c6c6f",
    );
}

#[test]
fn response() {
    check(
        Frame::Response {
            slot: Slot(3),
            sequence: Sequence(9),
            outcome: Ok(Reply::Written {
                count: 5,
                stability: Stability::FileSync,
                verifier: 0x99,
                wcc: Wcc { before: Some((0, Time(1), Time(-1))), after: None },
            }),
        },
        "4f52434601000500 5000000000000000 f69d0541c74895c8 0900000000000000 0300080005000000 0299000000000000 \
         0001000000000000 0000010000000000 0000ffffffffffff ffff000000000000",
    );
    check(
        Frame::Response { slot: Slot(0), sequence: Sequence(1), outcome: Err(Status::NotFound.into()) },
        "4f52434601000500 3000000000000000 467ea8e81489c6d2 0100000000000000 0000000002000000 0000000000000000",
    );
    check(
        Frame::Refused { epoch: Epoch(5), slot: Slot(3), sequence: Sequence(9), reason: Refusal::Busy },
        "4f52434601000600 3800000000000000 4b3f96b6605f00ac 0500000000000000 0900000000000000 0300040000000000 \
         0000000000000000",
    );
}

#[test]
fn ownership() {
    check(Frame::OwnerGet { vm_id: VM }, "4f52434601000700 2000000000000000 3def56f7ec1e2a1a 2211000000000000");
    check(
        Frame::OwnerRecord(RECORD),
        "4f52434601000800 4000000000000000 a7ab4610c91072dd 2211000000000000 0600000000000000 0500000000000000 \
         a100000000000000 b200000000000000",
    );
    check(
        Frame::OwnerCas { vm_id: VM, expect: Epoch(5), owner: OWNER },
        "4f52434601000900 3800000000000000 95fc2b1f7dc412a7 2211000000000000 0500000000000000 a100000000000000 \
         b200000000000000",
    );
    check(
        Frame::OwnerReserve { vm_id: VM, epoch: Epoch(5), owner: OWNER, heir: Owner([0xc3, 0xd4]) },
        "4f52434601000e00 4800000000000000 1b3051a29771f135 2211000000000000 0500000000000000 a100000000000000 \
         b200000000000000 c300000000000000 d400000000000000",
    );
    check(
        Frame::OwnerRelease { vm_id: VM, epoch: Epoch(5), owner: OWNER },
        "4f52434601000f00 3800000000000000 893dd688fa3d6b3f 2211000000000000 0500000000000000 a100000000000000 \
         b200000000000000",
    );
    check(
        Frame::OwnerCasResult { status: CasStatus::Won, record: RECORD },
        "4f52434601000a00 4800000000000000 f55a27db70d6af2c 2211000000000000 0600000000000000 0500000000000000 \
         a100000000000000 b200000000000000 0100000000000000",
    );
    check(
        Frame::OwnerCasResult { status: CasStatus::Behind, record: RECORD },
        "4f52434601000a00 4800000000000000 320cc35b3bf2aed5 2211000000000000 0600000000000000 0500000000000000 \
         a100000000000000 b200000000000000 0500000000000000",
    );
}

#[test]
fn ownership_as_a_vmm_asks() {
    assert_eq!(owner_get(VM).unwrap(), encode(Frame::OwnerGet { vm_id: VM }).unwrap().head);
    let cas = owner_cas(VM, Epoch(5), OWNER).unwrap();
    assert_eq!(cas, encode(Frame::OwnerCas { vm_id: VM, expect: Epoch(5), owner: OWNER }).unwrap().head);
    let mut answers = encode(Frame::OwnerRecord(RECORD)).unwrap().head;
    answers.extend(encode(Frame::OwnerCasResult { status: CasStatus::Lost, record: RECORD }).unwrap().head);
    answers.extend(encode(Frame::Pong { token: 1 }).unwrap().head);
    let (mut reader, mut rest) = (OwnerAnswers::new(), &answers[..]);
    assert_eq!(reader.push(&mut rest), Ok(Some(OwnerAnswer::Record(RECORD))));
    assert_eq!(reader.push(&mut rest), Ok(Some(OwnerAnswer::Cas(CasStatus::Lost, RECORD))));
    assert!(reader.push(&mut rest).is_err());
}

#[test]
fn connection() {
    check(Frame::Ping { token: 7 }, "4f52434601000b00 2000000000000000 7a8668f889070683 0700000000000000");
    check(Frame::Pong { token: 7 }, "4f52434601000c00 2000000000000000 a1f6e18f60998da7 0700000000000000");
    check(
        Frame::Goodbye { reason: Farewell::Superseded },
        "4f52434601000d00 2000000000000000 caff0739a78380da 0200000000000000",
    );
}
