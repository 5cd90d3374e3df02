//! Which instructions compute the sums.

use crate::cpu::simd::Isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::{simd::Level, split::Amx};

/// A way to compute sums of products of bytes that this machine has.
#[derive(Clone, Copy, Debug)]
pub struct IntPath {
    pub(super) kind: Kind,
    /// For what comes after the sums.
    pub(super) isa: Isa,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Any instructions of [`IntPath::isa`].
    Plain,
    /// Byte products of AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Byte products of AVX-512 (VNNI).
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// The matrix unit for several rows, VNNI for few.
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
}

impl IntPath {
    /// All paths that this machine can run, slowest first.
    #[cfg(target_arch = "x86_64")]
    pub fn available(unit: Option<Amx>) -> Vec<IntPath> {
        let isas = Isa::available();
        let wide = isas.last().is_some_and(|isa| isa.level() == Level::Avx512);
        let vnni = wide && is_x86_feature_detected!("avx512vnni");
        let path = |kind, isa| IntPath { kind, isa };
        let mut all = vec![path(Kind::Plain, Isa::PORTABLE)];
        all.extend(isas.get(1).map(|&isa| path(Kind::Avx2, isa)));
        if let Some(&isa) = isas.last().filter(|_| vnni) {
            all.push(path(Kind::Vnni, isa));
            all.extend(unit.filter(|u| u.multiplies_bytes()).map(|u| path(Kind::Amx(u), isa)));
        }
        all
    }

    /// The best of [`IntPath::available`].
    #[cfg(target_arch = "x86_64")]
    pub fn detect(unit: Option<Amx>) -> IntPath {
        IntPath::available(unit).pop().unwrap_or(IntPath { kind: Kind::Plain, isa: Isa::PORTABLE })
    }

    /// All paths that this machine can run, slowest first.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn available() -> Vec<IntPath> {
        Isa::available().into_iter().map(|isa| IntPath { kind: Kind::Plain, isa }).collect()
    }

    /// The best of [`IntPath::available`].
    #[cfg(not(target_arch = "x86_64"))]
    pub fn detect() -> IntPath {
        IntPath { kind: Kind::Plain, isa: Isa::detect() }
    }

    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self.kind {
            Kind::Plain => self.isa.name(),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx(_) => "amx-int8",
        }
    }
}
