use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use fabric::id::{Epoch as CfEpoch, Owner, VmId};
use fabric::owner::OwnerRecord;
use fabric::wire::{CasStatus, Frame, FrameReader, encode};

use super::*;

const DESTINATION: OwnerId = OwnerId([5, 6]);
const SOURCE: OwnerId = OwnerId([7, 8]);

/// Where nobody listens.
fn nowhere() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Takes one question, and answers it like this.
fn answer(address: SocketAddr, status: CasStatus) -> Frame {
    let listener = TcpListener::bind(address).unwrap();
    let (mut socket, _) = listener.accept().unwrap();
    let (mut reader, mut buffer) = (FrameReader::default(), [0; 512]);
    let question = loop {
        let n = socket.read(&mut buffer).unwrap();
        if let Some(frame) = reader.push(&mut &buffer[..n]).unwrap() {
            break frame;
        }
    };
    let result = Frame::OwnerCasResult { status, record: OwnerRecord::default() };
    socket.write_all(&encode(result).unwrap().into_vec()).unwrap();
    question
}

fn ended(vm_id: u64) -> bool {
    all().iter().filter(|p| p.vm_id == vm_id).all(|p| p.is_over_by(Instant::now() + Duration::from_secs(30)))
}

#[test]
fn a_word_is_said_until_it_is_heard() {
    let (vm_id, address) = (71, nowhere());
    say(Arbiter::new(address, vm_id, DESTINATION), Word::GiveBack(Epoch(8), SOURCE));
    let expected = Frame::OwnerCas { vm_id: VmId(vm_id), expect: CfEpoch(8), owner: Owner(SOURCE.0) };
    // Its disk does not take it; then it has it from somebody else.
    assert_eq!(answer(address, CasStatus::Unknown), expected);
    assert_eq!(answer(address, CasStatus::Lost), expected);
    assert!(ended(vm_id));
}

#[test]
fn the_next_port_of_the_vm_ends_what_is_said() {
    let address = nowhere();
    for vm_id in [72, 73] {
        say(Arbiter::new(address, vm_id, DESTINATION), Word::Renounce(Epoch(8)));
    }
    assert!(settle(72));
    // Another VM's is still said.
    let owner = Owner(DESTINATION.0);
    let heir = Owner::default();
    let expected = Frame::OwnerReserve { vm_id: VmId(73), epoch: CfEpoch(8), owner, heir };
    assert_eq!(answer(address, CasStatus::Won), expected);
    assert!(ended(73));
}

#[test]
fn a_process_that_ends_says_it_once_more_and_waits_no_longer() {
    let vm_id = 74;
    let parting = Arc::new(Parting { vm_id, stage: Mutex::new(Stage::Last), changed: Condvar::new() });
    // Nobody listens: with time left it would be said again.
    parting.run(Arbiter::new(nowhere(), vm_id, DESTINATION), Word::Renounce(Epoch(8)));
    assert_eq!(*parting.stage(), Stage::Over);
    parting.enter(Stage::Stopped);
    assert_eq!(*parting.stage(), Stage::Over, "the end is the end");
}
