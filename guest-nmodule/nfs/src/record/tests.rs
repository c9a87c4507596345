use super::*;
use proptest::prelude::*;

/// Feeds a stream in the given pieces; returns its records and the most any record claimed to be.
fn read(split: fn(&[u8]) -> Split, stream: &[u8], pieces: &[usize]) -> Result<Vec<Record>, RecordError> {
    let mut reader = RecordReader::new(split);
    let (mut records, mut rest, mut turn) = (Vec::new(), stream, 0);
    while !rest.is_empty() {
        let piece = pieces[turn % pieces.len()].clamp(1, rest.len());
        turn += 1;
        let (mut input, after) = rest.split_at(piece);
        loop {
            let (used, event) = reader.feed(input)?;
            input = &input[used..];
            match event {
                Event::Starved => break,
                Event::Fragment { record_bytes, .. } => assert!(record_bytes <= RECORD_MAX),
                Event::Record(record) => records.push(record),
            }
        }
        assert!(input.is_empty());
        rest = after;
    }
    Ok(records)
}

fn never(_: &[u8]) -> Split {
    Split::Never
}

/// Bulk data begin at byte 200, which is found out at byte 200.
fn at_200(head: &[u8]) -> Split {
    if head.len() < 200 { Split::More } else { Split::At(200) }
}

fn mark(last: bool, length: usize) -> [u8; 4] {
    (((last as u32) << 31) | length as u32).to_be_bytes()
}

#[test]
fn fragments_make_one_record() {
    let mut stream = Vec::new();
    for (last, part) in [(false, b"ab".as_slice()), (false, b""), (true, b"cde"), (true, b""), (true, b"f")] {
        stream.extend(mark(last, part.len()));
        stream.extend(part);
    }
    let expected: Vec<Record> = [b"abcde".as_slice(), b"", b"f"].map(|bytes| Record::whole(bytes.to_vec())).into();
    assert_eq!(read(never, &stream, &[1]).unwrap(), expected);
    assert_eq!(read(never, &stream, &[usize::MAX]).unwrap(), expected);
}

#[test]
fn too_long_is_refused_before_memory_is_taken() {
    let mut reader = RecordReader::new(never);
    assert_eq!(reader.feed(&mark(true, RECORD_MAX + 1)), Err(RecordError::TooLong(RECORD_MAX + 1)));
    let mut reader = RecordReader::new(never);
    assert_eq!(reader.feed(&[0xff; 4]), Err(RecordError::TooLong(0x7fff_ffff)));

    let mut reader = RecordReader::new(never);
    assert!(reader.feed(&mark(false, RECORD_MAX)).is_ok());
    assert_eq!(reader.head.capacity(), 0);
    assert!(matches!(reader.feed(&vec![0; RECORD_MAX]), Ok((RECORD_MAX, Event::Starved))));
    assert_eq!(reader.feed(&mark(true, 1)), Err(RecordError::TooLong(RECORD_MAX + 1)), "in a later fragment");
}

#[test]
fn bulk_is_split_off() {
    let body: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
    let mut stream = mark(true, body.len()).to_vec();
    stream.extend(&body);
    for piece in [1, 100, 193, 204, 205, 4096, usize::MAX] {
        let records = read(at_200, &stream, &[piece]).unwrap();
        assert_eq!(
            records,
            [Record { head: body[..200].to_vec(), bulk: Some(body[200..].to_vec()) }],
            "pieces of {piece}"
        );
        assert_eq!(records[0].bulk.as_ref().unwrap().capacity(), 4800, "taken once, to measure");
    }
}

#[test]
fn small_records_are_not_split() {
    let mut stream = mark(true, 1000).to_vec();
    stream.extend([1; 1000]);
    assert_eq!(read(at_200, &stream, &[300]).unwrap(), [Record::whole(vec![1; 1000])]);
}

#[test]
fn reply_carries_its_mark_and_padding() {
    let reply = Reply::new(vec![0, 0, 0, 0, 1, 2, 3, 4], vec![9; 5]);
    let bytes = reply.slices().concat();
    assert_eq!(bytes, [0x80, 0, 0, 12, 1, 2, 3, 4, 9, 9, 9, 9, 9, 0, 0, 0]);
    assert_eq!(reply.len(), bytes.len());
}

proptest! {
    #[test]
    fn any_fragmentation_and_any_pieces(
        bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..6000), 1..4),
        cuts in proptest::collection::vec(0usize..3000, 1..6),
        pieces in proptest::collection::vec(1usize..2000, 1..6),
    ) {
        let mut stream = Vec::new();
        for body in &bodies {
            let mut rest = &body[..];
            for cut in &cuts {
                let (part, after) = rest.split_at(rest.len().min(*cut));
                stream.extend(mark(false, part.len()));
                stream.extend(part);
                rest = after;
            }
            stream.extend(mark(true, rest.len()));
            stream.extend(rest);
        }
        let records = read(at_200, &stream, &pieces).unwrap();
        prop_assert_eq!(records.len(), bodies.len());
        for (record, body) in records.iter().zip(&bodies) {
            prop_assert!(record.bulk.is_none() || record.head.len() == 200);
            prop_assert_eq!(&[&record.head[..], record.bulk.as_deref().unwrap_or(&[])].concat(), body);
        }
    }

    #[test]
    fn rubbish_never_panics(stream in proptest::collection::vec(any::<u8>(), 0..2000), piece in 1usize..100) {
        let _ = read(at_200, &stream, &[piece]);
    }
}
