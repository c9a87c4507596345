use super::*;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[test]
fn auth_sys_call() {
    let mut message = words(&[0x1234, 0, 2, 100_003, 3, 6, 1, 36, 77, 5]);
    message.extend(b"hello\0\0\0");
    message.extend(words(&[1000, 100, 2, 10, 20, 0, 0, 0xaabb]));
    let mut reader = Reader::new(&message);
    let auth = Auth::Sys(Credential { uid: 1000, gid: 100, groups: vec![10, 20] });
    assert_eq!(
        Call::decode(&mut reader),
        Ok(Call { xid: Xid(0x1234), program: 100_003, version: 3, procedure: 6, auth })
    );
    assert_eq!(reader.u32(), Ok(0xaabb), "the arguments follow");
}

#[test]
fn refusals() {
    let refused = |message: &[u32]| {
        let bad = Call::decode(&mut Reader::new(&words(message))).unwrap_err();
        refuse(bad).map(|reply| reply.slices().concat())
    };
    assert_eq!(refused(&[]), None);
    assert_eq!(refused(&[1]), None);
    assert_eq!(refused(&[1, 1, 2, 3, 4, 5, 0, 0, 0, 0]), None, "a reply is not answered");
    // RPC version 3: MSG_DENIED, RPC_MISMATCH, low 2, high 2.
    assert_eq!(refused(&[9, 0, 3, 1, 1, 1, 0, 0, 0, 0]), Some(words(&[0x8000_0018, 9, 1, 1, 0, 2, 2])));
    // Truncated header: MSG_ACCEPTED, GARBAGE_ARGS.
    assert_eq!(refused(&[9, 0, 2, 1]), Some(words(&[0x8000_0018, 9, 1, 0, 0, 0, 4])));
    // RPCSEC_GSS: MSG_DENIED, AUTH_ERROR, AUTH_BADCRED.
    assert_eq!(refused(&[9, 0, 2, 1, 1, 1, 6, 0, 0, 0]), Some(words(&[0x8000_0014, 9, 1, 1, 1, 1])));
    // AUTH_SYS with 17 groups.
    let mut message = vec![9, 0, 2, 1, 1, 1, 1, 88, 0, 0, 0, 0, 17];
    message.extend([0; 19]);
    assert_eq!(refused(&message), Some(words(&[0x8000_0014, 9, 1, 1, 1, 1])));
    // Credential body above 400 bytes.
    assert_eq!(refused(&[9, 0, 2, 1, 1, 1, 1, 401]), Some(words(&[0x8000_0014, 9, 1, 1, 1, 1])));
    // Verifier above 400 bytes.
    assert_eq!(refused(&[9, 0, 2, 1, 1, 1, 0, 0, 0, 401]), Some(words(&[0x8000_0014, 9, 1, 1, 1, 3])));
}

#[test]
fn accept_states() {
    let bytes = |rejection| rejected(Xid(7), rejection).slices().concat();
    assert_eq!(bytes(Rejection::ProgramUnavailable), words(&[0x8000_0018, 7, 1, 0, 0, 0, 1]));
    let mismatch = Rejection::ProgramMismatch { low: 2, high: 4 };
    assert_eq!(bytes(mismatch), words(&[0x8000_0020, 7, 1, 0, 0, 0, 2, 2, 4]));
    assert_eq!(bytes(Rejection::ProcedureUnavailable), words(&[0x8000_0018, 7, 1, 0, 0, 0, 3]));
    assert_eq!(bytes(Rejection::GarbageArguments), words(&[0x8000_0018, 7, 1, 0, 0, 0, 4]));
}
