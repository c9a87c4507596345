//! An arbiter that knows as many heirs as it can: who asks hears that, and its VM is ported all the same.

use fabric::owner::HEIRS_MAX;
use migration::ownership::OwnerId;
use vmm::port::arbiter::{Arbiter, ArbiterError};

use crate::dmodule::Dmodule;
use crate::world::{Survivor, World};
use crate::{Course, Fault, Ownership};

/// What [`ArbiterError::Full`] says.
const FULL: &str = "it has no room for another heir";
/// Ids of VMs that are not there, but for their records.
const OTHERS: u64 = 1000;

/// The owner of another VM, and its heir.
fn other(number: u64) -> (OwnerId, OwnerId) {
    (OwnerId([number, 1]), OwnerId([number, 2]))
}

/// A port of as many other VMs as there may be heirs for is under way: each has a record, and an heir has been named.
fn fill(arbiter: &Dmodule) {
    for vm_id in (OTHERS..).take(HEIRS_MAX) {
        let (owner, heir) = other(vm_id);
        let mut client = Arbiter::new(arbiter.address, vm_id, owner);
        let epoch = client.take().unwrap();
        assert!(client.name(epoch, Some(heir)).unwrap());
    }
}

#[test]
fn an_arbiter_without_room_for_another_heir_says_so() {
    let world = World::new(Ownership::Arbiter, Fault::Cancel);
    let arbiter = Dmodule::start(&world.lab.dir.path().join("full"));
    fill(&arbiter);
    let (owner, heir) = other(1);
    let mut client = Arbiter::new(arbiter.address, 1, owner);
    let epoch = client.take().unwrap();
    let refused = client.name(epoch, Some(heir));
    assert!(matches!(refused, Err(ArbiterError::Full(address)) if address == arbiter.address), "{refused:?}");
    assert!(refused.unwrap_err().to_string().contains(FULL));
    // Nothing was changed: neither this VM's record, nor that of one that has an heir, who may be another.
    assert_eq!(client.record().unwrap().owner, owner);
    let (first, heir) = other(OTHERS);
    let mut of_first = Arbiter::new(arbiter.address, OTHERS, first);
    let epoch_of_first = of_first.record().unwrap().epoch;
    assert!(of_first.name(epoch_of_first, Some(OwnerId([7, 7]))).unwrap(), "an heir in place of another takes no room");
    // One port is called off: there is room.
    assert!(of_first.name(epoch_of_first, None).unwrap());
    assert!(client.name(epoch, Some(heir)).unwrap());
}

#[test]
fn a_vm_is_ported_without_an_heir_if_there_is_no_room_for_one() {
    let mut world = World::new(Ownership::Arbiter, Fault::Cancel);
    let (outcome, _) = world.port(Course::Straight, None);
    assert_eq!(outcome.map(|o| o.survivor), Some(Survivor::Destination));
    fill(world.arbiter());
    let log = world.log();
    let (outcome, _) = world.port(Course::Straight, None);
    assert_eq!(outcome.map(|o| o.survivor), Some(Survivor::Destination));
    let said = std::fs::read_to_string(log).unwrap();
    assert!(said.contains(FULL), "{said}");
}
