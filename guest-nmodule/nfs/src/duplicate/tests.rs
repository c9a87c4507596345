use super::*;
use crate::rpc::{Auth, Call, Xid};

fn key(port: u16, xid: u32, message: &[u8]) -> Key {
    let call = Call { xid: Xid(xid), program: 100_003, version: 3, procedure: 12, auth: Auth::None };
    Key::new(SocketAddr::from(([10, 0, 0, 1], port)), &call, message)
}

#[test]
fn life_of_a_call() {
    let mut cache = DuplicateCache::default();
    let one = key(1, 1, b"one");
    assert_eq!(cache.begin(one), Seen::New);
    assert_eq!(cache.begin(one), Seen::InProgress);
    cache.finish(one, Some(b"reply"));
    assert_eq!(cache.begin(one), Seen::Done(b"reply".to_vec()));
    for other in [key(2, 1, b"one"), key(1, 2, b"one"), key(1, 1, b"two")] {
        assert_eq!(cache.begin(other), Seen::New);
        cache.finish(other, None);
        assert_eq!(cache.begin(other), Seen::New, "without a reply it may be tried again");
    }
}

#[test]
fn bounded_in_entries() {
    let mut cache = DuplicateCache::default();
    for xid in 0..ENTRIES_MAX as u32 + 10 {
        assert_eq!(cache.begin(key(1, xid, b"")), Seen::New);
        cache.finish(key(1, xid, b""), Some(b"r"));
    }
    assert_eq!(cache.usage(), (ENTRIES_MAX, ENTRIES_MAX));
    assert_eq!(cache.begin(key(1, 9, b"")), Seen::New, "the oldest went");
    assert_eq!(cache.begin(key(1, 10, b"")), Seen::Done(b"r".to_vec()));
}

#[test]
fn bounded_in_bytes() {
    let mut cache = DuplicateCache::default();
    for xid in 0..100 {
        cache.begin(key(1, xid, b""));
        cache.finish(key(1, xid, b""), Some(&[0; 10_000]));
        assert!(cache.usage().1 <= BYTES_MAX);
    }
    assert_eq!(cache.usage(), (BYTES_MAX / 10_000, BYTES_MAX / 10_000 * 10_000));
    cache.begin(key(1, 100, b""));
    cache.finish(key(1, 100, b""), Some(&vec![0; BYTES_MAX + 1]));
    assert_eq!(cache.begin(key(1, 100, b"")), Seen::New, "too large to keep");
}

#[test]
fn bounded_in_progress() {
    let mut cache = DuplicateCache::default();
    for xid in 0..IN_PROGRESS_MAX as u32 {
        assert_eq!(cache.begin(key(1, xid, b"")), Seen::New);
    }
    assert_eq!(cache.begin(key(1, u32::MAX, b"")), Seen::Unwatched);
    assert_eq!(cache.begin(key(1, 5, b"")), Seen::InProgress);
}
