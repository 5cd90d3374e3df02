//! Loops over pieces on the matrix unit. Several sums go at once, because a product waits for the one before it in the same
//! register.
#![allow(unsafe_code, reason = "AMX has no stable intrinsics; its instructions are written out")]

use std::arch::asm;

/// A function for the sums `c[i][16, 16]` of products of tiles `a`, of `A` parts of the left side, and `b`, of `B` blocks; codes
/// are as they are stored (`tdpbsud`) or less their zero points (`tdpbssd`).
macro_rules! product {
    ($name:ident, $a:literal, $b:literal, [$($zero:literal),*], [$($step:expr),*], [$($store:literal),*]) => {
        /// # Safety
        /// The tiles of this thread are configured; sixteen rows, `stride` bytes apart, of as many pieces at each of `a`, the pieces at
        /// each of `b`, and room for the sums at `out`.
        #[inline(always)]
        pub(super) unsafe fn $name(a: [*const i8; $a], stride: usize, b: [*const u8; $b], pieces: usize, out: *mut u8) {
            // SAFETY: promised by the caller.
            unsafe {
                asm!(
                    $($zero,)*
                    "2:",
                    $($step,)*
                    "add {a0}, 64",
                    "add {a1}, 64",
                    "add {a2}, 64",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "add {b2}, 1024",
                    "add {b3}, 1024",
                    "dec {n}",
                    "jnz 2b",
                    $($store,)*
                    a0 = inout(reg) a[0] => _,
                    a1 = inout(reg) a[$a / 2] => _,
                    a2 = inout(reg) a[$a - 1] => _,
                    b0 = inout(reg) b[0] => _,
                    b1 = inout(reg) b[$b / 4] => _,
                    b2 = inout(reg) b[$b / 2] => _,
                    b3 = inout(reg) b[$b - 1] => _,
                    n = inout(reg) pieces => _,
                    c = in(reg) out,
                    s = in(reg) 64usize,
                    t = in(reg) stride,
                    options(nostack),
                );
            }
        }
    };
}

/// The three ways to use the registers with one kind of product.
macro_rules! products {
    ($dp:literal, $one:ident, $across:ident, $digits:ident) => {
        product!(
            $one,
            1,
            1,
            ["tilezero tmm0"],
            [
                "tileloadd tmm4, [{a0} + {t}*1]",
                "tileloadd tmm5, [{b0} + {s}*1]",
                concat!($dp, " tmm0, tmm4, tmm5")
            ],
            ["tilestored [{c} + {s}*1], tmm0"]
        );
        product!(
            $across,
            1,
            4,
            ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            [
                "tileloadd tmm4, [{a0} + {t}*1]",
                "tileloadd tmm5, [{b0} + {s}*1]",
                concat!($dp, " tmm0, tmm4, tmm5"),
                "tileloadd tmm6, [{b1} + {s}*1]",
                concat!($dp, " tmm1, tmm4, tmm6"),
                "tileloadd tmm7, [{b2} + {s}*1]",
                concat!($dp, " tmm2, tmm4, tmm7"),
                "tileloadd tmm5, [{b3} + {s}*1]",
                concat!($dp, " tmm3, tmm4, tmm5")
            ],
            [
                "tilestored [{c} + {s}*1], tmm0",
                "tilestored [{c} + {s}*1 + 1024], tmm1",
                "tilestored [{c} + {s}*1 + 2048], tmm2",
                "tilestored [{c} + {s}*1 + 3072], tmm3"
            ]
        );
        product!(
            $digits,
            3,
            1,
            ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2"],
            [
                "tileloadd tmm5, [{b0} + {s}*1]",
                "tileloadd tmm4, [{a0} + {t}*1]",
                concat!($dp, " tmm0, tmm4, tmm5"),
                "tileloadd tmm6, [{a1} + {t}*1]",
                concat!($dp, " tmm1, tmm6, tmm5"),
                "tileloadd tmm7, [{a2} + {t}*1]",
                concat!($dp, " tmm2, tmm7, tmm5")
            ],
            [
                "tilestored [{c} + {s}*1], tmm0",
                "tilestored [{c} + {s}*1 + 1024], tmm1",
                "tilestored [{c} + {s}*1 + 2048], tmm2"
            ]
        );
    };
}
products!("tdpbsud", one_unsigned, across_unsigned, digits_unsigned);
products!("tdpbssd", one_signed, across_signed, digits_signed);
