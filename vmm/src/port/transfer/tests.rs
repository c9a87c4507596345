use super::super::residue::Residue;
use super::*;
use migration::message::Message;
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

fn receive(connection: &mut Connection, memory: &Memory, touched: &mut [u64], mut pages: u64) {
    while pages > 0 {
        if let Some(incoming) = connection.poll().unwrap() {
            assert_eq!(incoming.frame_type, FrameType::Pages);
            let parsed = Pages::parse(connection.payload(), &memory.ranges()).unwrap();
            pages -= apply(&parsed, memory, touched).unwrap();
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
    let mut touched = vec![0; to.bitmap_words()];
    let mut writer = PageWriter::new();
    let sent = writer.send(&mut Pending::all(&from), &from, &mut a, &|| false).unwrap();
    assert_eq!((sent.raw, sent.zero), (7, 1024 - 7));
    receive(&mut b, &to, &mut touched, sent.pages());
    assert_eq!(content(&from), content(&to));

    // A second round: one page changes, one becomes zero.
    from.take_own_dirty();
    fill(&from, 3, 9);
    fill(&from, 77, 0);
    let mut pending = Pending::none(&from);
    pending.add_own(&from);
    assert_eq!(pending.count(), 2);
    let mut residue = Residue::new();
    let sent = residue.collect(&mut pending, &from, &mut a).unwrap();
    assert_eq!((sent.raw, sent.zero, pending.count()), (1, 1, 0));
    residue.write(&from, &mut a, &[]).unwrap();
    receive(&mut b, &to, &mut touched, 2);
    assert_eq!(content(&from), content(&to));

    // The last: more than one frame takes, in more runs than one system call takes.
    for page in (0..1024).step_by(2) {
        fill(&from, page, (page / 7) as u8);
    }
    pending.add_own(&from);
    residue.clear();
    let sent = residue.collect(&mut pending, &from, &mut a).unwrap();
    assert_eq!(sent.pages(), 512);
    let target = to.clone();
    let receiver = std::thread::spawn(move || {
        receive(&mut b, &target, &mut touched, 512);
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
    let mut touched = vec![0; to.bitmap_words()];
    let (source, sent) = (from.clone(), 1024);
    let sender = std::thread::spawn(move || {
        PageWriter::new().send(&mut Pending::all(&source), &source, &mut a, &|| false).unwrap();
        a
    });
    receive(&mut b, &to, &mut touched, sent);
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
    let result = PageWriter::new().send(&mut Pending::all(&from), &from, &mut a, &stop);
    assert!(matches!(result, Err(SendError::Connection(ConnectionError::Stopped))), "{result:?}");
}
