//! The engine as a client meets it, message by message.
#![allow(clippy::unwrap_used)] // these are tests
use fabric::fs::Credential;
use fabric::op::{Op, Outcome};
use nfs::engine::Engine;
use nfs::export::{Access, NOBODY};
use nfs::service::{FileService, Unreachable};
use nfs::xdr::{Reader, Writer};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use support::message::*;
use support::volume::Volume;
use support::{block_on, config, service};

mod support;

/// The file system, with a gate before it and a record of what came through.
struct Gated {
    volume: Volume,
    open: Cell<bool>,
    gone: Cell<bool>,
    calls: RefCell<Vec<(Credential, Op)>>,
}

impl Gated {
    fn new() -> Self {
        Gated { volume: service(), open: Cell::new(true), gone: Cell::new(false), calls: RefCell::default() }
    }
}

impl FileService for Gated {
    async fn call(&self, credential: Credential, op: Op) -> Result<Outcome, Unreachable> {
        poll_fn(|_| if self.open.get() { Poll::Ready(()) } else { Poll::Pending }).await;
        if self.gone.get() {
            return Err(Unreachable);
        }
        self.calls.borrow_mut().push((credential.clone(), op.clone()));
        self.volume.call(credential, op).await
    }
}

type TestEngine = Engine<Gated>;

fn engine() -> TestEngine {
    Engine::new(Gated::new(), config())
}

/// Asks from port 700; the reply's results.
fn ask(engine: &TestEngine, xid: u32, program: u32, procedure: u32, arguments: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let message = call(xid, program, procedure, arguments);
    results(&block_on(engine.handle(peer(700), record(message))).unwrap(), xid)
}

fn mount(engine: &TestEngine, path: &str) -> Vec<u8> {
    ask(engine, 1, MOUNT, 1, |out| {
        out.opaque(path.as_bytes());
    })
}

fn make_dir(root: &[u8], name: &str) -> impl Fn(&mut Writer) {
    move |out| {
        out.opaque(root).opaque(name.as_bytes()).raw(&[0; 24]);
    }
}

fn status(results: &[u8]) -> u32 {
    Reader::new(results).u32().unwrap()
}

#[test]
fn unknown_programs_versions_and_procedures() {
    let engine = engine();
    let reply = |program, version, procedure| {
        let message = call_as((0, 0), 5, program, version, procedure, |_| {});
        bytes(&block_on(engine.handle(peer(700), record(message))).unwrap())
    };
    let word = |bytes: &[u8], index: usize| u32::from_be_bytes(bytes[index * 4..index * 4 + 4].try_into().unwrap());
    assert_eq!(word(&reply(100_021, 3, 0), 5), 1, "PROG_UNAVAIL");
    for (program, version, low, high) in [(NFS, 2, 3, 3), (NFS, 4, 3, 3), (MOUNT, 1, 3, 3), (100_000, 5, 2, 4)] {
        let reply = reply(program, version, 0);
        assert_eq!([5, 6, 7].map(|index| word(&reply, index)), [2, low, high], "PROG_MISMATCH");
    }
    assert_eq!(word(&reply(NFS, 3, 22), 5), 3, "PROC_UNAVAIL");
    assert_eq!(word(&reply(MOUNT, 3, 6), 5), 3, "PROC_UNAVAIL");
    assert_eq!(word(&reply(NFS, 3, 1), 5), 4, "GARBAGE_ARGS");
    assert_eq!(reply(NFS, 3, 0).len(), 24, "NULL");
    assert_eq!(reply(MOUNT, 3, 0).len(), 24, "NULL");
}

#[test]
fn mounting() {
    let engine = engine();
    let root = mounted(&mount(&engine, "/vol0"));
    assert_eq!(status(&ask(&engine, 2, NFS, 9, make_dir(&root, "sub"))), 0);
    let sub = mounted(&mount(&engine, "/vol0/sub/"));
    assert_ne!(root, sub);
    assert_eq!(status(&mount(&engine, "/vol0/none")), 2);
    assert_eq!(status(&mount(&engine, "/elsewhere")), 2);
    assert_eq!(status(&mount(&engine, "/vol0/../vol0")), 13);
    assert_eq!(status(&mount(&engine, "/vol0/a\0b")), 22);
    let create = |out: &mut Writer| {
        out.opaque(&root).opaque(b"file").u32(0).raw(&[0; 24]);
    };
    assert_eq!(status(&ask(&engine, 3, NFS, 8, create)), 0);
    assert_eq!(status(&mount(&engine, "/vol0/file")), 20, "not a directory");

    let dump = ask(&engine, 4, MOUNT, 2, |_| {});
    let mut reader = Reader::new(&dump);
    for path in [b"/vol0".as_slice(), b"/vol0/sub/"] {
        assert_eq!(reader.bool(), Ok(true));
        assert_eq!(reader.opaque(99), Ok(b"10.0.0.1".as_slice()));
        assert_eq!(reader.opaque(99), Ok(path));
    }
    assert_eq!(reader.bool(), Ok(false));
    let umount = |out: &mut Writer| {
        out.opaque(b"/vol0");
    };
    assert_eq!(ask(&engine, 5, MOUNT, 3, umount), []);
    assert_eq!(ask(&engine, 6, MOUNT, 2, |_| {}).len(), 4 + 12 + 4 + 12 + 4);
    assert_eq!(ask(&engine, 7, MOUNT, 4, |_| {}), []);
    assert_eq!(ask(&engine, 8, MOUNT, 2, |_| {}), [0; 4]);
    let exports = ask(&engine, 9, MOUNT, 5, |_| {});
    assert_eq!(exports, [0, 0, 0, 1, 0, 0, 0, 5, b'/', b'v', b'o', b'l', b'0', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn handles_outlive_the_engine_and_strangers_are_stale() {
    let first = engine();
    let root = mounted(&mount(&first, "/vol0"));
    let get = |engine: &TestEngine, handle: &[u8]| {
        let handle = handle.to_vec();
        status(&ask(engine, 9, NFS, 1, |out| {
            out.opaque(&handle);
        }))
    };
    assert_eq!(get(&first, &root), 0);
    assert_eq!(get(&engine(), &root), 0, "after a restart, without a mount");
    let mut handle = nfs::handle::decode(&root).unwrap();
    handle.volume.0 += 1;
    assert_eq!(get(&first, &nfs::handle::encode(handle)), 70, "a volume that is not exported");
    handle.volume.0 -= 1;
    handle.inode = 999;
    assert_eq!(get(&first, &nfs::handle::encode(handle)), 70);
    assert_eq!(get(&first, &[7; 24]), 10001);
    assert_eq!(get(&first, &[]), 10001);
}

#[test]
fn callers_are_squashed_and_ports_checked() {
    let mut config = config();
    config.access = Access::default();
    let engine = Engine::new(Gated::new(), config);
    let root = mounted(&mount(&engine, "/vol0"));
    let get = |auth: (u32, u32), port| {
        let message = call_as(auth, 3, NFS, 3, 1, |out| {
            out.opaque(&root);
        });
        bytes(&block_on(engine.handle(peer(port), record(message))).unwrap())
    };
    get((0, 0), 700);
    get((5, 6), 700);
    let by: Vec<_> = engine.service().calls.borrow().iter().rev().take(2).map(|(by, _)| by.clone()).collect();
    assert_eq!(by[0], Credential { uid: 5, gid: 6, groups: vec![6] });
    assert_eq!(by[1], Credential { uid: NOBODY, gid: NOBODY, groups: vec![NOBODY] });
    // MSG_DENIED, AUTH_ERROR, AUTH_TOOWEAK.
    assert_eq!(get((5, 6), 1024), [0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 5]);
    let message = call(4, MOUNT, 1, |out| {
        out.opaque(b"/vol0");
    });
    let reply = block_on(engine.handle(peer(1024), record(message))).unwrap();
    assert_eq!(results(&reply, 4), [0, 0, 0, 13]);
    let null = block_on(engine.handle(peer(1024), record(call(5, NFS, 0, |_| {})))).unwrap();
    assert_eq!(results(&null, 5), [], "NULL is everybody's");
}

#[test]
fn a_repeated_call_is_executed_once() {
    let engine = engine();
    let root = mounted(&mount(&engine, "/vol0"));
    let message = call(77, NFS, 9, make_dir(&root, "d"));
    let first = block_on(engine.handle(peer(700), record(message.clone()))).unwrap();
    assert_eq!(status(&results(&first, 77)), 0);
    let again = block_on(engine.handle(peer(700), record(message.clone()))).unwrap();
    assert_eq!(again, first);
    let other = block_on(engine.handle(peer(701), record(message))).unwrap();
    assert_eq!(status(&results(&other, 77)), 17, "another client's call is another call");
    let made = engine.service().calls.borrow().iter().filter(|(_, op)| matches!(op, Op::MakeDir { .. })).count();
    assert_eq!(made, 2);
}

#[test]
fn a_duplicate_of_a_call_in_progress_is_dropped() {
    let engine = engine();
    let root = mounted(&mount(&engine, "/vol0"));
    let message = call(78, NFS, 9, make_dir(&root, "d"));
    engine.service().open.set(false);
    block_on(async {
        let mut first = pin!(engine.handle(peer(700), record(message.clone())));
        poll_fn(|context| {
            assert!(first.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        assert_eq!(engine.handle(peer(700), record(message.clone())).await, None);
        engine.service().open.set(true);
        assert!(first.await.is_some());
        assert!(engine.handle(peer(700), record(message)).await.is_some());
    });
}

#[test]
fn a_call_without_an_answer_may_be_tried_again() {
    let engine = engine();
    let root = mounted(&mount(&engine, "/vol0"));
    let message = call(79, NFS, 9, make_dir(&root, "d"));
    engine.service().gone.set(true);
    assert_eq!(block_on(engine.handle(peer(700), record(message.clone()))), None);
    let null = block_on(engine.handle(peer(700), record(call(5, NFS, 0, |_| {})))).unwrap();
    assert_eq!(results(&null, 5), [], "NULL needs nobody behind");
    assert_eq!(status(&mount(&engine, "/vol0")), 0, "nor does a mount of a root that is known");
    engine.service().gone.set(false);
    engine.service().open.set(false);
    block_on(async {
        let mut dropped = Box::pin(engine.handle(peer(700), record(message.clone())));
        poll_fn(|context| {
            assert!(dropped.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
    });
    engine.service().open.set(true);
    let reply = block_on(engine.handle(peer(700), record(message))).unwrap();
    assert_eq!(status(&results(&reply, 79)), 0);
}

#[test]
fn datagrams_get_portmap_only() {
    let engine = engine();
    let ask = |program, version, procedure| {
        let message = call_as((0, 0), 3, program, version, procedure, |out| {
            out.u32(NFS).u32(3).u32(6).u32(0);
        });
        engine.handle_datagram(peer(700), &message).unwrap().datagram().to_vec()
    };
    assert_eq!(
        ask(100_000, 2, 3),
        [0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 1]
    );
    assert_eq!(ask(NFS, 3, 0)[20..], [0, 0, 0, 1]);
    assert_eq!(engine.handle_datagram(peer(700), &[1, 2, 3]), None);
}
