//! Registers of a direct start in ring 3. The values are the contract of `guest_abi::DirectStart`.

use guest_abi::DirectStart;
use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::error::{Result, kvm};

/// PG, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8001_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 0x620;
/// LME, LMA, NXE.
const EFER: u64 = 0xd00;
/// Interrupts on, and the bit that is always set.
const RFLAGS: u64 = 0x202;
const FCW: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;
const TSS_LIMIT: u32 = 0x67;

/// Loads the registers the image's note asks for.
pub fn set_registers(vcpu: &VcpuFd, start: &DirectStart) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("get sregs"))?;
    fill(&mut sregs, start);
    vcpu.set_sregs(&sregs).map_err(kvm("set sregs"))?;
    let regs =
        kvm_regs { rip: start.entry, rsp: start.stack_top, rdi: start.boot_info, rflags: RFLAGS, ..Default::default() };
    vcpu.set_regs(&regs).map_err(kvm("set regs"))?;
    vcpu.set_fpu(&kvm_fpu { fcw: FCW, mxcsr: MXCSR, ..Default::default() }).map_err(kvm("set fpu"))
}

fn fill(sregs: &mut kvm_sregs, start: &DirectStart) {
    let flat = |selector, type_, long: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    let data = flat(start.user_ss, 3, false);
    sregs.cr0 = CR0;
    sregs.cr3 = start.cr3;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    sregs.cs = flat(start.user_cs, 11, true);
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable { base: start.gdt_base, limit: start.gdt_limit, ..Default::default() };
    sregs.idt = kvm_dtable { base: start.idt_base, limit: start.idt_limit, ..Default::default() };
    sregs.tr = kvm_segment {
        base: start.tss_base,
        limit: TSS_LIMIT,
        selector: start.tss_selector,
        type_: 11,
        present: 1,
        ..Default::default()
    };
}
