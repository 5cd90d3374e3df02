//! The matrix unit's instructions.
#![allow(unsafe_code, reason = "AMX has no stable intrinsics; its instructions are written out")]

use std::arch::asm;

use super::PART;

/// This thread's tile registers, given back when dropped.
pub(in super::super) struct Tiles;

impl Tiles {
    pub(in super::super) fn configure() -> Self {
        let mut config = [0u8; 64];
        config[0] = 1;
        for t in 0..8 {
            // Bytes of a row, and rows.
            config[16 + 2 * t] = 64;
            config[48 + t] = 16;
        }
        // SAFETY: only an `Amx` calls this; the configuration is a valid palette 1 in 64 readable bytes.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) config.as_ptr(), options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the tiles were configured by `configure` on this thread; a `Tiles` stays in its task.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// `out[32, 32] = a b`, or `out + a b` if `add`, over packed operands of `steps` steps; rows of `out` are `stride`
/// elements apart.
///
/// The 16 columns of one tile at a time, with one register for each operand: the fewer tile registers take turns, the
/// less a busy neighbour on the same core costs, and it is that, not the loads, which counts.
///
/// # Safety
/// The tiles of this thread are configured as [`Tiles::configure`] does. The block at `out` is valid and written by
/// nobody else.
pub(super) unsafe fn multiply<const PARTS: usize>(
    a: &[u16],
    b: &[u16],
    steps: usize,
    add: bool,
    out: *mut f32,
    stride: usize,
) {
    assert!(a.len() == steps * PARTS * PART && b.len() == a.len());
    /// The loop over steps; what it does after the first two products is `$body`, and a step is `$bytes` long in each
    /// operand.
    macro_rules! tiles {
        ($half:expr, $bytes:literal, $($body:literal),*) => {
            asm!(
                "test {z}, {z}",
                "jz 4f",
                "tileloadd tmm0, [{c} + {t}*1]",
                "tileloadd tmm1, [{d} + {t}*1]",
                "jmp 5f",
                "4:",
                "tilezero tmm0",
                "tilezero tmm1",
                "5:",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm3, [{b} + {s}*1]",
                "tileloadd tmm2, [{a} + {s}*1]",
                "tdpbf16ps tmm0, tmm2, tmm3",
                "tileloadd tmm2, [{a} + {s}*1 + 1024]",
                "tdpbf16ps tmm1, tmm2, tmm3",
                $($body,)*
                concat!("add {a}, ", $bytes),
                concat!("add {b}, ", $bytes),
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilestored [{c} + {t}*1], tmm0",
                "tilestored [{d} + {t}*1], tmm1",
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr().wrapping_add(PART / 2 * $half) => _,
                n = inout(reg) steps => _,
                z = in(reg) u64::from(add),
                c = in(reg) out.add(16 * $half),
                d = in(reg) out.add(16 * stride + 16 * $half),
                s = in(reg) 64usize,
                t = in(reg) 4 * stride,
                options(nostack),
            )
        };
    }
    for half in 0..2 {
        // SAFETY: a step reads all of its part of `a`, and of `b` the tiles of one half, all inside the step; `add` skips a
        // step, and the lengths were checked. The stores write two quarters of the block at `out`. The compiler knows no
        // tile registers, so it keeps nothing in them.
        unsafe {
            if PARTS == 1 {
                tiles!(half, "2048",);
            } else {
                tiles!(
                    half,
                    "4096",
                    "tileloadd tmm2, [{a} + {s}*1 + 2048]",
                    "tdpbf16ps tmm0, tmm2, tmm3",
                    "tileloadd tmm2, [{a} + {s}*1 + 3072]",
                    "tdpbf16ps tmm1, tmm2, tmm3",
                    "tileloadd tmm3, [{b} + {s}*1 + 2048]",
                    "tileloadd tmm2, [{a} + {s}*1]",
                    "tdpbf16ps tmm0, tmm2, tmm3",
                    "tileloadd tmm2, [{a} + {s}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm2, tmm3"
                );
            }
        }
    }
}

/// Whether the processor has tiles and bfloat16 products on them (CPUID leaf 7, EDX bits 24 and 22).
pub(super) fn detect() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && {
        let edx = __cpuid_count(7, 0).edx;
        edx >> 24 & 1 == 1 && edx >> 22 & 1 == 1
    }
}

/// Whether the processor has products of bytes on tiles (CPUID leaf 7, EDX bit 25).
pub(super) fn detect_bytes() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 25 & 1 == 1
}

/// Asks Linux to let this process use tiles: `arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)`.
pub(super) fn permit() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    let result: i64;
    // SAFETY: the system call takes two numbers and touches no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 158i64 => result,
            in("rdi") 0x1023,
            in("rsi") 18,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}
