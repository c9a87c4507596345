//! Compare-and-swap, heirs, release.
use super::*;
use crate::owner::VMS_MAX;

const HEIR: Owner = Owner([8, 9]);
fn reserve(s: &mut Sessions, epoch: u64, owner: Owner, heir: Owner) -> Vec<Did> {
    s.frame(VMM, Frame::OwnerReserve { vm_id: VM, epoch: Epoch(epoch), owner, heir });
    did(s)
}

fn cas(s: &mut Sessions, expect: u64, owner: Owner) -> Vec<Did> {
    s.frame(VMM, Frame::OwnerCas { vm_id: VM, expect: Epoch(expect), owner });
    did(s)
}

fn told(status: CasStatus, record: OwnerRecord) -> Did {
    Did::Sent(VMM, Frame::OwnerCasResult { status, record })
}

/// Sessions with VM's open on A, epoch 1, and HEIR named; what is on the disk.
fn named() -> (Sessions, OwnerTable) {
    let mut s = open();
    assert_eq!(reserve(&mut s, 1, ME, HEIR), [Did::Write(Some(record(1, 1, ME)))], "not told before it is durable");
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(1, 1, ME))]);
    let mut disk = OwnerTable::default();
    disk.apply(&OwnerChange::Set(record(1, 1, ME), Some(HEIR)));
    (s, disk)
}

#[test]
fn an_heir_does_not_wait_for_the_disk() {
    let (mut s, _) = named();
    let won = record(2, 1, HEIR);
    assert_eq!(cas(&mut s, 1, HEIR), [told(CasStatus::Won, won), Did::Write(Some(won))]);
    // It holds at once, for requests, for a HELLO and for who comes too late.
    s.frame(A, request(1, 0, 1, read()));
    let current = Epoch(2);
    assert_eq!(did(&mut s), [Did::Sent(A, refused(1, 0, 1, Refusal::StaleEpoch { current }))]);
    s.frame(A, request(2, 0, 1, read()));
    assert_eq!(did(&mut s), [Did::Execute(token(1, 0, 1), read(), false)]);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Lost, won)]);
    // The next change waits.
    assert_eq!(reserve(&mut s, 2, HEIR, ME), []);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Write(Some(won))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, won)]);
}

#[test]
fn a_grant_whose_write_fails_holds() {
    let (mut s, _) = named();
    cas(&mut s, 1, HEIR);
    s.owners_written(false);
    assert_eq!(did(&mut s), []);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Lost, record(2, 1, HEIR))]);
}

#[test]
fn others_than_the_heir_wait_for_the_disk_and_only_the_owner_names_one() {
    let (mut s, _) = named();
    assert_eq!(reserve(&mut s, 1, OTHER, OTHER), [told(CasStatus::Lost, record(1, 1, ME))]);
    assert_eq!(cas(&mut s, 1, ME), [Did::Write(Some(record(2, 1, ME)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(2, 1, ME))]);
    // The heir of epoch 1 is nobody at epoch 2.
    assert_eq!(cas(&mut s, 2, HEIR), [Did::Write(Some(record(3, 1, HEIR)))]);
}

#[test]
fn after_a_restart_the_epoch_is_the_heirs_alone() {
    let (_, disk) = named();
    let restarted = || Sessions::new(BootId(9), disk.clone(), 4);
    let held = record(1, 1, ME);
    // Somebody else, and the source that gives up waiting: nobody knows. Asking for what was won long ago changes nothing.
    let mut s = restarted();
    assert_eq!(cas(&mut s, 0, ME), [told(CasStatus::Won, held)]);
    assert_eq!(cas(&mut s, 1, OTHER), [told(CasStatus::Unknown, held)]);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Unknown, held)]);
    // The heir asks (again).
    let won = record(2, 1, HEIR);
    assert_eq!(cas(&mut s, 1, HEIR), [told(CasStatus::Won, won), Did::Write(Some(won))]);
    // Or it runs already, and says HELLO; nobody else can.
    let mut s = restarted();
    s.frame(A, hello_of(2, OTHER));
    assert_eq!(did(&mut s), [Did::Sent(A, Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(1) }))]);
    s.frame(A, hello_of(2, HEIR));
    assert_eq!(did(&mut s), [Did::Write(Some(won))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Sent(A, ack(2))]);
    assert_eq!(cas(&mut s, 2, OTHER), [Did::Write(Some(record(3, 1, OTHER)))]);
    // Or it does not have the VM.
    let mut s = restarted();
    assert_eq!(reserve(&mut s, 1, OTHER, Owner::default()), [told(CasStatus::Lost, held)]);
    assert_eq!(reserve(&mut s, 1, HEIR, Owner::default()), [Did::Write(Some(held))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, held)]);
    assert_eq!(cas(&mut s, 1, ME), [Did::Write(Some(record(2, 1, ME)))]);
    // Or it gave the VM back.
    let mut s = restarted();
    assert_eq!(cas(&mut s, 2, ME), [Did::Write(Some(record(3, 1, ME)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(3, 1, ME))]);
    // Or the owner has not handed over, and names another, or nobody.
    for (heir, next) in [(OTHER, OTHER), (Owner::default(), ME)] {
        let mut s = restarted();
        s.frame(A, hello(1));
        assert_eq!(did(&mut s), [Did::Sent(A, ack(1))]);
        assert_eq!(reserve(&mut s, 1, ME, heir), [Did::Write(Some(held))]);
        s.owners_written(true);
        assert_eq!(did(&mut s), [told(CasStatus::Won, held)]);
        let expected = record(2, 1, next);
        assert!(cas(&mut s, 1, next).contains(&Did::Write(Some(expected))));
    }
    // Or the VM is started afresh; the heir, which may run, does not get in with the epoch it has.
    let mut s = restarted();
    s.frame(A, claim(1));
    assert_eq!(did(&mut s), [Did::Write(Some(record(3, 3, ME)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Sent(A, ack(3))]);
    s.frame(B, hello_of(2, HEIR));
    assert_eq!(did(&mut s), [Did::Sent(B, Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(3) }))]);
    assert_eq!(cas(&mut s, 3, OTHER), [Did::Write(Some(record(4, 3, OTHER)))]);
}

#[test]
fn an_heir_that_renounces_is_heard_whatever_the_disk_takes() {
    let (_, disk) = named();
    let held = record(1, 1, ME);
    let mut s = Sessions::new(BootId(9), disk.clone(), 4);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Unknown, held)]);
    assert_eq!(reserve(&mut s, 1, HEIR, Owner::default()), [Did::Write(Some(held))]);
    s.owners_written(false);
    assert_eq!(did(&mut s), [told(CasStatus::Unknown, held)]);
    // The owner has the VM, and not before that is durable.
    let won = record(2, 1, ME);
    assert_eq!(cas(&mut s, 1, ME), [Did::Write(Some(won))]);
    s.owners_written(false);
    assert_eq!(did(&mut s), [told(CasStatus::Unknown, held)]);
    assert_eq!(cas(&mut s, 1, ME), [Did::Write(Some(won))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, won)]);
    assert_eq!(cas(&mut s, 1, HEIR), [told(CasStatus::Lost, won)]);
    // An owner that cannot name another heir has said nothing about the one it had named.
    let mut s = Sessions::new(BootId(9), disk, 4);
    assert_eq!(reserve(&mut s, 1, ME, OTHER), [Did::Write(Some(held))]);
    s.owners_written(false);
    assert_eq!(did(&mut s), [told(CasStatus::Unknown, held)]);
    assert_eq!(cas(&mut s, 1, OTHER), [told(CasStatus::Unknown, held)]);
}

fn release(s: &mut Sessions, epoch: u64, owner: Owner) -> Vec<Did> {
    s.frame(VMM, Frame::OwnerRelease { vm_id: VM, epoch: Epoch(epoch), owner });
    did(s)
}

#[test]
fn a_vm_that_has_ended_is_forgotten_and_its_epochs_are_not_given_again() {
    let none = OwnerRecord { vm_id: VM, ..OwnerRecord::default() };
    let mut s = open();
    assert_eq!(cas(&mut s, 1, OTHER), [Did::Write(Some(record(2, 1, OTHER)))]);
    s.owners_written(true);
    did(&mut s);
    let lost = told(CasStatus::Lost, record(2, 1, OTHER));
    assert_eq!(release(&mut s, 1, ME), [lost], "by who has lost it");
    s.frame(A, request(2, 0, 1, remove()));
    assert_eq!(did(&mut s), [Did::Execute(token(1, 0, 1), remove(), true)]);
    assert_eq!(release(&mut s, 2, OTHER), [Did::Write(None)], "not told before it is durable");
    s.owners_written(false);
    assert_eq!(did(&mut s), [told(CasStatus::Unknown, record(2, 1, OTHER))]);
    assert_eq!(release(&mut s, 2, OTHER), [Did::Write(None)]);
    s.owners_written(true);
    let goodbye = Did::Sent(A, Frame::Goodbye { reason: Farewell::Superseded });
    assert_eq!(did(&mut s), [goodbye, Did::Close(A), told(CasStatus::Won, none)]);
    assert_eq!(release(&mut s, 2, OTHER), [told(CasStatus::Won, none)], "asked again");
    // What it was doing has no effect, and none of its epochs is taken any more.
    assert!(!s.is_wanted(token(1, 0, 1)));
    s.complete(token(1, 0, 1), done());
    for epoch in [1, 2, 3] {
        s.frame(B, hello(epoch));
        assert_eq!(did(&mut s), [Did::Sent(B, Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(0) }))]);
        assert_eq!(cas(&mut s, epoch, OTHER), [told(CasStatus::Lost, none)]);
        // Nor is nobody, who is not the owner of a record that is not there.
        assert_eq!(cas(&mut s, epoch, Owner::default()), [told(CasStatus::Lost, none)]);
    }
    s.frame(B, claim(2));
    assert_eq!(did(&mut s), [Did::Write(Some(record(3, 3, ME)))], "above all that was released");
}

#[test]
fn a_claim_that_comes_late_changes_nothing() {
    let mut s = open();
    let stale = |current| Did::Sent(B, Frame::HelloRefused(Refusal::StaleEpoch { current: Epoch(current) }));
    // Of a guest that does not know of the record, and is told from where it could take the VM.
    for late in [hello(0), claim(0)] {
        s.frame(B, late);
        assert_eq!(did(&mut s), [stale(1)]);
    }
    assert_eq!(cas(&mut s, 1, OTHER), [Did::Write(Some(record(2, 1, OTHER)))]);
    // It comes when the change is under way, which it waits for.
    s.frame(B, claim(1));
    assert_eq!(did(&mut s), []);
    s.owners_written(true);
    assert_eq!(did(&mut s), [told(CasStatus::Won, record(2, 1, OTHER)), stale(2)]);
    assert_eq!(release(&mut s, 2, OTHER), [Did::Write(None)]);
    s.owners_written(true);
    did(&mut s);
    s.frame(B, claim(1));
    assert_eq!(did(&mut s), [stale(2)]);
}

#[test]
fn who_competes_with_its_own_guests_claim_is_told_so() {
    let mut s = open();
    s.frame(B, claim(1));
    s.owners_written(true);
    did(&mut s);
    let claimed = record(2, 2, ME);
    assert_eq!(cas(&mut s, 1, OTHER), [told(CasStatus::Lost, claimed)]);
    assert_eq!(cas(&mut s, 1, ME), [told(CasStatus::Behind, claimed)]);
    assert_eq!(cas(&mut s, 2, ME), [Did::Write(Some(record(3, 2, ME)))]);
}

#[test]
fn a_vm_that_may_have_been_handed_over_is_not_released() {
    let (_, disk) = named();
    let mut s = Sessions::new(BootId(9), disk, 4);
    assert_eq!(release(&mut s, 1, ME), [told(CasStatus::Unknown, record(1, 1, ME))]);
    let (mut s, _) = named();
    assert_eq!(release(&mut s, 1, ME), [Did::Write(None)]);
    s.owners_written(true);
    did(&mut s);
    let none = OwnerRecord { vm_id: VM, ..OwnerRecord::default() };
    assert_eq!(cas(&mut s, 1, HEIR), [told(CasStatus::Lost, none)], "the heir comes too late");
}

/// It had the epoch, this D-module has forgotten that, and the VM ended before its guest could say it.
#[test]
fn an_heir_whose_epoch_was_forgotten_releases_its_record() {
    let (_, disk) = named();
    let mut s = Sessions::new(BootId(9), disk, 4);
    assert_eq!(release(&mut s, 2, OTHER), [told(CasStatus::Lost, record(1, 1, ME))], "nobody else's word counts");
    // First the epoch counts as given, and then it is released: it must not come again.
    assert_eq!(release(&mut s, 2, HEIR), [Did::Write(Some(record(2, 1, HEIR)))]);
    s.owners_written(false);
    assert_eq!(did(&mut s), [told(CasStatus::Unknown, record(1, 1, ME))]);
    assert_eq!(release(&mut s, 2, HEIR), [Did::Write(Some(record(2, 1, HEIR)))]);
    s.owners_written(true);
    assert_eq!(did(&mut s), [Did::Write(None)]);
    s.owners_written(true);
    let none = OwnerRecord { vm_id: VM, ..OwnerRecord::default() };
    assert_eq!(did(&mut s), [told(CasStatus::Won, none)]);
    s.frame(B, claim(2));
    assert_eq!(did(&mut s), [Did::Write(Some(record(3, 3, ME)))]);
}

#[test]
fn a_full_table_says_so() {
    let mut owners = OwnerTable::default();
    for vm in 1..=VMS_MAX as u64 {
        owners.apply(&OwnerChange::Set(OwnerRecord { vm_id: VmId(vm), ..record(1, 1, ME) }, None));
    }
    let mut s = Sessions::new(BootId(9), owners, 4);
    let (connection, hello) = hello_from(1, 5000, 0);
    s.frame(connection, hello);
    assert_eq!(did(&mut s), [Did::Sent(connection, Frame::HelloRefused(Refusal::Full))]);
    assert_eq!(release(&mut s, 1, ME), [Did::Write(None)]);
    s.owners_written(true);
    did(&mut s);
    let Frame::Hello(hello) = claim(1) else { unreachable!() };
    s.frame(connection, Frame::Hello(Hello { vm_id: VmId(5000), ..hello }));
    let first = OwnerRecord { vm_id: VmId(5000), ..record(2, 2, ME) };
    assert_eq!(did(&mut s), [Did::Write(Some(first))]);
}
