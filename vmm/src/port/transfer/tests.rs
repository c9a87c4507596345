use super::super::residue::Residue;
use super::*;
use migration::message::{Message, feature};
use std::net::{TcpListener, TcpStream};

const SIZE: usize = 4 << 20;

fn memory() -> Memory {
    Memory::new(SIZE).unwrap()
}

fn fill(memory: &Memory, page: u64, byte: u8) {
    memory.ram().write_slice(&[byte; PAGE_SIZE], GuestAddress(page * 4096)).unwrap();
}

fn pair() -> (Connection, Connection) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = listener.local_addr().unwrap();
    let a = Connection::new(TcpStream::connect(peer).unwrap(), peer).unwrap();
    let (socket, from) = listener.accept().unwrap();
    (a, Connection::new(socket, from).unwrap())
}

fn receive(connection: &mut Connection, memory: &Memory, arrived: &mut Arrived, mut pages: u64) {
    while pages > 0 {
        if let Some(incoming) = connection.poll().unwrap() {
            assert_eq!(incoming.frame_type, FrameType::Pages);
            let parsed = Pages::parse(connection.payload(), &memory.ranges(), feature::SKIP).unwrap();
            pages -= arrived.apply(&parsed, memory).unwrap();
        }
    }
}

fn content(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.size()];
    memory.ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[test]
fn memory_arrives_over_a_connection() {
    let (mut a, mut b) = pair();
    let (from, to) = (memory(), memory());
    for page in [0, 1, 2, 77, 500, 511, 1023] {
        fill(&from, page, page as u8 | 1);
    }
    let mut arrived = Arrived::new(&to);
    let mut writer = PageWriter::new();
    let sent = writer
        .send(&mut Pending::all(&from), (&Dead::none(), &mut LeftOut::new(&from)), &from, &mut a, &|| false)
        .unwrap();
    assert_eq!((sent.raw, sent.zero), (7, 1024 - 7));
    receive(&mut b, &to, &mut arrived, sent.pages());
    assert_eq!(content(&from), content(&to));

    // A second round: one page changes, one becomes zero.
    from.take_own_dirty();
    fill(&from, 3, 9);
    fill(&from, 77, 0);
    let mut pending = Pending::none(&from);
    pending.add_own(&from);
    assert_eq!(pending.count(), 2);
    let mut residue = Residue::new();
    let sent = residue.collect(&mut pending, (&Dead::none(), &mut LeftOut::new(&from)), &from, &mut a).unwrap();
    assert_eq!((sent.raw, sent.zero, pending.count()), (1, 1, 0));
    residue.write(&from, &mut a, &[]).unwrap();
    receive(&mut b, &to, &mut arrived, 2);
    assert_eq!(content(&from), content(&to));

    // The last: more than one frame takes, in more runs than one system call takes.
    for page in (0..1024).step_by(2) {
        fill(&from, page, (page / 7) as u8);
    }
    pending.add_own(&from);
    residue.clear();
    let sent = residue.collect(&mut pending, (&Dead::none(), &mut LeftOut::new(&from)), &from, &mut a).unwrap();
    assert_eq!(sent.pages(), 512);
    let target = to.clone();
    let receiver = std::thread::spawn(move || {
        receive(&mut b, &target, &mut arrived, 512);
        let incoming = loop {
            if let Some(incoming) = b.poll().unwrap() {
                break incoming;
            }
        };
        assert_eq!(b.message(incoming).unwrap(), Message::Pausing);
    });
    let mut rest = Vec::new();
    a.seal_message(&Message::Pausing, &mut rest);
    residue.write(&from, &mut a, &rest).unwrap();
    receiver.join().unwrap();
    assert_eq!(content(&from), content(&to));
}

/// A page in a buffer is left out, comes when it has been written and is no buffer any more, and is left out again.
#[test]
fn pages_without_content_do_not_arrive() {
    let (mut a, mut b) = pair();
    let (from, to) = (memory(), memory());
    for page in 0..8 {
        fill(&from, page, page as u8 | 1);
    }
    let buffers = |first: u64, pages: u32| {
        Dead::of(&from, vec![from.range(GuestAddress(first * 4096), pages * 4096).unwrap()], Vec::new())
    };
    let (mut arrived, mut left_out) = (Arrived::new(&to), LeftOut::new(&from));
    let mut writer = PageWriter::new();
    let dead = buffers(2, 4);
    let sent = writer.send(&mut Pending::all(&from), (&dead, &mut left_out), &from, &mut a, &|| false).unwrap();
    assert_eq!((sent.raw, sent.zero, sent.skipped.posted), (4, 1024 - 8, 4));
    receive(&mut b, &to, &mut arrived, 1024);
    assert_eq!(content(&to)[2 * 4096..6 * 4096], [0; 4 * 4096]);
    assert_ne!(content(&from), content(&to));
    assert_eq!(digest(&from, &left_out).unwrap(), digest(&to, arrived.left_out()).unwrap());

    // The guest gets pages 2 and 3 back and writes; page 4 is written and posted again.
    from.take_own_dirty();
    [2, 4].iter().for_each(|page| fill(&from, *page, 9));
    let mut pending = Pending::none(&from);
    pending.add_own(&from);
    let mut residue = Residue::new();
    let sent = residue.collect(&mut pending, (&buffers(4, 2), &mut left_out), &from, &mut a).unwrap();
    assert_eq!((sent.raw, sent.zero, sent.skipped.posted), (1, 0, 1));
    residue.write(&from, &mut a, &[]).unwrap();
    receive(&mut b, &to, &mut arrived, 2);
    assert_eq!(content(&to)[2 * 4096..3 * 4096], [9; 4096]);
    let there = digest(&from, &left_out).unwrap();
    assert_eq!(there, digest(&to, arrived.left_out()).unwrap());

    // Poison hits those left out and no other; a difference anywhere else shows.
    assert_eq!(arrived.poison(&to).unwrap(), 3);
    assert_eq!(content(&to)[3 * 4096..6 * 4096], [POISON; 3 * 4096]);
    assert_eq!(there, digest(&to, arrived.left_out()).unwrap());
    fill(&to, 6, 1);
    assert_ne!(there, digest(&to, arrived.left_out()).unwrap());
}

#[test]
fn untouched_pages_need_not_be_sent() {
    let memory = memory();
    assert_eq!(Pending::populated(&memory).count(), 0);
    fill(&memory, 600, 1);
    // With large pages more is there than was touched; what was touched must be.
    let pending = Pending::populated(&memory);
    assert!(pending.count() >= 1 && pending.count() <= 512);
    assert_ne!(pending.words[600 / 64] & 1 << (600 % 64), 0);
}

#[test]
fn more_pages_than_fit_one_frame() {
    let (mut a, mut b) = pair();
    let (from, to) = (memory(), memory());
    for page in 0..1024 {
        if page % 3 != 0 {
            fill(&from, page, page as u8 | 1);
        }
    }
    let mut arrived = Arrived::new(&to);
    let (source, sent) = (from.clone(), 1024);
    let sender = std::thread::spawn(move || {
        PageWriter::new()
            .send(&mut Pending::all(&source), (&Dead::none(), &mut LeftOut::new(&source)), &source, &mut a, &|| false)
            .unwrap();
        a
    });
    receive(&mut b, &to, &mut arrived, sent);
    sender.join().unwrap();
    assert_eq!(content(&from), content(&to));
}

#[test]
fn a_blocked_send_can_be_stopped() {
    let (mut a, _b) = pair();
    let from = Memory::new(64 << 20).unwrap();
    for page in 0..(from.size() / PAGE_SIZE) as u64 {
        fill(&from, page, 1);
    }
    let asked = std::cell::Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() > 30
    };
    let result = PageWriter::new().send(
        &mut Pending::all(&from),
        (&Dead::none(), &mut LeftOut::new(&from)),
        &from,
        &mut a,
        &stop,
    );
    assert!(matches!(result, Err(SendError::Connection(ConnectionError::Stopped))), "{result:?}");
}
