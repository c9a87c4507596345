    // Everything that runs at CPL 0, and the two ELF notes. Integer instructions only.

    // ---- ELF note of the direct start: guest_abi::DirectStart ----
    .section .note.outrigger,"a",@note
    .balign 4
    .long 10, 80, {note_type}
    .asciz "Outrigger"
    .balign 4
    .long {note_version}, 0
    .quad {pt}, {gdt}, {idt}, {tss}
    .quad r3_start_direct
    .quad {stack_top}
    .quad {boot_info}
    .short 63, 4095, 0x30, 0x2b, 0x23, 0, 0, 0

    // ---- ELF note of the PVH start: 32-bit entry (XEN_ELFNOTE_PHYS32_ENTRY) ----
    .section .note.Xen,"a",@note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long r0_start32

    .section .ring0.stubs,"ax",@progbits
    .globl r0_stubs
r0_stubs:
    .set v, 0
    .rept 256
    .balign 16
    .if v == 6
      jmp r0_ud
    .elseif v >= 32
      jmp r0_irq
    .elseif v == 8 || v == 10 || v == 11 || v == 12 || v == 13 || v == 14 || v == 17 || v == 21 || v == 29 || v == 30
      push v
      jmp r0_exc
    .else
      push 0
      push v
      jmp r0_exc
    .endif
    .set v, v + 1
    .endr

    .section .ring0.text,"ax",@progbits
    // ---- 64-bit entry in ring 0: rsi = PVH start info ----
    .globl r0_start64
r0_start64:
    mov rdi, rsi
    mov al, 0xff            // mask the legacy PIC: under QEMU its IRQ 0 arrives as vector 8
    out 0x21, al
    out 0xa1, al
    lgdt [{gdtr}]
    lidt [{idtr}]
    mov eax, {pt}
    mov cr3, rax
    mov rax, cr4
    or eax, 0x620           // PAE OSFXSR OSXMMEXCPT
    mov cr4, rax
    mov rax, cr0
    and eax, 0xfffffff3     // no EM, TS
    or eax, 0x10022         // WP NE MP
    mov cr0, rax
    mov eax, 0x30
    ltr ax
    mov eax, {lapic} + 0xf0 // LAPIC on, spurious vector 0xff
    mov dword ptr [rax], 0x1ff
    mov eax, {lapic} + 0x3e0 // timer: divide by 1
    mov dword ptr [rax], 0xb
    mov rsp, {r0stack}
    mov ecx, 0x23
    mov ds, ecx
    mov es, ecx
    push 0x23
    mov eax, {stack_top}
    push rax
    push 0x202
    push 0x2b
    lea rax, [rip + r3_start_pvh]
    push rax
    iretq

    // ---- PVH entry: 32-bit protected mode, paging off, ebx = start info ----
    .code32
    .globl r0_start32
r0_start32:
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, {pt}
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900           // LME NXE
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt [{gdtr}]
    mov esi, ebx
    // `ljmp 8, r0_start64` (LLVM's Intel syntax refuses far jumps in .code32)
    .byte 0xea
    .long r0_start64
    .word 8
    .code64

    // ---- interrupt: end of interrupt, return. Only the timer of a halt comes here. ----
r0_irq:
    push rax
    mov eax, {lapic} + 0xb0
    mov dword ptr [rax], 0
    pop rax
    iretq

    // ---- #UD: the gate from ring 3, recognised by the address of its one instruction. eax: operation ----
r0_ud:
    cmp qword ptr [rsp], offset r3_gate_insn
    jne 9f
    add qword ptr [rsp], 2
    cmp eax, {op_halt}
    je 2f
    cmp eax, {op_count}
    je 4f
    cmp eax, {op_start}
    je 5f
    jmp r0_reset
2:  mov eax, {lapic} + 0x320 // one-shot, vector 0x40
    mov dword ptr [rax], 0x40
    mov eax, {lapic} + 0x380
    mov dword ptr [rax], edi
    sti                      // takes effect after hlt has begun: a timer that fires before is not lost
    hlt
    cli
    iretq
4:  mov eax, {lapic} + 0x390
    mov eax, dword ptr [rax]
    iretq
5:  mov eax, {lapic} + 0x320 // one-shot, masked
    mov dword ptr [rax], 0x10040
    mov eax, {lapic} + 0x380
    mov dword ptr [rax], edi
    iretq
9:  push 0
    push 6

    // ---- exception: record, resume ring 3 in its fault handler on the fault stack ----
r0_exc:
    test byte ptr [rsp + 24], 3
    jz r0_fatal
    push rax
    mov rax, [rsp + 8]
    mov [R0_FAULT], rax
    mov rax, [rsp + 16]
    mov [R0_FAULT + 8], rax
    mov rax, [rsp + 24]
    mov [R0_FAULT + 16], rax
    mov rax, [rsp + 40]
    mov [R0_FAULT + 24], rax
    mov rax, [rsp + 48]
    mov [R0_FAULT + 32], rax
    mov rax, cr2
    mov [R0_FAULT + 40], rax
    mov qword ptr [rsp + 24], offset r3_fault_entry
    mov qword ptr [rsp + 48], {fault_stack_top}
    pop rax
    add rsp, 16
    iretq

    // ---- a fault in ring 0 itself: tell the VMM if it is ours, else reset ----
r0_fatal:
    cmp dword ptr [{boot_info}], {magic_lo}
    jne r0_reset
    mov rax, [{platform_base}]
    test rax, rax
    jz r0_reset
    mov dword ptr [rax + {exit_reg}], {ring0_fault}
r0_reset:
    lidt [{null_idtr}]
    ud2
    hlt
    jmp r0_reset
