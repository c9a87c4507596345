//! An arbiter: the fabric crate's ownership records behind a real TCP socket, without a disk.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fabric::id::{Epoch, Owner, VmId};
use fabric::owner::{OwnerChange, OwnerError, OwnerRecord, OwnerTable, claim, compare_and_swap, release, reserve};
use fabric::wire::{CasStatus, Farewell, Frame, FrameReader, encode};

/// See the module. Stops answering when dropped.
pub struct Arbiter {
    pub address: SocketAddr,
    table: Arc<Mutex<OwnerTable>>,
    silent: Arc<AtomicBool>,
    old: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Arbiter {
    /// At a free port of loopback, in the caller's network namespace.
    pub fn start() -> Arbiter {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let arbiter = Arbiter {
            address: listener.local_addr().unwrap(),
            table: Arc::default(),
            silent: Arc::default(),
            old: Arc::default(),
            stop: Arc::default(),
        };
        let (table, silent, stop) = (arbiter.table.clone(), arbiter.silent.clone(), arbiter.stop.clone());
        let old = arbiter.old.clone();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((socket, _)) => {
                        let (table, silent, stop) = (table.clone(), silent.clone(), stop.clone());
                        let old = old.clone();
                        std::thread::spawn(move || serve(socket, &table, &silent, &old, &stop));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        arbiter
    }

    /// A VM's record.
    pub fn record(&self, vm_id: u64) -> Option<OwnerRecord> {
        self.table.lock().unwrap().get(VmId(vm_id))
    }

    /// Gives a VM to somebody who is none of the processes of the test.
    pub fn usurp(&self, vm_id: u64) {
        let mut table = self.table.lock().unwrap();
        let (current, floor, vm_id) = (table.get(VmId(vm_id)), table.floor(), VmId(vm_id));
        let from = current.map_or(floor, |r| r.epoch);
        let record = claim(current, floor, vm_id, from, false, Owner([1, 1])).unwrap();
        table.apply(&OwnerChange::Set(record, None));
    }

    /// Releases a VM's record, whoever has it.
    pub fn release(&self, vm_id: u64) {
        self.table.lock().unwrap().apply(&OwnerChange::Release(VmId(vm_id), Epoch::UNCLAIMED));
    }

    /// Is one from before there were heirs, which takes the naming of one for a mistake.
    pub fn make_old(&self) {
        self.old.store(true, Ordering::Release);
    }

    /// Takes questions without answering or deciding them, or ends that.
    pub fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Release);
    }
}

impl Drop for Arbiter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn serve(mut socket: TcpStream, table: &Mutex<OwnerTable>, silent: &AtomicBool, old: &AtomicBool, stop: &AtomicBool) {
    socket.set_nodelay(true).unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut reader = FrameReader::default();
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Acquire) {
        let n = match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => continue,
            Err(_) => return,
        };
        let mut bytes = &buffer[..n];
        while let Some(frame) = reader.push(&mut bytes).unwrap() {
            if silent.load(Ordering::Acquire) {
                continue;
            }
            if old.load(Ordering::Acquire) && matches!(frame, Frame::OwnerReserve { .. }) {
                let goodbye = encode(Frame::Goodbye { reason: Farewell::Protocol }).unwrap();
                let _ = socket.write_all(&goodbye.into_vec());
                return;
            }
            let mut table = table.lock().unwrap();
            let answer = match frame {
                Frame::OwnerGet { vm_id } => {
                    let none = OwnerRecord { vm_id, ..OwnerRecord::default() };
                    Frame::OwnerRecord(table.get(vm_id).unwrap_or(none))
                }
                Frame::OwnerCas { vm_id, expect, owner } => {
                    match compare_and_swap(table.get(vm_id), table.floor(), vm_id, expect, owner) {
                        Ok(record) => {
                            table.apply(&OwnerChange::Set(record, None));
                            Frame::OwnerCasResult { status: CasStatus::Won, record }
                        }
                        Err(OwnerError::Lost(record)) => Frame::OwnerCasResult { status: CasStatus::Lost, record },
                        Err(e) => panic!("{e}"),
                    }
                }
                Frame::OwnerReserve { vm_id, epoch, owner, heir } => {
                    let heir = (heir != Owner::default()).then_some(heir);
                    match reserve(table.get(vm_id), table.heir(vm_id), vm_id, epoch, owner, heir) {
                        Ok(record) => {
                            table.apply(&OwnerChange::Set(record, heir));
                            Frame::OwnerCasResult { status: CasStatus::Won, record }
                        }
                        Err(OwnerError::Lost(record)) => Frame::OwnerCasResult { status: CasStatus::Lost, record },
                        Err(e) => panic!("{e}"),
                    }
                }
                Frame::OwnerRelease { vm_id, epoch, owner } => {
                    match release(table.get(vm_id), table.floor(), vm_id, epoch, owner) {
                        Ok(_) => {
                            table.apply(&OwnerChange::Release(vm_id, epoch));
                            let record = OwnerRecord { vm_id, ..OwnerRecord::default() };
                            Frame::OwnerCasResult { status: CasStatus::Won, record }
                        }
                        Err(OwnerError::Lost(record)) => Frame::OwnerCasResult { status: CasStatus::Lost, record },
                        Err(e) => panic!("{e}"),
                    }
                }
                other => panic!("not a question about ownership: {other:?}"),
            };
            drop(table);
            if socket.write_all(&encode(answer).unwrap().into_vec()).is_err() {
                return;
            }
        }
    }
}
