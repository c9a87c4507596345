//! Telling the switches where an address lives now: RARP, as all VMMs do it after a port.

/// When the announcement is sent, after the VM runs: at once, and again in case one gets lost.
pub const REPEAT_MS: [u64; 5] = [0, 1, 5, 20, 100];

/// Length of the frame.
pub const LENGTH: usize = 60;

/// A RARP request (RFC 903) of the address for itself, broadcast: every bridge on the way learns it, nobody answers.
pub fn rarp(mac: [u8; 6]) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    frame[0..6].copy_from_slice(&[0xff; 6]);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&0x8035u16.to_be_bytes());
    frame[14..16].copy_from_slice(&1u16.to_be_bytes()); // Ethernet
    frame[16..18].copy_from_slice(&0x0800u16.to_be_bytes()); // IPv4
    frame[18] = 6;
    frame[19] = 4;
    frame[20..22].copy_from_slice(&3u16.to_be_bytes()); // request reverse
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let frame = rarp([2, 0, 0, 0, 0, 9]);
        let expected = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3, 2, 0, 0, 0, 0, 9,
            0, 0, 0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0,
        ];
        assert_eq!(frame[..expected.len()], expected);
        assert!(frame[expected.len()..].iter().all(|b| *b == 0));
    }
}
