//! Valid calls of every procedure, damaged: no panic, and whatever is answered is a well-formed reply to that call.
#![allow(clippy::unwrap_used)] // these are tests
use nfs::engine::Engine;
use nfs::nfs3::arguments::write_split;
use nfs::record::{Event, RecordReader};
use nfs::xdr::{Reader, Writer};
use proptest::prelude::*;
use support::message::*;
use support::volume::Volume;
use support::{block_on, config, service};

mod support;

fn handle(inode: u64) -> [u8; 24] {
    nfs::handle::encode(fabric::fs::FileHandle { volume: fabric::fs::VolumeId(1), generation: 1, inode })
}

/// Arguments as the procedure takes them; MNT and portmap come after the procedures of NFS.
fn valid(procedure: u32) -> (u32, u32, u32, Vec<u8>) {
    let mut out = Writer::default();
    let root = handle(2);
    match procedure {
        0 => {}
        2 => {
            out.opaque(&root).bool(true).u32(0o700).raw(&[0; 20]).bool(true).u32(1).u32(2);
        }
        6 => {
            out.opaque(&handle(3)).u64(0).u32(100_000);
        }
        7 => {
            out.opaque(&handle(3)).u64(10).u32(3000).u32(2).opaque(&[7; 3000]);
        }
        8 => {
            out.opaque(&root).opaque(b"new").u32(1).raw(&[0; 24]);
        }
        9 => {
            out.opaque(&root).opaque(b"dir").raw(&[0; 24]);
        }
        10 => {
            out.opaque(&root).opaque(b"link").raw(&[0; 24]).opaque(b"target");
        }
        11 => {
            out.opaque(&root).opaque(b"node").u32(3).raw(&[0; 24]).u32(1).u32(2);
        }
        3 | 12 | 13 => {
            out.opaque(&root).opaque(b"new");
        }
        14 => {
            out.opaque(&root).opaque(b"new").opaque(&root).opaque(b"newer");
        }
        15 => {
            out.opaque(&handle(3)).opaque(&root).opaque(b"hard");
        }
        16 => {
            out.opaque(&root).u64(0).u64(0).u32(4096);
        }
        17 => {
            out.opaque(&root).u64(0).u64(0).u32(4096).u32(8192);
        }
        21 => {
            out.opaque(&handle(3)).u64(0).u32(0);
        }
        22 => {
            out.opaque(b"/vol0");
            return (MOUNT, 3, 1, out.into_bytes());
        }
        23 => {
            out.u32(NFS).u32(3).u32(6).u32(0);
            return (100_000, 2, 3, out.into_bytes());
        }
        24 => {
            out.u32(NFS).u32(3).opaque(b"tcp").opaque(b"").opaque(b"");
            return (100_000, 4, 3, out.into_bytes());
        }
        // GETATTR, ACCESS, READLINK, FSSTAT, FSINFO, PATHCONF.
        _ => {
            out.opaque(&root).u32(0x3f);
        }
    }
    (NFS, 3, procedure, out.into_bytes())
}

fn message(procedure: u32) -> Vec<u8> {
    let (program, version, procedure, arguments) = valid(procedure);
    call_as((0, 0), 42, program, version, procedure, |out| {
        out.raw(&arguments);
    })
}

/// Through the record reader, as a connection would bring it, then to the engine.
fn deliver(engine: &Engine<Volume>, message: &[u8]) -> Option<Vec<u8>> {
    let mut stream = (0x8000_0000 | message.len() as u32).to_be_bytes().to_vec();
    stream.extend(message);
    let mut reader = RecordReader::new(write_split);
    let mut rest = &stream[..];
    loop {
        let (used, event) = reader.feed(rest).unwrap();
        rest = &rest[used..];
        match event {
            Event::Fragment { .. } => {}
            Event::Record(record) => {
                return block_on(engine.handle(peer(700), record)).map(|reply| bytes(&reply));
            }
            Event::Starved => panic!("the record is whole"),
        }
    }
}

#[test]
fn the_valid_calls_are_valid() {
    let engine = Engine::new(service(), config());
    for procedure in 0..25 {
        let reply = deliver(&engine, &message(procedure)).unwrap();
        assert_eq!(
            reply[..24],
            [0, 0, 0, 42, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            "{procedure}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]
    #[test]
    fn damaged_calls_get_well_formed_replies(
        procedures in proptest::collection::vec(0u32..25, 1..4),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 0..4),
        cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let engine = Engine::new(service(), config());
        deliver(&engine, &message(8)).unwrap();
        for procedure in procedures {
            let mut bytes = message(procedure);
            for (at, value, how) in &damage {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = *value,
                    1 => bytes[at] ^= 1 << (value & 7),
                    2 => bytes[at] = 0xff,
                    _ => bytes.insert(at, *value),
                }
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let Some(reply) = deliver(&engine, &bytes) else { continue };
            let mut reader = Reader::new(&reply);
            prop_assert_eq!(&reader.array::<4>().unwrap()[..], &bytes[..4], "the call's own transaction");
            prop_assert_eq!(reader.u32(), Ok(1));
            match reader.u32().unwrap() {
                0 => {
                    prop_assert_eq!(reader.u64(), Ok(0));
                    prop_assert!(reader.u32().unwrap() <= 4);
                }
                1 => prop_assert!(reader.u32().unwrap() <= 1),
                other => prop_assert!(false, "reply_stat {}", other),
            }
        }
    }
}
