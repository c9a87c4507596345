//! System call filters (seccomp).

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::Kind;
use super::calls::{ALL, CONTROL, DEVICE_IOCTLS, DEVICES, IOCTL_TYPE, KVM_IOCTL, VHOST_IOCTL};
use crate::error::{Error, Result, host};

/// Exit status of a process that made a forbidden system call: as a shell shows one that died of SIGSYS.
pub const STATUS: libc::c_int = 128 + libc::SIGSYS;

/// The programs, made before there is a guest.
#[derive(Debug)]
pub struct Filters {
    vcpu: BpfProgram,
    io: BpfProgram,
    control: BpfProgram,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

impl Filters {
    /// Compiles them.
    pub fn compile() -> Result<Filters> {
        Ok(Filters {
            vcpu: program(guest_rules(true)?)?,
            io: program(guest_rules(false)?)?,
            control: program(control_rules()?)?,
        })
    }

    /// From now on the calling thread makes no other system calls than its kind's.
    pub fn apply(&self, kind: Kind) -> Result<()> {
        let program = match kind {
            Kind::Vcpu => &self.vcpu,
            Kind::Io => &self.io,
            Kind::Control => &self.control,
        };
        seccompiler::apply_filter(program).map_err(failed)
    }
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::State(format!("system call filter: {e} (--no-sandbox runs without)"))
}

fn program(rules: Rules) -> Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64);
    filter.map_err(failed)?.try_into().map_err(failed)
}

fn rule(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, op, value).map_err(failed)?;
    SeccompRule::new(vec![condition]).map_err(failed)
}

/// No thread makes memory executable.
fn no_code(rules: &mut Rules) -> Result<()> {
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?]);
    }
    Ok(())
}

fn guest_rules(vcpu: bool) -> Result<Rules> {
    let mut rules: Rules = ALL.iter().chain(DEVICES).map(|call| (*call, vec![])).collect();
    no_code(&mut rules)?;
    let mut ioctls = Vec::new();
    for request in DEVICE_IOCTLS {
        ioctls.push(rule(1, SeccompCmpOp::MaskedEq(0xffff_ffff), *request)?);
    }
    ioctls.push(rule(1, SeccompCmpOp::MaskedEq(IOCTL_TYPE), VHOST_IOCTL)?);
    if vcpu {
        ioctls.push(rule(1, SeccompCmpOp::MaskedEq(IOCTL_TYPE), KVM_IOCTL)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    // Streams of vsock go to paths.
    rules.insert(libc::SYS_socket, vec![rule(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?]);
    // The console's way out ends this process, as a signal from outside would.
    rules.insert(libc::SYS_kill, vec![rule(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?]);
    let own = [libc::PR_SET_TIMERSLACK, libc::PR_SET_NAME];
    let own = own.into_iter().map(|what| rule(0, SeccompCmpOp::Eq, what as u64));
    rules.insert(libc::SYS_prctl, own.collect::<Result<Vec<_>>>()?);
    Ok(rules)
}

fn control_rules() -> Result<Rules> {
    let mut rules: Rules = ALL.iter().chain(DEVICES).chain(CONTROL).map(|call| (*call, vec![])).collect();
    no_code(&mut rules)?;
    rules.insert(libc::SYS_kill, vec![rule(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?]);
    Ok(rules)
}

/// Names the forbidden system call and ends the process. Threads cannot replace it: their filters do not let them, but for
/// the control threads', which do not face the guest.
pub fn install_handler() -> Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler is async-signal-safe.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction =
            on_forbidden as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if rc != 0 { Err(host("sigaction")(std::io::Error::last_os_error())) } else { Ok(()) }
}

extern "C" fn on_forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Where `si_syscall` stands in the kernel's siginfo_t (x86-64): after signo, errno, code, padding and the call's address.
    const SI_SYSCALL: usize = 24;
    // SAFETY: the kernel gives a whole siginfo_t to a handler with SA_SIGINFO; the read lies inside it.
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<i32>().read_unaligned() };
    let mut text = *b"vmm: the sandbox forbids system call     0; the process ends\n";
    let mut left = number.unsigned_abs();
    let mut at = 41;
    while left > 0 && at > 36 {
        text[at] = b'0' + (left % 10) as u8;
        left /= 10;
        at -= 1;
    }
    // SAFETY: the text is valid for the call; _exit ends all threads.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(STATUS);
    }
}
