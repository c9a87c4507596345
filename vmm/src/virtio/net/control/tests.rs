use super::*;

fn table_of(addresses: &[[u8; 6]]) -> Vec<u8> {
    [&(addresses.len() as u32).to_le_bytes()[..], &addresses.concat()].concat()
}

#[test]
fn commands_are_decoded() {
    let mac = [2, 0, 0, 0, 0, 7];
    let group = [0x33, 0x33, 0, 0, 0, 1];
    for (bytes, command) in [
        (vec![0, 0, 1], Command::Promiscuous(true)),
        (vec![0, 0, 0], Command::Promiscuous(false)),
        (vec![0, 1, 1], Command::AllMulticast(true)),
        ([&[1, 1][..], &mac].concat(), Command::Mac(MacAddress(mac))),
        (vec![3, 0], Command::Announced),
        (vec![4, 0, 3, 0], Command::Pairs(3)),
        (vec![5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0], Command::Offloads(0x82)),
    ] {
        assert_eq!(parse(&bytes, true), Some(command), "{bytes:?}");
        // neither longer nor shorter
        assert_eq!(parse(&bytes[..bytes.len() - 1], true), None);
        assert_eq!(parse(&[&bytes[..], &[0]].concat(), true), None);
    }
    let tables = [vec![1, 0], table_of(&[mac]), table_of(&[group, group])].concat();
    let Some(Command::Tables(unicast, multicast)) = parse(&tables, true) else { panic!() };
    assert_eq!((unicast.addresses, unicast.overflow), (vec![mac], false));
    assert_eq!((multicast.addresses, multicast.overflow), (vec![group; 2], false));
}

#[test]
fn what_makes_no_sense_is_none() {
    for bytes in [
        &[][..],
        &[0],
        &[0, 9, 1],                      // unknown
        &[2, 0, 1, 0],                   // VLAN
        &[9, 9],                         //
        &[1, 1, 1, 0, 0, 0, 0, 0],       // a group's MAC
        &[1, 1, 0, 0, 0, 0, 0, 0],       // none
        &[1, 0, 1, 0, 0, 0],             // a table without its entry
        &[1, 0, 0xff, 0xff, 0xff, 0xff], //
        &[1, 0, 0, 0, 0, 0],             // one table only
    ] {
        assert_eq!(parse(bytes, true), None, "{bytes:?}");
    }
}

#[test]
fn tables_too_long_mean_more_frames_not_fewer() {
    let many: Vec<[u8; 6]> = (0..100).map(|i| [1, 0, 0, 0, 0, i]).collect();
    let bytes = [vec![1, 0], table_of(&[]), table_of(&many)].concat();
    let Some(Command::Tables(unicast, multicast)) = parse(&bytes, true) else { panic!() };
    assert!(!unicast.overflow && multicast.overflow && multicast.addresses.len() == TABLE_MAX);
    // cut off within either table
    for len in 2..bytes.len() {
        let Some(Command::Tables(_, multicast)) = parse(&bytes[..len], false) else { panic!("{len}") };
        assert!(multicast.overflow, "{len}");
    }
}

#[test]
fn random_commands_never_panic() {
    let mut random = crate::virtio::testing::Random(0x5eed);
    for _ in 0..20_000 {
        let len = random.next() as usize % 40;
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        if let Some(class) = bytes.first_mut() {
            *class %= 6;
        }
        if let Some(command) = bytes.get_mut(1) {
            *command %= 2;
        }
        let _ = parse(&bytes, random.next() & 1 == 0);
    }
}
