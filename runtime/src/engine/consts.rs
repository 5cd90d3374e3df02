//! Constants of a program, read and checked before its first run.

use qrmc_ir::{Data, Elem, EngineError, Grain, QuantSpec, Tensor, WeightError, WeightSource};
use qrmc_lowering::{Const, Layout, Program};

use crate::cpu::WeightView;
use crate::cpu::tiles::Tiles;

/// A constant in memory.
pub(super) enum Constant {
    /// Computed, or a stored `f32` or integer tensor.
    Tensor(Tensor),
    /// Stored 16-bit floats, little-endian.
    Half { elem: Elem, shape: Vec<usize>, bytes: Vec<u8> },
    /// Packed codes with their scales and zero points, as products read them.
    Tiles(Tiles),
    /// Packed codes with their scales and zero points, row after row.
    Packed { spec: QuantSpec, shape: Vec<usize>, codes: Vec<u8>, scales: Vec<f32>, zeros: Option<Vec<u8>> },
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
            Constant::Packed { spec, shape, codes, scales, zeros } => WeightView::Packed {
                bits: spec.bits,
                signed: spec.signed,
                codes,
                group: match spec.grain {
                    Grain::Group(g) => g as usize,
                    _ => shape.last().copied().unwrap_or(1),
                },
                scales,
                zeros: zeros.as_deref(),
            },
        })
    }

    /// Packed codes in tiles.
    fn tiles(&self) -> Option<Tiles> {
        let Constant::Packed { shape, .. } = self else { return None };
        match shape[..] {
            [n, k] if n > 0 && k > 0 => Tiles::new(&self.view()?, n, k),
            _ => None,
        }
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

/// Reads the constants of a program. `derived` gives the results of the initialiser, each at most once.
pub(super) fn load(
    program: &Program,
    names: &[&str],
    weights: &dyn WeightSource,
    derived: &mut [Option<Tensor>],
) -> Result<Vec<Constant>, EngineError> {
    program
        .consts
        .iter()
        .map(|(c, ty)| match *c {
            Const::Weight(w) => stored(names[w as usize], weights),
            Const::Derived(n) => {
                Ok(Constant::Tensor(match derived.get_mut(n as usize).and_then(Option::take) {
                    Some(t) => t,
                    None => {
                        return Err(EngineError::System(format!("constant {n} of {} is lost", program.name)));
                    }
                }))
            }
            Const::Packed { layout, codes, scale, zero } => {
                let name = names[codes as usize];
                let raw = weights.raw(name)?;
                let (Elem::Quant(spec), Some(shape)) = (raw.ty.elem, ty.shape.as_fixed()) else {
                    return Err(WeightError::new(name, format!("holds {}, not codes", raw.ty)).into());
                };
                let scales = floats(names[scale as usize], weights)?;
                let zeros = match zero.map(|z| names[z as usize]) {
                    None => None,
                    Some(z) => match weights.read(z)?.into_data() {
                        Data::U8(v) => Some(v),
                        _ => return Err(WeightError::new(z, "holds no zero points (u8)").into()),
                    },
                };
                let codes = raw.bytes.into_owned();
                // One scale for a tensor is one for each row to the kernels.
                let rows = shape.first().copied().unwrap_or(1);
                let (scales, zeros) = match spec.grain {
                    Grain::Tensor => (vec![scales[0]; rows], zeros.map(|z| vec![z[0]; rows])),
                    _ => (scales, zeros),
                };
                let packed = Constant::Packed { spec, shape, codes, scales, zeros };
                Ok(match (layout, packed.tiles()) {
                    (Layout::Tiles, Some(tiles)) => Constant::Tiles(tiles),
                    _ => packed,
                })
            }
        })
        .collect()
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

fn stored(name: &str, weights: &dyn WeightSource) -> Result<Constant, EngineError> {
    let raw = weights.raw(name)?;
    let (elem, Some(shape)) = (raw.ty.elem, raw.ty.shape.as_fixed()) else {
        return Err(WeightError::new(name, "its shape is not fixed").into());
    };
    if let Elem::F16 | Elem::BF16 = elem {
        finite(name, elem.find_non_finite(&raw.bytes))?;
        return Ok(Constant::Half { elem, shape, bytes: raw.bytes.into_owned() });
    }
    drop(raw);
    let t = weights.read(name)?;
    if let Some(v) = t.as_f32() {
        finite(name, v.iter().position(|x| !x.is_finite()))?;
    }
    Ok(Constant::Tensor(t))
}
