//! The boot-info page of a direct start: clock, identity, command line.
//!
//! Owns how guest time is made from the host's: guest time is monotonic over pauses, restores and ports, and goes on
//! with host real time. The page is written under its sequence lock whenever the guest may be running or be resumed.

use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};

use guest_abi::{
    BOOT_INFO_MAGIC, BOOT_INFO_VERSION, BootInfo, CMDLINE_MAX, ClockPage, GUEST_INFO_MAGIC, GUEST_INFO_OFFSET,
    GUEST_INFO_VERSION, GuestInfo, Identity,
};
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, FieldError, Result, host, kvm};
use crate::memory::Memory;

const MSR_TSC: u32 = 0x10;
/// The version of [`GuestInfo`] from which on a guest knows lulls.
const LULL_SINCE: u32 = 2;

/// Random identity of a VMM process: the owner in the ownership record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnerId(pub [u64; 2]);

impl OwnerId {
    /// A new, random one.
    pub fn random() -> Result<Self> {
        let b: [u8; 16] = random()?;
        Ok(OwnerId(<[u64; 2]>::read_from_bytes(&b).unwrap_or_default()))
    }
}

/// Bytes from the host's random generator.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the buffer is valid for its length. Requests of up to 256 bytes are never cut short.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if n != N as isize {
        return Err(host("getrandom")(std::io::Error::last_os_error()));
    }
    Ok(bytes)
}

/// What the guest's clocks said at one instant of the host's real time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Monotonic guest time in nanoseconds.
    pub mono_ns: u64,
    /// Real guest time in nanoseconds since 1970.
    pub real_ns: u64,
    /// The clock page's generation.
    pub generation: u32,
}

/// Nanoseconds since 1970 by the host's clock.
pub fn host_real_ns() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// mult and shift such that ticks × mult >> shift = nanoseconds, with 32 bits of precision.
fn scale(tsc_khz: u32) -> (u32, u32) {
    // mult = 10^6 × 2^shift / khz must fit 32 bits: the largest such shift.
    let mut shift = 32;
    loop {
        let mult = (1_000_000u128 << shift) / u128::from(tsc_khz.max(1));
        if let Ok(mult) = u32::try_from(mult) {
            return (mult, shift);
        }
        shift -= 1;
    }
}

/// Monotonic time by the page at a TSC value.
fn elapsed_ns(page: &ClockPage, tsc: u64) -> u64 {
    ((u128::from(tsc.saturating_sub(page.tsc_base)) * u128::from(page.mult)) >> page.shift.min(64)) as u64
}

/// The TSC as the guest reads it.
pub fn guest_tsc(vcpu: &VcpuFd) -> Result<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: MSR_TSC, ..Default::default() }])
        .map_err(|e| Error::State(format!("{e:?}")))?;
    match vcpu.get_msrs(&mut msrs).map_err(kvm("get TSC"))? {
        1 => Ok(msrs.as_slice()[0].data),
        _ => Err(Error::State("KVM does not tell the guest's TSC".into())),
    }
}

/// The boot-info page in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InfoPage {
    /// Guest-physical address.
    pub address: u64,
}

impl InfoPage {
    fn at(&self, offset: usize) -> GuestAddress {
        GuestAddress(self.address.saturating_add(offset as u64))
    }

    /// Writes the whole page before the first instruction: guest time starts at 0.
    pub fn write(
        &self,
        memory: &Memory,
        vcpu: &VcpuFd,
        cmdline: &str,
        platform_base: u64,
        identity: Identity,
        cpuid: &CpuId,
    ) -> Result<()> {
        let (cmdline, cmdline_len) = cmdline_field(cmdline)?;
        let page = BootInfo {
            magic: BOOT_INFO_MAGIC,
            version: BOOT_INFO_VERSION,
            cmdline_len,
            memory_size: memory.size() as u64,
            platform_base,
            clock: ClockPage::default(),
            identity,
            cpu_features: cpu_features(cpuid),
            instance: 0,
            lull: 0,
            cmdline,
        };
        memory.ram().write_slice(page.as_bytes(), self.at(0)).map_err(|e| Error::Memory(e.to_string()))?;
        self.write_clock(memory, vcpu, ClockState { mono_ns: 0, real_ns: host_real_ns(), generation: 0 })
    }

    /// What the guest's clocks say now. To be called while the vCPU is stopped.
    pub fn clock(&self, memory: &Memory, vcpu: &VcpuFd) -> Result<ClockState> {
        let page = self.read_clock(memory)?;
        let passed = elapsed_ns(&page, guest_tsc(vcpu)?);
        Ok(ClockState {
            mono_ns: page.mono_ns_base.saturating_add(passed),
            real_ns: page.real_ns_base.saturating_add(passed),
            generation: page.generation,
        })
    }

    /// Continues the guest's clocks from a saved state: monotonic time has gone on by as much real time as has passed since, never
    /// back. The generation grows by one, so the guest sees that it was restored.
    pub fn continue_clock(&self, memory: &Memory, vcpu: &VcpuFd, saved: ClockState) -> Result<()> {
        let passed = host_real_ns().saturating_sub(saved.real_ns);
        self.write_clock(
            memory,
            vcpu,
            ClockState {
                mono_ns: saved.mono_ns.saturating_add(passed),
                real_ns: saved.real_ns.saturating_add(passed),
                generation: saved.generation.wrapping_add(1),
            },
        )
    }

    /// Makes the VM another instance while no vCPU runs: its command line and identity, and the number of the instance. The clock
    /// is continued afterwards, which is what tells the guest.
    pub fn make_instance(&self, memory: &Memory, cmdline: &str, identity: Identity) -> Result<()> {
        let failed = |e: vm_memory::GuestMemoryError| Error::Memory(e.to_string());
        let mut bytes = [0u8; size_of::<BootInfo>()];
        memory.ram().read_slice(&mut bytes, self.at(0)).map_err(failed)?;
        let mut page = BootInfo::read_from_bytes(&bytes).map_err(|e| Error::State(format!("boot-info page: {e}")))?;
        if page.magic != BOOT_INFO_MAGIC || page.version != BOOT_INFO_VERSION {
            let why = format!("boot-info page of version {}: instances are made of {BOOT_INFO_VERSION}", page.version);
            return Err(Error::State(why));
        }
        page.instance = page.instance.wrapping_add(1);
        page.identity = identity;
        (page.cmdline, page.cmdline_len) = cmdline_field(cmdline)?;
        memory.ram().write_slice(page.as_bytes(), self.at(0)).map_err(failed)
    }

    fn read_clock(&self, memory: &Memory) -> Result<ClockPage> {
        let mut bytes = [0u8; size_of::<ClockPage>()];
        memory
            .ram()
            .read_slice(&mut bytes, self.at(offset_of!(BootInfo, clock)))
            .map_err(|e| Error::Memory(e.to_string()))?;
        Ok(ClockPage::read_from_bytes(&bytes).unwrap_or_default())
    }

    fn write_clock(&self, memory: &Memory, vcpu: &VcpuFd, state: ClockState) -> Result<()> {
        let khz = vcpu.get_tsc_khz().map_err(kvm("get TSC frequency"))?;
        let (mult, shift) = scale(khz);
        let seq = self.read_clock(memory)?.seq;
        let page = ClockPage {
            seq: seq.wrapping_add(2) & !1,
            generation: state.generation,
            tsc_base: guest_tsc(vcpu)?,
            mono_ns_base: state.mono_ns,
            real_ns_base: state.real_ns,
            mult,
            shift,
        };
        let at = self.at(offset_of!(BootInfo, clock));
        let ram = memory.ram();
        let store = |seq: u32| ram.store(seq, at, Ordering::Release).map_err(|e| Error::Memory(e.to_string()));
        store(seq | 1)?;
        fence(Ordering::SeqCst);
        let body = &page.as_bytes()[size_of::<u32>()..];
        let body_at = self.at(offset_of!(BootInfo, clock) + size_of::<u32>());
        ram.write_slice(body, body_at).map_err(|e| Error::Memory(e.to_string()))?;
        fence(Ordering::SeqCst);
        store(page.seq)
    }

    /// The identity the guest sees (its epoch is written by the guest itself after a claim).
    pub fn identity(&self, memory: &Memory) -> Result<Identity> {
        let mut bytes = [0u8; size_of::<Identity>()];
        memory
            .ram()
            .read_slice(&mut bytes, self.at(offset_of!(BootInfo, identity)))
            .map_err(|e| Error::Memory(e.to_string()))?;
        Ok(Identity::read_from_bytes(&bytes).unwrap_or_default())
    }

    /// Asks for a lull ([`BootInfo::lull`]), or (0) no more. The guest may run.
    pub fn ask_lull(&self, memory: &Memory, number: u32) -> Result<()> {
        let at = self.at(offset_of!(BootInfo, lull));
        memory.ram().store(number, at, Ordering::Release).map_err(|e| Error::Memory(e.to_string()))
    }

    /// The guest's answer to that so far; `None`: it does not know what that is.
    pub fn lull_answer(&self, memory: &Memory) -> Option<u32> {
        let told = self.told(memory)?;
        if told.version < LULL_SINCE {
            return None;
        }
        let at = self.at(GUEST_INFO_OFFSET + offset_of!(GuestInfo, lull));
        memory.ram().load(at, Ordering::Acquire).ok()
    }

    /// What the guest tells of itself.
    pub fn told(&self, memory: &Memory) -> Option<GuestInfo> {
        let mut bytes = [0u8; size_of::<GuestInfo>()];
        memory.ram().read_slice(&mut bytes, self.at(GUEST_INFO_OFFSET)).ok()?;
        let told = GuestInfo::read_from_bytes(&bytes).ok()?;
        (told.magic == GUEST_INFO_MAGIC && (1..=GUEST_INFO_VERSION).contains(&told.version)).then_some(told)
    }

    /// Rewrites the identity, while the vCPU is stopped.
    pub fn set_identity(&self, memory: &Memory, identity: Identity) -> Result<()> {
        memory
            .ram()
            .write_slice(identity.as_bytes(), self.at(offset_of!(BootInfo, identity)))
            .map_err(|e| Error::Memory(e.to_string()))
    }
}

/// A command line as it lies in the page, with its length.
fn cmdline_field(cmdline: &str) -> Result<([u8; CMDLINE_MAX], u32)> {
    let mut field = [0; CMDLINE_MAX];
    let Some(place) = field.get_mut(..cmdline.len()) else {
        let text = format!("{} bytes with the devices, at most {CMDLINE_MAX}", cmdline.len());
        return Err(Error::Config(vec![FieldError::new("cmdline", text)]));
    };
    place.copy_from_slice(cmdline.as_bytes());
    Ok((field, cmdline.len() as u32))
}

/// Leaf 1 ECX and EDX, leaf 7.0 EBX and ECX.
fn cpu_features(cpuid: &CpuId) -> [u32; 4] {
    let leaf = |n| cpuid.as_slice().iter().find(|e| e.function == n && e.index == 0);
    let (one, seven) = (leaf(1), leaf(7));
    [one.map_or(0, |e| e.ecx), one.map_or(0, |e| e.edx), seven.map_or(0, |e| e.ebx), seven.map_or(0, |e| e.ecx)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_exact_to_nanoseconds_a_day() {
        for khz in [1_000_000, 1_999_999, 2_450_000, 3_187_201, 5_800_000] {
            let (mult, shift) = scale(khz);
            let page = ClockPage { mult, shift, ..Default::default() };
            let day_ticks = u64::from(khz) * 1000 * 86_400;
            let error = elapsed_ns(&page, day_ticks).abs_diff(86_400_000_000_000);
            assert!(error < 86_400 * 1000, "{khz} kHz: {error} ns a day");
        }
    }

    #[test]
    fn time_before_the_base_does_not_wrap() {
        let page = ClockPage { tsc_base: 1000, mult: 1, shift: 0, ..Default::default() };
        assert_eq!(elapsed_ns(&page, 10), 0);
    }
}
