//! The symbols LLVM may call that the linux-gnu target expects from libc.
//!
//! In assembly, so that no idiom pass of LLVM can turn them into calls to themselves; so they are as fast in a
//! debug build. Checked against the obvious Rust by the test image.
use core::arch::naked_asm;

/// ISO C memcpy.
///
/// # Safety
/// As in C.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(d: *mut u8, s: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 16",
        "jb 5f",
        "cmp rdx, 32",
        "ja 2f",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi+rdx-16]",
        "movups [rdi], xmm0",
        "movups [rdi+rdx-16], xmm1",
        "ret",
        "2: cmp rdx, 64",
        "ja 3f",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi+16]",
        "movups xmm2, [rsi+rdx-32]",
        "movups xmm3, [rsi+rdx-16]",
        "movups [rdi], xmm0",
        "movups [rdi+16], xmm1",
        "movups [rdi+rdx-32], xmm2",
        "movups [rdi+rdx-16], xmm3",
        "ret",
        "3: cmp rdx, 768",
        "jae 9f",
        "movups xmm4, [rsi+rdx-32]",
        "movups xmm5, [rsi+rdx-16]",
        "lea r8, [rdi+rdx-32]",
        "4: movups xmm0, [rsi]",
        "movups xmm1, [rsi+16]",
        "movups [rdi], xmm0",
        "movups [rdi+16], xmm1",
        "add rsi, 32",
        "add rdi, 32",
        "cmp rdi, r8",
        "jb 4b",
        "movups [r8], xmm4",
        "movups [r8+16], xmm5",
        "ret",
        "5: cmp edx, 8",
        "jb 6f",
        "mov rcx, [rsi]",
        "mov r8, [rsi+rdx-8]",
        "mov [rdi], rcx",
        "mov [rdi+rdx-8], r8",
        "ret",
        "6: cmp edx, 4",
        "jb 7f",
        "mov ecx, [rsi]",
        "mov r8d, [rsi+rdx-4]",
        "mov [rdi], ecx",
        "mov [rdi+rdx-4], r8d",
        "ret",
        "7: test edx, edx",
        "jz 8f",
        "movzx ecx, byte ptr [rsi]",
        "movzx r8d, byte ptr [rsi+rdx-1]",
        "mov r9, rdx",
        "shr r9",
        "movzx r10d, byte ptr [rsi+r9]",
        "mov [rdi], cl",
        "mov [rdi+r9], r10b",
        "mov [rdi+rdx-1], r8b",
        "8: ret",
        "9: mov rcx, rdx",
        "rep movsb",
        "ret",
    )
}

/// ISO C memmove.
///
/// # Safety
/// As in C.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(d: *mut u8, s: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "cmp rdx, 64", "jbe {memcpy}", // loads all before it stores
        "mov rax, rdi", "sub rax, rsi", "cmp rax, rdx", "jae {memcpy}", // no overlap, or dst below src
        "mov rax, rdi",
        "movups xmm4, [rsi]", "movups xmm5, [rsi+16]", // head, stored last
        "2: movups xmm0, [rsi+rdx-16]", "movups xmm2, [rsi+rdx-32]",
        "movups [rdi+rdx-16], xmm0", "movups [rdi+rdx-32], xmm2",
        "sub rdx, 32", "cmp rdx, 32", "ja 2b",
        "movups [rdi], xmm4", "movups [rdi+16], xmm5", "ret",
        memcpy = sym memcpy,
    )
}

/// ISO C memset.
///
/// # Safety
/// As in C.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(d: *mut u8, c: i32, n: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "movzx eax, sil",
        "cmp rdx, 16",
        "jb 4f",
        "cmp rdx, 512",
        "jae 5f",
        "movd xmm0, eax",
        "punpcklbw xmm0, xmm0",
        "pshuflw xmm0, xmm0, 0",
        "punpcklqdq xmm0, xmm0",
        "lea r9, [rdi+rdx-16]",
        "3: movups [rdi], xmm0",
        "add rdi, 16",
        "cmp rdi, r9",
        "jb 3b",
        "movups [r9], xmm0",
        "mov rax, r8",
        "ret",
        "4: test edx, edx",
        "jz 6f",
        "2: mov [rdi], al",
        "inc rdi",
        "dec edx",
        "jnz 2b",
        "6: mov rax, r8",
        "ret",
        "5: mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
    )
}

/// ISO C memcmp.
///
/// # Safety
/// As in C.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!(
        "2: cmp rdx, 8",
        "jb 3f",
        "mov rax, [rdi]",
        "mov rcx, [rsi]",
        "cmp rax, rcx",
        "jne 5f",
        "add rdi, 8",
        "add rsi, 8",
        "sub rdx, 8",
        "jmp 2b",
        "3: test edx, edx",
        "jz 4f",
        "movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "sub eax, ecx",
        "jne 6f",
        "inc rdi",
        "inc rsi",
        "dec edx",
        "jmp 3b",
        "4: xor eax, eax",
        "6: ret",
        "5: bswap rax",
        "bswap rcx",
        "cmp rax, rcx",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
    )
}

/// POSIX bcmp.
///
/// # Safety
/// As in C.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!("jmp {m}", m = sym memcmp)
}

/// ISO C strlen.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn strlen(s: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: of the caller: the string ends in a NUL. Volatile, or LLVM makes a call to strlen of it.
    while unsafe { s.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}
