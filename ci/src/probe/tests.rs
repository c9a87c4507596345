use super::*;

fn log(times: &[(u64, Option<u64>)], zero: Instant) -> Log {
    let at = |ms: u64| zero + Duration::from_millis(ms);
    Log { asked: times.iter().map(|(sent, replied)| Asked { sent: at(*sent), replied: replied.map(at) }).collect() }
}

#[test]
fn a_silence_counts_where_it_touches_the_window() {
    let zero = Instant::now();
    let at = |ms: u64| zero + Duration::from_millis(ms);
    let log = log(&[(0, Some(1)), (1, Some(2)), (2, Some(30)), (3, Some(31)), (4, None), (50, Some(90))], zero);
    assert_eq!(log.longest_silence(at(5), at(20)), Some(Duration::from_millis(28)));
    assert_eq!(log.longest_silence(at(0), at(1)), Some(Duration::from_millis(1)));
    assert_eq!(log.longest_silence(at(200), at(300)), None);
    assert_eq!(log.longest_wait(at(0), at(10)), Some(Duration::from_millis(28)));
    assert_eq!((log.questions(), log.unanswered()), (6, 1));
}

#[test]
fn null_is_forty_bytes_and_its_reply_is_checked() {
    let call = null_call(7);
    assert_eq!((call.len(), word(&call, 0), word(&call, 4), word(&call, 16)), (44, 0x8000_0028, 7, 100_003));
    let mut reply = [0; REPLY_BYTES];
    reply[..4].copy_from_slice(&0x8000_0018u32.to_be_bytes());
    reply[7] = 9;
    reply[11] = 1;
    assert_eq!(null_reply(&reply).unwrap(), 9);
    // MSG_DENIED, PROC_UNAVAIL, a call instead of a reply.
    for at in [15, 27, 11] {
        let mut bad = reply;
        bad[at] ^= 1;
        assert!(null_reply(&bad).is_err());
    }
}
