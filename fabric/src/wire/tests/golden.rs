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
        "",
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
        "",
    );
    check(Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(6) }), "");
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
        "",
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
        "",
    );
    check(Frame::Response { slot: Slot(0), sequence: Sequence(1), outcome: Err(Status::NotFound.into()) }, "");
    check(Frame::Refused { epoch: Epoch(5), slot: Slot(3), sequence: Sequence(9), reason: Refusal::Busy }, "");
}

#[test]
fn ownership() {
    check(Frame::OwnerGet { vm_id: VM }, "");
    check(Frame::OwnerRecord(RECORD), "");
    check(Frame::OwnerCas { vm_id: VM, expect: Epoch(5), owner: OWNER }, "");
    check(Frame::OwnerCasResult { status: CasStatus::Won, record: RECORD }, "");
}

#[test]
fn connection() {
    check(Frame::Ping { token: 7 }, "");
    check(Frame::Pong { token: 7 }, "");
    check(Frame::Goodbye { reason: Farewell::Superseded }, "");
}
