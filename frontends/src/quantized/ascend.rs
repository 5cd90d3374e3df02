//! Linear layers as vllm-ascend's description has them (methods.md §10.5, ascend.md §5.2).

use std::path::Path;

use qrmc_ir::{Elem, Grain, QuantSpec, ScaleType, Tensor, TensorType, WeightError, WeightSource};

use super::config::{Ascend, Scheme, Storage};
use super::linear::{Linear, ints};
use super::open::{AGAIN, CONTRADICT, Open};
use crate::hf::SafetensorsFolder;
use crate::{ImportError, RoundedInput, SmallTensor};

/// The tensors that one type or another has beside codes.
const PARTS: [&str; 9] = [
    "weight_scale",
    "weight_offset",
    "left_trans",
    "right_trans",
    "clip_ratio",
    "input_scale",
    "input_offset",
    "deq_scale",
    "quant_bias",
];

/// The ends of the names of tensors of caches.
pub(super) const CACHED: [&str; 2] = [".kv_cache_scale", ".kv_cache_offset"];

/// How the keys and values of each layer are rounded: signed codes with a stored scale a channel.
///
/// # Errors
/// If a tensor is missing or has another type, a scale is no positive number, or an offset is not 0.
pub(super) fn caches(
    folder: &Path,
    files: &SafetensorsFolder,
    all: &[(String, TensorType)],
) -> Result<Vec<(String, RoundedInput)>, ImportError> {
    let scheme = Scheme {
        storage: Storage::Ascend(Ascend::Plain),
        bits: 8,
        grain: Grain::Channel,
        symmetric: Some(true),
        reordered: false,
        input: None,
    };
    let mut out = Vec::new();
    for (name, _) in all {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        if ![".self_attn.k_proj", ".self_attn.v_proj"].iter().any(|end| module.ends_with(end)) {
            continue;
        }
        let o = Open::new(files, folder, module, scheme);
        let (_, [n, one]) = o.need("kv_cache_scale", |e| e == Elem::F32)?;
        let scales = o.finite("kv_cache_scale", [n, 1])?;
        let offsets = o.finite("kv_cache_offset", [n, 1])?;
        let values = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let (scale, offset): (Vec<f32>, Vec<f32>) = (values(&scales), values(&offsets));
        if one != 1 || scale.iter().any(|s| *s <= 0.0) || offset.iter().any(|z| *z != 0.0) {
            let what =
                format!("the scales of `{module}.kv_cache_scale` are not positive, or its offsets not 0");
            return Err(o.fail(what, "caches are read as signed codes without zero points"));
        }
        let calibrated = vec![o.small("kv_cache_scale", Elem::F32, &[n], scales)];
        let spec = QuantSpec::sym(8, Grain::Channel);
        out.push((module.to_owned(), RoundedInput { calibrated, ..RoundedInput::by_itself(spec) }));
    }
    Ok(out)
}

impl Ascend {
    /// The parts that belong to it.
    fn parts(self) -> std::ops::Range<usize> {
        match self {
            Ascend::Plain => 0..2,
            Ascend::Transformed => 0..5,
            Ascend::Static => 5..9,
        }
    }
}

impl Open<'_> {
    /// Floats in 32 bits that are all finite.
    fn finite(&self, part: &str, want: [usize; 2]) -> Result<Vec<u8>, ImportError> {
        let (_, have) = self.need(part, |e| e == Elem::F32)?;
        if have != want {
            let what = format!("tensor `{}.{part}` is {have:?}; its type asks for {want:?}", self.name);
            return Err(self.fail(what, CONTRADICT));
        }
        let bytes = self.bytes(part)?;
        match Elem::F32.find_non_finite(&bytes) {
            None => Ok(bytes),
            Some(at) => {
                let what = format!("element {at} of `{}.{part}` is NaN or infinite", self.name);
                Err(self.fail(what, AGAIN))
            }
        }
    }

    /// A Kronecker pair and the clip of the range behind it: `X' = left^T X right` for a token as rows of `right` columns.
    fn transformed(&self, spec: QuantSpec, cols: usize) -> Result<RoundedInput, ImportError> {
        let pair = qrmc_ir::fermat(cols as u64).map(|(l, r)| (l as usize, r as usize));
        let Some((left, right)) = pair else {
            let what = format!("the {cols} inputs of `{}` make no Kronecker pair", self.name);
            return Err(self.fail(what, CONTRADICT));
        };
        let side = |part: &str, n: usize| -> Result<SmallTensor, ImportError> {
            Ok(self.small(part, Elem::F32, &[n, n], self.finite(part, [n, n])?))
        };
        let transforms = vec![(side("right_trans", right)?, 1), (side("left_trans", left)?, right as u64)];
        let clip = self.finite("clip_ratio", [1, 1])?;
        let value = f32::from_le_bytes(*clip.first_chunk().unwrap_or(&[0; 4]));
        if value <= 0.0 {
            let what = format!("`{}.clip_ratio` is {value}, which is no part of a range", self.name);
            return Err(self.fail(what, AGAIN));
        }
        let clip = Some(self.small("clip_ratio", Elem::F32, &[1], clip));
        Ok(RoundedInput { transforms, clip, ..RoundedInput::by_itself(spec) })
    }

    /// One scale of the input, and a zero point where its offset is not 0.
    fn by_one_scale(&self) -> Result<RoundedInput, ImportError> {
        let mut calibrated = vec![self.input_scale(|e| e == Elem::F32)?];
        let offset = self.finite("input_offset", [1, 1])?;
        let z = f32::from_le_bytes(*offset.first_chunk().unwrap_or(&[0; 4]));
        if !(-128.0..=127.0).contains(&z) || z.fract() != 0.0 {
            return Err(self.fail(format!("`{}.input_offset` is {z}, which is no code", self.name), AGAIN));
        }
        let spec = if z == 0.0 {
            QuantSpec::sym(8, Grain::Tensor)
        } else {
            calibrated.push(self.small("input_offset", Elem::U8, &[1], vec![(z as i32 + 128) as u8]));
            QuantSpec::asym(8, Grain::Tensor)
        };
        Ok(RoundedInput { calibrated, ..RoundedInput::by_itself(spec) })
    }
}

impl Linear {
    /// Checks the tensors of a layer against each other and its type.
    pub(super) fn ascend(o: &Open<'_>, beside: Ascend) -> Result<Self, ImportError> {
        let (scheme, bits) = (o.scheme, o.scheme.bits);
        let (_, [rows, cols]) = o.need("weight", |e| e == Elem::I8)?;
        let own = beside.parts();
        if let Some((_, part)) = PARTS.iter().enumerate().find(|(i, p)| !own.contains(i) && o.has(p)) {
            let what =
                format!("tensor `{}.{part}` is there, which the type of the layer does not have", o.name);
            return Err(o.fail(what, CONTRADICT));
        }
        if beside == Ascend::Static {
            let (elem, s) = o.need("deq_scale", |e| matches!(e, Elem::F32 | Elem::I32))?;
            o.shape("deq_scale", s, if elem == Elem::F32 { [rows, 1] } else { [rows, 2] })?;
            let (_, s) = o.need("quant_bias", |e| e == Elem::I32)?;
            o.shape("quant_bias", s, [rows, 1])?;
        } else {
            let (_, s) = o.need("weight_scale", |e| e == Elem::F32)?;
            o.shape("weight_scale", s, [rows, 1])?;
            let offsets = o.finite("weight_offset", [rows, 1])?;
            if offsets.as_chunks::<4>().0.iter().any(|b| f32::from_le_bytes(*b) != 0.0) {
                let what = format!("`{}.weight_offset` is not 0 everywhere", o.name);
                return Err(
                    o.fail(what, "weights are read without zero points; start from the float checkpoint")
                );
            }
        }
        let input = match (scheme.input, beside) {
            (Some(spec), Ascend::Transformed) => Some(o.transformed(spec, cols)?),
            (Some(_), Ascend::Static) => Some(o.by_one_scale()?),
            (spec, _) => spec.map(RoundedInput::by_itself),
        };
        let spec = QuantSpec::sym(bits, Grain::Row);
        Ok(Linear { name: o.name.to_owned(), rows, cols, spec, scheme, groups: 1, order: None, input })
    }

    /// The scales of rows as little-endian `f32`, from their products with that of the input: one whose product is the
    /// stored one, a 16-bit one before others, as most are.
    ///
    /// # Errors
    /// If one is no positive number, or `quant_bias` is not what the bias and the offset of the input make.
    pub(super) fn divided(&self, files: &SafetensorsFolder) -> Result<Vec<u8>, WeightError> {
        let bad = |part: &str, why: String| WeightError::new(format!("{}.{part}", self.name), why);
        let of = |at: usize| self.input.as_ref().and_then(|r| r.calibrated.get(at));
        let input = of(0).and_then(|t| t.bytes.first_chunk()).map_or(1.0, |b| f32::from_le_bytes(*b));
        let offset = of(1).and_then(|t| t.bytes.first()).map_or(0, |z| i64::from(*z) - 128);
        let raw = files.raw(&format!("{}.deq_scale", self.name))?;
        let words = raw.bytes.as_chunks::<4>().0;
        // Of 64 bits, the low half.
        let each = if raw.ty.elem == Elem::F32 { 1 } else { 2 };
        if each == 2
            && let Some(at) = words.iter().skip(1).step_by(2).position(|high| *high != [0; 4])
        {
            return Err(bad("deq_scale", format!("element {at} has bits beyond those of a float; {AGAIN}")));
        }
        let products: Vec<f32> = words.iter().step_by(each).map(|b| f32::from_le_bytes(*b)).collect();
        if let Some(row) = products.iter().position(|p| !p.is_normal() || *p < 0.0) {
            return Err(bad(
                "deq_scale",
                format!("element {row} is {}, which is no scale; {AGAIN}", products[row]),
            ));
        }
        self.biased(files, &products, offset)?;
        let scale = |p: &f32| {
            let near = p / input;
            let tried = [ScaleType::BF16.round(near), ScaleType::F16.round(near), near];
            let mut all = tried.into_iter().chain([near.next_up(), near.next_down()]);
            all.find(|s| s * input == *p).unwrap_or(near)
        };
        let scales: Vec<f32> = products.iter().map(scale).collect();
        match scales.iter().position(|s| !s.is_normal()) {
            None => Ok(scales.into_iter().flat_map(f32::to_le_bytes).collect()),
            Some(row) => Err(bad("deq_scale", format!("element {row} by {input:e} is no scale; {AGAIN}"))),
        }
    }

    /// Refuses a `quant_bias` of another bias than the stored one, to one step: as writers round it.
    fn biased(&self, files: &SafetensorsFolder, products: &[f32], offset: i64) -> Result<(), WeightError> {
        let name = format!("{}.quant_bias", self.name);
        let have = ints(files, &name)?;
        let bias = format!("{}.bias", self.name);
        let bias = if files.ty(&bias).is_some() { Some(files.read(&bias)?) } else { None };
        let bias = bias.as_ref().and_then(Tensor::as_f32);
        let codes = if offset == 0 { Vec::new() } else { self.codes(files)? };
        for (row, (q, p)) in have.iter().zip(products).enumerate() {
            let row_of = |codes: &[u8]| {
                codes[row * self.cols..][..self.cols].iter().map(|&c| i64::from(c) - 128).sum()
            };
            let sum: i64 = if codes.is_empty() { 0 } else { row_of(&codes) };
            let b = bias.and_then(|b| b.get(row)).copied().unwrap_or(0.0);
            let want = f64::from(b) / f64::from(*p) - (sum * offset) as f64;
            if (want - f64::from(*q)).abs() > 1.0 {
                let why =
                    format!("element {row} is {q}; the bias and the offset of the input make {want:.1}");
                return Err(WeightError::new(&name, format!("{why}; {CONTRADICT}")));
            }
        }
        Ok(())
    }
}
