use super::*;
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

/// The key of the client's application data in RFC 8448, section 3.
fn direction(sequence: u64) -> Direction {
    let (key, iv) = (hex("17422dda596ed5d9acd890e3c63f5051"), hex("5b78923dee08579033e523d9"));
    Direction::with(&AES_128_GCM, &key, &iv, sequence, AES_RECORDS_MAX).unwrap()
}

/// Content as records of a buffer with room for so many bytes at a time.
fn seal(sealer: &mut Sealer, parts: &[&[u8]], room: usize) -> Vec<u8> {
    let mut parts = Parts::new(parts);
    let (mut all, mut out) = (Vec::new(), Vec::with_capacity(room));
    let allocated = out.capacity();
    loop {
        out.clear();
        sealer.fill(&mut parts, &mut out).unwrap();
        assert_eq!(out.capacity(), allocated, "sealing allocates nothing");
        if out.is_empty() {
            return all;
        }
        all.extend_from_slice(&out);
    }
}

/// What is in these records.
fn open(opener: &mut Opener, mut records: &[u8]) -> Result<Vec<u8>, TlsError> {
    let mut content = Vec::new();
    while let Some(n) = length(records)? {
        let (record, rest) = records.split_at_checked(n).ok_or(TlsError::Damaged)?;
        // A gap before it, as between what has been opened and what has been read.
        let mut buffer = vec![0xaa; 9];
        buffer.extend_from_slice(record);
        let opened = opener.open(&mut buffer, 9)?;
        content.extend_from_slice(&buffer[..opened]);
        records = rest;
    }
    Ok(content)
}

#[test]
fn as_in_rfc_8448() {
    let content: Vec<u8> = (0..50).collect();
    let record = hex(
        "17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b 98 19 a8 \
         a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 15 e4",
    );
    assert_eq!(seal(&mut Sealer(direction(0)), &[&content], RECORD_MAX), record);
    assert_eq!(open(&mut Opener::with(direction(0)), &record).unwrap(), content);
}

/// One record with this inside: content, type, padding.
fn record(d: &mut Direction, inside: &[u8]) -> Vec<u8> {
    let mut sealed = inside.to_vec();
    let header = header(sealed.len() + TAG_LEN);
    let nonce = d.nonce().unwrap();
    d.key.seal_in_place_append_tag(nonce, Aad::from(header), &mut sealed).unwrap();
    [&header[..], &sealed].concat()
}

#[test]
fn an_alert_is_told_from_an_end() {
    let alert = |code: u8| {
        let sealed = record(&mut direction(0), &[1, code, ALERT]);
        open(&mut Opener::with(direction(0)), &sealed)
    };
    assert!(matches!(alert(0), Err(TlsError::Closed)));
    assert!(matches!(alert(45), Err(TlsError::Refused(AlertDescription::CertificateExpired))));
    // In the clear, where there is no common key; not once there was one.
    let clear = [21, 3, 3, 0, 2, 2, 40];
    assert!(matches!(open(&mut Opener::with(direction(0)), &clear), Err(TlsError::Refused(_))));
    let after = [record(&mut direction(0), &[5, APPLICATION_DATA]), clear.to_vec()].concat();
    assert!(matches!(open(&mut Opener::with(direction(0)), &after), Err(TlsError::Record(_))));
}

#[test]
fn what_a_record_may_contain() {
    let opened = |inside: &[u8]| open(&mut Opener::with(direction(0)), &record(&mut direction(0), inside));
    let padded = |content: usize, zeroes: usize| [vec![7; content], vec![APPLICATION_DATA], vec![0; zeroes]].concat();
    for (content, zeroes) in [(1, 0), (1, 9), (CONTENT_MAX, 0), (1, CONTENT_MAX - 1), (CONTENT_MAX - 1, 1)] {
        assert_eq!(opened(&padded(content, zeroes)).unwrap(), vec![7; content], "{content} and {zeroes}");
    }
    // Longer than a whole record may be (RFC 8446, section 5.4), by content or by padding.
    for (content, zeroes) in [(CONTENT_MAX + 1, 0), (1, CONTENT_MAX), (CONTENT_MAX, 1), (1, CONTENT_MAX + 200)] {
        assert!(matches!(opened(&padded(content, zeroes)), Err(TlsError::Record("that is too long"))));
    }
    for nothing in [padded(0, 0), padded(0, 100)] {
        assert!(matches!(opened(&nothing), Err(TlsError::Record("without content"))));
    }
    assert!(matches!(opened(&[0; 40]), Err(TlsError::Record("without a type"))));
    assert!(matches!(opened(&[]), Err(TlsError::Record("without a type"))));
    // An alert that is none; a change of keys; the type of a record that is never sealed; an unknown one.
    for inside in [&[ALERT][..], &[1, 0, 0, ALERT], &[24, 0, 0, 1, 0, HANDSHAKE], &[1, 20], &[1, 99]] {
        assert!(matches!(opened(inside), Err(TlsError::Record(_))), "{inside:?}");
    }
}

#[test]
fn behind_an_error_nothing_is_opened() {
    let mut sending = direction(0);
    for bad in [&[1, 0, ALERT][..], &[APPLICATION_DATA]] {
        let [first, bad, good] = [&[1, APPLICATION_DATA], bad, &[2, APPLICATION_DATA]].map(|i| record(&mut sending, i));
        let mut opener = Opener::with(direction(sending.sequence - 3));
        assert_eq!(open(&mut opener, &first).unwrap(), [1]);
        assert!(open(&mut opener, &bad).is_err());
        assert!(matches!(open(&mut opener, &good), Err(TlsError::Record("behind the last one"))));
    }
}

#[test]
fn what_was_changed_repeated_left_out_or_is_no_record_is_refused() {
    let mut sealer = Sealer(direction(0));
    let first = seal(&mut sealer, &[b"first"], RECORD_MAX);
    let second = seal(&mut sealer, &[b"second"], RECORD_MAX);
    assert_eq!(open(&mut Opener::with(direction(0)), &[&first[..], &second].concat()).unwrap(), b"firstsecond");
    for bit in 0..first.len() * 8 {
        let mut bad = first.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let opened = open(&mut Opener::with(direction(0)), &bad);
        assert!(opened.is_err(), "bit {bit}: {opened:?}");
    }
    assert!(matches!(open(&mut Opener::with(direction(0)), &second), Err(TlsError::Damaged)));
    assert!(matches!(open(&mut Opener::with(direction(0)), &[&first[..], &first].concat()), Err(TlsError::Damaged)));
    assert!(matches!(length(b"ORPT\x01\0"), Err(TlsError::Plain(_))));
    assert!(matches!(length(b"GET / HTTP/1.1"), Err(TlsError::Record(_))));
    assert!(matches!(length(&[23, 3, 3, 0xff, 0xff]), Err(TlsError::Record(_))));
    assert!(matches!(length(&[23, 3, 3, 0]), Ok(None)));
    // Shorter than a tag.
    assert!(open(&mut Opener::with(direction(0)), &[23, 3, 3, 0, 3, 1, 2, 3]).is_err());
}

#[test]
fn a_worn_key_seals_nothing_more() {
    let mut sealer = Sealer(direction(AES_RECORDS_MAX - 1));
    let mut out = Vec::with_capacity(2 * RECORD_MAX);
    sealer.fill(&mut Parts::new(&[b"last"]), &mut out).unwrap();
    let sealed = out.clone();
    let refused = sealer.fill(&mut Parts::new(&[b"one more"]), &mut out);
    assert!(matches!(refused, Err(TlsError::KeyWorn)));
    assert_eq!(out, sealed, "nothing that is not sealed");
    // Nor opens.
    let mut opener = Opener::with(direction(AES_RECORDS_MAX - 1));
    assert_eq!(open(&mut opener, &sealed).unwrap(), b"last");
    assert!(matches!(open(&mut opener, &sealed), Err(TlsError::KeyWorn)));
}

proptest! {
    #[test]
    fn any_parts_through_any_room(
        parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40_000), 0..5),
        room in CONTENT_MAX + OVERHEAD..100_000,
    ) {
        let slices: Vec<&[u8]> = parts.iter().map(|p| &p[..]).collect();
        let records = seal(&mut Sealer(direction(3)), &slices, room);
        prop_assert_eq!(open(&mut Opener::with(direction(3)), &records).unwrap(), parts.concat());
    }

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = open(&mut Opener::with(direction(0)), &bytes);
        let [high, low] = (bytes.len() as u16).to_be_bytes();
        prop_assert!(open(&mut Opener::with(direction(0)), &[&[23, 3, 3, high, low][..], &bytes].concat()).is_err());
    }
}
