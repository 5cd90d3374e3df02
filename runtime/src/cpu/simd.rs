//! Which vector instructions a kernel may use, chosen at run time.
//!
//! A kernel is a value with an `#[inline(always)]` body; [`Isa::run`] inlines that body into a function that has
//! the instructions enabled, and LLVM vectorises it there. So a body has plain loops: a closure with more than
//! a few operations may stay a call of its own, compiled without those instructions. Elementwise kernels use plain `*` and `+`, which Rust
//! never contracts, so they give the same bits on every path. Only dot products use [`Lanes::mul_add`].
#![allow(unsafe_code, reason = "functions with enabled target features are called after detection")]

/// The paths that exist.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// An instruction set that this machine has. There is no other way to get one than to ask the machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Isa(Level);

impl Isa {
    /// What every machine of the architecture has.
    pub const PORTABLE: Isa = Isa(Level::Portable);

    /// All paths that are compiled in, slowest first.
    const ALL: &[Isa] = &[
        Isa::PORTABLE,
        #[cfg(target_arch = "x86_64")]
        Isa(Level::Avx2),
        #[cfg(target_arch = "x86_64")]
        Isa(Level::Avx512),
    ];

    /// The best of [`Isa::available`].
    pub fn detect() -> Isa {
        Isa::ALL.iter().rfind(|isa| isa.is_there()).copied().unwrap_or(Isa::PORTABLE)
    }

    /// All paths that this machine can run, slowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.iter().filter(|isa| isa.is_there()).copied().collect()
    }

    /// Whether the machine can run this path, which the standard library finds out once.
    fn is_there(&self) -> bool {
        match self.0 {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Isa(Level::Avx2).is_there()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }

    /// Runs a kernel with these instructions.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Portable => kernel.run::<Plain>(),
            // SAFETY: an `Isa` of this level exists only where its features were detected.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { run_avx512(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Fused>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Fused>()
}

/// A loop to be compiled once for each instruction set. Mark `run` and all it calls `#[inline(always)]`.
pub trait Kernel {
    /// What the loop yields.
    type Output;
    /// The loop.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// What a kernel body must know about the instructions it is compiled for.
pub trait Lanes: Copy {
    /// `a * b + c`, rounded once where the hardware does that fast: for dot products only.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// No fused multiply-add.
#[derive(Clone, Copy, Debug)]
pub struct Plain;
/// Fused multiply-add in hardware.
#[derive(Clone, Copy, Debug)]
pub struct Fused;

impl Lanes for Plain {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

impl Lanes for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// `e^x` with a relative error below 2e-7 where the result is normal; `-inf` gives 0, large `x` gives `inf`,
/// NaN stays NaN. Branch-free, so loops over it vectorise.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HI: f32 = 355.0 / 512.0; // 9 bits, so n * LN2_HI is exact
    const LN2_LO: f32 = -2.121_944_4e-4;
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    let y = (p * (r * r) + r) + 1.0;
    // 2^n in two factors, so that both ends of the range round once.
    let n = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let half = n >> 1;
    let rest = n.wrapping_sub(half);
    let pow2 = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    y * pow2(half) * pow2(rest)
}

/// The larger; NaN if either is NaN.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// The smaller; NaN if either is NaN.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// IEEE half precision to `f32`, exactly, in operations that vectorise.
#[inline(always)]
pub fn f16_to_f32(h: u16) -> f32 {
    let magnitude = u32::from(h & 0x7fff);
    // Normal and subnormal numbers: move the fields, then correct the exponent's bias by 2^112.
    let finite = f32::from_bits(magnitude << 13) * f32::from_bits((112 + 127) << 23);
    let special = f32::from_bits((magnitude << 13) | 0x7f80_0000);
    let abs = if magnitude >= 0x7c00 { special } else { finite };
    f32::from_bits(abs.to_bits() | (u32::from(h & 0x8000) << 16))
}

/// bfloat16 to `f32`, exactly.
#[inline(always)]
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpAll<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for ExpAll<'_> {
        type Output = ();
        #[inline(always)]
        fn run<L: Lanes>(self) {
            for (o, &x) in self.1.iter_mut().zip(self.0) {
                *o = exp(x);
            }
        }
    }

    #[test]
    fn exp_is_accurate_and_the_same_everywhere() {
        // Every 97th float of both signs up to 110, plus the ends.
        let mut xs: Vec<f32> = (0..110f32.to_bits()).step_by(997).map(f32::from_bits).collect();
        xs.extend(xs.clone().iter().map(|x| -x));
        let edge = xs.len();
        xs.extend([f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, 1e30, -1e30]);
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::available() {
            let mut out = vec![0.0; xs.len()];
            isa.run(ExpAll(&xs, &mut out));
            let mut worst = 0f64;
            for (&x, &y) in xs[..edge].iter().zip(&out) {
                let want = f64::from(x).exp();
                if want > f64::from(f32::MAX) {
                    assert!(y == f32::INFINITY || want < 3.402_823_6e38, "exp({x}) = {y}");
                } else if want >= f64::from(f32::MIN_POSITIVE) {
                    worst = worst.max((f64::from(y) - want).abs() / want);
                } else {
                    assert!((f64::from(y) - want).abs() <= 1.5e-45, "exp({x}) = {y}");
                }
            }
            assert!(worst < 2e-7, "{}: {worst:e}", isa.name());
            assert_eq!(out[edge..edge + 2], [0.0, f32::INFINITY]);
            assert!(out[edge + 2].is_nan());
            assert_eq!(out[edge + 3..], [1.0, 1.0, f32::INFINITY, 0.0]);
            let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            match &first {
                None => first = Some(bits),
                Some(f) => assert!(*f == bits, "{} differs from portable", isa.name()),
            }
        }
    }

    #[test]
    fn halves_widen_exactly() {
        for h in 0..=u16::MAX {
            let (want, got) = (half::f16::from_bits(h).to_f32(), f16_to_f32(h));
            assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(), "{h:#x}: {want} {got}");
            let want = half::bf16::from_bits(h).to_f32();
            assert!(want.to_bits() == bf16_to_f32(h).to_bits() || want.is_nan());
        }
    }

    #[test]
    fn extremes_carry_nan() {
        assert!(max(f32::NAN, 1.0).is_nan() && max(1.0, f32::NAN).is_nan());
        assert!(min(f32::NAN, 1.0).is_nan() && min(1.0, f32::NAN).is_nan());
        assert_eq!((max(1.0, 2.0), min(1.0, 2.0)), (2.0, 1.0));
    }
}
