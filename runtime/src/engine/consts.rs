//! Constants of a program, read and checked before its first run.

use std::collections::HashMap;

use bytes::Bytes;
use qrmc_ir::{
    Data, Elem, EngineError, Grain, QuantSpec, RawWeight, Tensor, TensorType, WeightError, WeightSource,
};
use qrmc_lowering::{Const, Layout, Program};

use crate::cpu::tiles::{Form, Tiles};
use crate::cpu::{Pool, WeightView};
use crate::layout::{Layouts, Tiled};

/// Bytes that one task looks through for NaN and infinity; whole elements.
const LOOK: usize = 1 << 20;

/// A constant in memory.
pub(super) enum Constant {
    /// Computed, or a stored `f32` or integer tensor.
    Tensor(Tensor),
    /// Stored 16-bit floats, little-endian, where the source has them if it can share its memory.
    Half { elem: Elem, shape: Vec<usize>, bytes: Bytes },
    /// Packed codes with their scales and zero points, as products read them.
    Tiles(Tiles),
    /// Packed codes with their scales and zero points, row after row.
    Packed { spec: QuantSpec, shape: Vec<usize>, codes: Bytes, scales: Vec<f32>, zeros: Option<Vec<u8>> },
}

impl Constant {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Constant::Tensor(t) => t.len() * t.elem().bits() / 8,
            Constant::Half { bytes, .. } => bytes.len(),
            Constant::Tiles(t) => t.bytes(),
            Constant::Packed { codes, scales, zeros, .. } => {
                codes.len() + 4 * scales.len() + zeros.as_ref().map_or(0, Vec::len)
            }
        }
    }

    /// As the rows of a matrix; `None` if it holds no floats, or they do not lie row after row.
    pub(super) fn view(&self) -> Option<WeightView<'_>> {
        Some(match self {
            Constant::Tensor(t) => WeightView::F32(t.as_f32()?),
            Constant::Half { elem: Elem::F16, bytes, .. } => WeightView::F16(bytes),
            Constant::Half { bytes, .. } => WeightView::BF16(bytes),
            Constant::Tiles(_) => return None,
            Constant::Packed { spec, shape, codes, scales, zeros } => {
                packed(*spec, shape.last().copied().unwrap_or(1), codes, scales, zeros.as_deref())
            }
        })
    }

    /// As a host tensor, widened or de-quantized.
    pub(super) fn tensor(&self) -> Tensor {
        match self {
            Constant::Tensor(t) => t.clone(),
            Constant::Half { elem, shape, bytes } => Tensor::from_le_bytes(*elem, shape, bytes)
                .unwrap_or_else(|_| unreachable!("the length was checked when it was read")),
            Constant::Tiles(t) => {
                let (n, k) = t.shape();
                let mut out = vec![0.0; n * k];
                out.chunks_exact_mut(k).enumerate().for_each(|(r, row)| t.dequantize_row(r, row));
                Tensor::f32([n, k], out)
            }
            Constant::Packed { shape, .. } => {
                let cols = shape.last().copied().unwrap_or(1).max(1);
                let mut out = vec![0.0; shape.iter().product()];
                if let Some(view) = self.view() {
                    for (r, row) in out.chunks_mut(cols).enumerate() {
                        crate::cpu::dequantize_row(crate::cpu::Isa::PORTABLE, &view, r, row);
                    }
                }
                Tensor::f32(shape.clone(), out)
            }
        }
    }
}

/// Where the constants of the functions of a model come from. What several functions read is in memory once.
pub struct Source<'a> {
    weights: &'a dyn WeightSource,
    layouts: Option<&'a mut Layouts>,
    /// Bytes of weights, by name.
    bytes: HashMap<String, Bytes>,
    tiles: HashMap<Tiled, Tiles>,
}

impl<'a> Source<'a> {
    /// Weights, and the layout file that holds the packed ones in order or is to hold them.
    pub fn new(weights: &'a dyn WeightSource, layouts: Option<&'a mut Layouts>) -> Self {
        Source { weights, layouts, bytes: HashMap::new(), tiles: HashMap::new() }
    }

    /// The stored bytes of a weight, in the memory of the source if it can be shared.
    fn bytes(&mut self, raw: RawWeight<'_>, name: &str) -> Result<Bytes, EngineError> {
        if let Some(b) = self.bytes.get(name) {
            return Ok(b.clone());
        }
        let bytes = match self.weights.shared(name)? {
            Some(shared) => shared,
            None => raw.bytes.into_owned().into(),
        };
        self.bytes.insert(name.to_owned(), bytes.clone());
        Ok(bytes)
    }

    /// A weight in tiles: from the layout file, or brought into order now.
    fn tiles(&mut self, pool: &Pool, tiled: &Tiled) -> Result<Tiles, EngineError> {
        if let Some(tiles) = self.tiles.get(tiled) {
            return Ok(tiles.clone());
        }
        let found = self.layouts.as_ref().and_then(|l| l.get(tiled));
        let tiles = match found {
            Some(tiles) => tiles,
            None => {
                let Form { n, k, .. } = tiled.form;
                let raw = self.weights.raw(&tiled.codes)?;
                let (spec, shape) = codes(&tiled.codes, &raw.ty)?;
                if form(spec, &shape, tiled.zero.is_some()) != Some(tiled.form) {
                    let what = format!("is {}, which is not what the graph declares", raw.ty);
                    return Err(WeightError::new(&tiled.codes, what).into());
                }
                let (scales, zeros) = self.scales(spec, n, &tiled.scale, tiled.zero.as_deref())?;
                let view = packed(spec, k, &raw.bytes, &scales, zeros.as_deref());
                let tiles = Tiles::new(pool, &view, n, k)
                    .unwrap_or_else(|| unreachable!("packed codes have an order"));
                match &mut self.layouts {
                    Some(l) => l.put(pool, tiled, tiles),
                    None => tiles,
                }
            }
        };
        self.tiles.insert(tiled.clone(), tiles.clone());
        Ok(tiles)
    }

    /// Scales and zero points of each row or group.
    fn scales(
        &self,
        spec: QuantSpec,
        rows: usize,
        scale: &str,
        zero: Option<&str>,
    ) -> Result<(Vec<f32>, Option<Vec<u8>>), EngineError> {
        let scales = floats(scale, self.weights)?;
        let zeros = match zero {
            None => None,
            Some(z) => match self.weights.read(z)?.into_data() {
                Data::U8(v) => Some(v),
                _ => return Err(WeightError::new(z, "holds no zero points (u8)").into()),
            },
        };
        // One scale for a tensor is one for each row to the kernels.
        Ok(match spec.grain {
            Grain::Tensor => (vec![scales[0]; rows], zeros.map(|z| vec![z[0]; rows])),
            _ => (scales, zeros),
        })
    }

    fn stored(&mut self, pool: &Pool, name: &str) -> Result<Constant, EngineError> {
        let raw = self.weights.raw(name)?;
        let (elem, Some(shape)) = (raw.ty.elem, raw.ty.shape.as_fixed()) else {
            return Err(WeightError::new(name, "its shape is not fixed").into());
        };
        if let Elem::F16 | Elem::BF16 = elem {
            if !self.bytes.contains_key(name) {
                finite(name, find_non_finite(pool, elem, &raw.bytes))?;
            }
            return Ok(Constant::Half { elem, shape, bytes: self.bytes(raw, name)? });
        }
        drop(raw);
        let t = self.weights.read(name)?;
        if let Some(v) = t.as_f32() {
            finite(name, v.iter().position(|x| !x.is_finite()))?;
        }
        Ok(Constant::Tensor(t))
    }
}

/// Rows of packed codes as kernels read them.
fn packed<'a>(
    spec: QuantSpec,
    k: usize,
    codes: &'a [u8],
    scales: &'a [f32],
    zeros: Option<&'a [u8]>,
) -> WeightView<'a> {
    WeightView::Packed { bits: spec.bits, signed: spec.signed, codes, group: group(spec, k), scales, zeros }
}

/// Scheme and shape of a weight of codes.
fn codes(name: &str, ty: &TensorType) -> Result<(QuantSpec, Vec<usize>), WeightError> {
    match (ty.elem, ty.shape.as_fixed()) {
        (Elem::Quant(spec), Some(shape)) => Ok((spec, shape)),
        _ => Err(WeightError::new(name, format!("holds {ty}, not codes"))),
    }
}

/// Neighbours along a row of `k` that share a scale.
fn group(spec: QuantSpec, k: usize) -> usize {
    if let Grain::Group(g) = spec.grain { g as usize } else { k }
}

/// The form of the tiles of codes, if they are a matrix.
fn form(spec: QuantSpec, shape: &[usize], zeros: bool) -> Option<Form> {
    let [n, k] = *shape else { return None };
    if n == 0 || k == 0 {
        return None;
    }
    let none = if spec.signed { 1 << (spec.bits - 1) } else { 0 };
    Some(Form { n, k, bits: spec.bits, group: group(spec, k), zero: (!zeros).then_some(none) })
}

/// The tiles that a constant of a program is, if it is kept in tiles. `weights` are names and types of the weights of its
/// function.
pub(super) fn tiled(constant: &Const, weights: &[(&str, &TensorType)]) -> Option<Tiled> {
    let Const::Packed { layout: Layout::Tiles, codes, scale, zero } = *constant else { return None };
    let (name, ty) = weights[codes as usize];
    let (spec, shape) = self::codes(name, ty).ok()?;
    let form = form(spec, &shape, zero.is_some())?;
    let of = |i: u32| weights[i as usize].0.to_owned();
    Some(Tiled { codes: name.to_owned(), scale: of(scale), zero: zero.map(of), form })
}

/// Reads the constants of a program. `derived` gives the results of the initialiser, each at most once.
pub(super) fn load(
    pool: &Pool,
    program: &Program,
    weights: &[(&str, &TensorType)],
    source: &mut Source<'_>,
    derived: &mut [Option<Tensor>],
) -> Result<Vec<Constant>, EngineError> {
    let mut constant = |c: &Const| match *c {
        Const::Weight(w) => source.stored(pool, weights[w as usize].0),
        Const::Derived(n) => match derived.get_mut(n as usize).and_then(Option::take) {
            Some(t) => Ok(Constant::Tensor(t)),
            None => Err(EngineError::System(format!("constant {n} of {} is lost", program.name))),
        },
        Const::Packed { codes: of, scale, zero, .. } => {
            if let Some(tiled) = tiled(c, weights) {
                return Ok(Constant::Tiles(source.tiles(pool, &tiled)?));
            }
            let name = weights[of as usize].0;
            let raw = source.weights.raw(name)?;
            let (spec, shape) = codes(name, &raw.ty)?;
            let rows = shape.first().copied().unwrap_or(1);
            let zero = zero.map(|z| weights[z as usize].0);
            let (scales, zeros) = source.scales(spec, rows, weights[scale as usize].0, zero)?;
            Ok(Constant::Packed { spec, shape, codes: source.bytes(raw, name)?, scales, zeros })
        }
    };
    program.consts.iter().map(|(c, _)| constant(c)).collect()
}

fn find_non_finite(pool: &Pool, elem: Elem, bytes: &[u8]) -> Option<usize> {
    let parts = pool.map(bytes.len().div_ceil(LOOK), |i| {
        let from = i * LOOK;
        elem.find_non_finite(&bytes[from..bytes.len().min(from + LOOK)]).map(|at| from * 8 / elem.bits() + at)
    });
    parts.into_iter().flatten().next()
}

fn floats(name: &str, weights: &dyn WeightSource) -> Result<Vec<f32>, EngineError> {
    match weights.read(name)?.into_data() {
        Data::F32(v) => {
            finite(name, v.iter().position(|x| !x.is_finite()))?;
            Ok(v)
        }
        _ => Err(WeightError::new(name, "holds no floats").into()),
    }
}

fn finite(name: &str, bad: Option<usize>) -> Result<(), WeightError> {
    match bad {
        None => Ok(()),
        Some(at) => Err(WeightError::new(
            name,
            format!("element {at} is NaN or infinite; the checkpoint is damaged or was trained to overflow"),
        )),
    }
}
