use super::*;
use proptest::prelude::*;

fn ticket() -> Ticket {
    Ticket {
        id: [7; 16],
        vm_id: 1,
        first_epoch: Epoch(2),
        last_epoch: Epoch(3),
        not_before: 1000,
        not_after: 2000,
        source: "a".into(),
        destination: "b.example".into(),
    }
}

fn signed() -> Vec<u8> {
    let mut bytes = ticket().encode();
    bytes.extend_from_slice(&[9; SIGNATURE_LEN]);
    bytes
}

/// A change here makes tickets of one build useless to another and needs a new version.
#[test]
fn golden() {
    let mut expected = b"ORTK\x01\0\0\0".to_vec();
    expected.extend_from_slice(&[7; 16]);
    for value in [1u64, 2, 3, 1000, 2000] {
        expected.extend_from_slice(&value.to_le_bytes());
    }
    expected.extend_from_slice(b"\x01\0\0\0a\x09\0\0\0b.example");
    assert_eq!(ticket().encode(), expected);
}

#[test]
fn what_was_signed_comes_back_and_nothing_else_is_shown() {
    let bytes = signed();
    let good = |covered: &[u8], signature: &[u8; SIGNATURE_LEN]| covered == ticket().encode() && *signature == [9; 64];
    assert_eq!(Signed::parse(&bytes).unwrap().verify(good), Ok(ticket()));
    assert_eq!(Signed::parse(&bytes).unwrap().verify(|_, _| false), Err(TicketError::Forged));
}

#[test]
fn a_ticket_is_for_one_vm_some_epochs_and_some_time() {
    let t = ticket();
    assert_eq!(t.check(1, Epoch(2), 1000), Ok(()));
    assert_eq!(t.check(1, Epoch(3), 2000), Ok(()));
    assert_eq!(t.check(2, Epoch(2), 1500), Err(TicketError::Vm { ticket: 1, vm: 2 }));
    let epoch = |epoch| Err(TicketError::Epoch { first: 2, last: 3, epoch });
    assert_eq!(t.check(1, Epoch(1), 1500), epoch(1));
    assert_eq!(t.check(1, Epoch(4), 1500), epoch(4));
    assert_eq!(t.check(1, Epoch(2), 999), Err(TicketError::Early(1)));
    assert_eq!(t.check(1, Epoch(2), 2001), Err(TicketError::Expired(1)));
}

#[test]
fn damage_is_named() {
    let at = |index: usize, value: u8| {
        let mut bytes = signed();
        bytes[index] = value;
        Signed::parse(&bytes).map(|_| ())
    };
    assert_eq!(at(0, b'X'), Err(Error::NoTicket));
    assert_eq!(at(4, 2), Err(Error::TicketVersion { got: 2, known: 1 }));
    assert_eq!(at(6, 1), Err(Error::Reserved("ticket")));
    assert!(matches!(at(66, 1), Err(Error::Bound { .. })), "a length that is too large");
    assert!(matches!(at(68, 0xff), Err(Error::Text(_))));
    assert!(matches!(Signed::parse(&[0; TICKET_MAX + 1]), Err(Error::Bound { .. })));
    for length in 0..signed().len() {
        assert!(Signed::parse(&signed()[..length]).is_err(), "{length} bytes of a ticket are none");
    }
    let mut longer = signed();
    longer.push(0);
    assert!(Signed::parse(&longer).is_err());
}

proptest! {
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..TICKET_MAX + 2)) {
        let _ = Signed::parse(&bytes);
    }

    #[test]
    fn any_ticket(
        id in any::<[u8; 16]>(), numbers in any::<[u64; 5]>(), source in "[a-z.]{0,253}", destination in "[a-z.]{0,253}",
    ) {
        let [vm_id, first, last, not_before, not_after] = numbers;
        let (first_epoch, last_epoch) = (Epoch(first), Epoch(last));
        let t = Ticket { id, vm_id, first_epoch, last_epoch, not_before, not_after, source, destination };
        let mut bytes = t.encode();
        bytes.extend_from_slice(&[1; SIGNATURE_LEN]);
        prop_assert_eq!(Signed::parse(&bytes).unwrap().verify(|_, _| true), Ok(t));
    }
}
