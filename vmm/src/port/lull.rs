//! Asking the guest for a lull before it is stopped ([`guest_abi::BootInfo::lull`]): its clients are to have nothing under way that the pause
//! would keep the answer from.
//!
//! Owns the question in the guest's boot-info page. Always true: the guest runs on while it is waited for, at most [`WAIT_MAX`], and is
//! stopped then whatever it says; the question is taken back wherever the guest goes on, here or at the destination. A guest that
//! does not know lulls is not asked; one that lies harms its own clients.

use std::time::{Duration, Instant};

use super::job::LullReport;
use crate::schedule::Urgent;
use crate::vm::Vm;

/// How long a guest is waited for.
const WAIT_MAX: Duration = Duration::from_millis(3);
/// How often it is looked whether it has answered.
const LOOK: Duration = Duration::from_micros(20);

/// Asks the guest, which runs, and waits for its answer; how it went, if it knows lulls. Meanwhile its vCPU is urgent: on a busy host it
/// might not have its turn before the wait is over.
pub(super) fn ask(vm: &Vm) -> Option<LullReport> {
    let (info, memory) = (vm.info()?, vm.memory());
    let last = info.lull_answer(memory)?;
    let number = number_after(last);
    if let Err(e) = info.ask_lull(memory, number) {
        log::debug!("no lull: {e}");
        return None;
    }
    let _urgent: Vec<Urgent> = vm.vcpu_threads().filter_map(Urgent::vcpu).collect();
    vm.wake();
    let began = Instant::now();
    let has_answered = || info.lull_answer(memory) == Some(number);
    while !has_answered() && began.elapsed() < WAIT_MAX {
        std::thread::sleep(LOOK);
    }
    Some(LullReport { answered: has_answered(), waited_us: began.elapsed().as_micros() as u64 })
}

/// The number of the next question: what the guest has answered before must not be taken for the answer.
fn number_after(last: u32) -> u32 {
    last.wrapping_add(1).max(1)
}

/// Takes the question back, while the guest stands still.
pub(super) fn end(vm: &Vm) {
    if let Some(info) = vm.info()
        && info.lull_answer(vm.memory()).is_some()
        && let Err(e) = info.ask_lull(vm.memory(), 0)
    {
        log::debug!("the guest ends its lull by itself: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_question_has_the_number_of_the_last_answer_nor_none() {
        for last in [0, 1, 7, u32::MAX - 1, u32::MAX] {
            let number = number_after(last);
            assert!(number != last && number != 0, "{last}");
        }
    }
}
