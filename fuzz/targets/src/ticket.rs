//! A ticket, as an operator hands it over or a peer sends it.
//!
//! Asserted: what is parsed gives the same bytes again; a ticket whose signature nobody vouches for says nothing.

use migration::ownership::Epoch;
use migration::ticket::{SIGNATURE_LEN, Signed, Ticket, TicketError};

use crate::Target;

/// A ticket with its signature.
pub const TARGET: Target =
    Target { name: "ticket", run: ticket, seeds: || vec![signed()], memory: 64 << 10, rounds: 20_000 };

fn ticket(input: &[u8]) {
    let Ok(signed) = Signed::parse(input) else { return };
    assert_eq!(signed.clone().verify(|_, _| false), Err(TicketError::Forged));
    let Ok(ticket) = signed.verify(|_, _| true) else { return };
    assert_eq!(ticket.encode(), input[..input.len() - SIGNATURE_LEN]);
    let now = u64::from_le_bytes(*ticket.id.first_chunk().unwrap_or(&[0; 8]));
    let good = ticket.check(ticket.vm_id, ticket.first_epoch, now).is_ok();
    let expected = ticket.first_epoch <= ticket.last_epoch && (ticket.not_before..=ticket.not_after).contains(&now);
    assert_eq!(good, expected);
}

/// One that is well-formed.
pub(crate) fn signed() -> Vec<u8> {
    let ticket = Ticket {
        id: [1; 16],
        vm_id: 3,
        first_epoch: Epoch(5),
        last_epoch: Epoch(5),
        not_before: 0,
        not_after: u64::MAX,
        source: "node1".into(),
        destination: "node2".into(),
    };
    let mut bytes = ticket.encode();
    bytes.extend_from_slice(&[9; SIGNATURE_LEN]);
    bytes
}
