//! The tensors of a quantized linear layer, checked against each other and against the configuration.

use std::path::Path;

use qrmc_ir::words::word_count;
use qrmc_ir::{Elem, Grain, QuantSpec, ScaleType, Tensor, TensorType, WeightSource};

use super::config::{Scheme, Storage};
use super::linear::{Linear, ints};
use crate::hf::SafetensorsFolder;
use crate::{ImportError, RoundedInput, SmallTensor};

pub(super) const AGAIN: &str = "the checkpoint is damaged: download it again";
pub(super) const CONTRADICT: &str = "configuration and tensors contradict: download both again";

/// The tensors of one layer while they are checked.
pub(super) struct Open<'a> {
    files: &'a SafetensorsFolder,
    folder: &'a Path,
    pub(super) name: &'a str,
    pub(super) scheme: Scheme,
}

impl<'a> Open<'a> {
    pub(super) fn new(files: &'a SafetensorsFolder, folder: &'a Path, name: &'a str, scheme: Scheme) -> Self {
        Open { files, folder, name, scheme }
    }

    pub(super) fn fail(&self, what: String, hint: &str) -> ImportError {
        ImportError::new(self.folder, what).hint(hint)
    }

    pub(super) fn has(&self, part: &str) -> bool {
        self.files.ty(&format!("{}.{part}", self.name)).is_some()
    }

    /// Type and sizes of a tensor that must be there; vectors of one column are read as `[n, 1]`.
    pub(super) fn need(
        &self,
        part: &str,
        fits: impl Fn(Elem) -> bool,
    ) -> Result<(Elem, [usize; 2]), ImportError> {
        let name = format!("{}.{part}", self.name);
        let Some(ty) = self.files.ty(&name) else {
            let hint = "its layer is quantized and needs it; is a shard missing?";
            return Err(self.fail(format!("tensor `{name}` is missing"), hint));
        };
        let shape = match ty.shape.as_fixed().as_deref() {
            Some(&[a, b]) => Some([a, b]),
            Some(&[a]) => Some([a, 1]),
            Some([]) => Some([1, 1]),
            _ => None,
        };
        match shape.filter(|s| fits(ty.elem) && !s.contains(&0)) {
            Some(shape) => Ok((ty.elem, shape)),
            None => Err(self.fail(
                format!("tensor `{name}` is {ty}, which is not how this layout stores it"),
                "the configuration and the tensors are of different layouts: download both again",
            )),
        }
    }

    /// Refuses a tensor of another shape than the others and the configuration ask for.
    pub(super) fn shape(&self, part: &str, have: [usize; 2], want: [usize; 2]) -> Result<(), ImportError> {
        if have == want {
            return Ok(());
        }
        let Scheme { bits, grain, .. } = self.scheme;
        let what = format!(
            "tensor `{}.{part}` is {have:?}; with {bits} bits and the grain {grain} it would be {want:?}",
            self.name
        );
        Err(self.fail(
            what,
            "bits or group size of the configuration are not those of the tensors, or one is damaged",
        ))
    }

    /// Scales of each row of `cols` columns.
    fn groups(&self, cols: usize) -> Result<usize, ImportError> {
        match self.scheme.grain {
            Grain::Group(g) if cols.is_multiple_of(g as usize) => Ok(cols / g as usize),
            Grain::Group(g) => Err(self.fail(
                format!("groups of {g} do not divide the {cols} columns of `{}`", self.name),
                "a shorter last group is not read; start from the float checkpoint",
            )),
            _ => Ok(1),
        }
    }

    /// The group of each column, unless they stand in order; `part` holds it.
    fn order(&self, part: &str, cols: usize, groups: usize) -> Result<Option<Vec<usize>>, ImportError> {
        if !self.has(part) {
            if self.scheme.reordered && groups > 1 {
                let what = format!("tensor `{}.{part}` is missing", self.name);
                return Err(self.fail(what, "columns are in the order of activations: it says their groups"));
            }
            return Ok(None);
        }
        let (_, shape) = self.need(part, |e| e == Elem::I32)?;
        self.shape(part, shape, [cols, 1])?;
        let name = format!("{}.{part}", self.name);
        let values = ints(self.files, &name).map_err(|e| self.fail(e.to_string(), AGAIN))?;
        // What older compressed-tensors wrote when it had not set any.
        if self.scheme.storage == Storage::Packed && values.iter().all(|&g| g == -1) {
            return Ok(None);
        }
        let out = |&(_, g): &(usize, &i32)| usize::try_from(*g).ok().filter(|g| *g < groups).is_none();
        if let Some((at, g)) = values.iter().enumerate().find(out) {
            let what = format!("tensor `{name}`: column {at} is in group {g}, but there are {groups} groups");
            return Err(
                self.fail(what, "the tensor is damaged, or the group size is wrong: download both again")
            );
        }
        let order: Vec<usize> = values.iter().map(|&g| g as usize).collect();
        let plain = order.iter().enumerate().all(|(i, &g)| g == i / (cols / groups));
        Ok((!plain).then_some(order))
    }

    /// Refuses zero points beside codes that are said to have none.
    fn no_zeros(&self, part: &str) -> Result<(), ImportError> {
        if self.has(part) && self.bytes(part)?.iter().any(|&b| b != 0) {
            let what = format!("`symmetric` is true, but `{}.{part}` is not 0 everywhere", self.name);
            return Err(self.fail(what, CONTRADICT));
        }
        Ok(())
    }

    pub(super) fn bytes(&self, part: &str) -> Result<Vec<u8>, ImportError> {
        let raw = self.files.raw(&format!("{}.{part}", self.name));
        raw.map(|r| r.bytes.into_owned()).map_err(|e| self.fail(e.to_string(), AGAIN))
    }

    /// How the input is rounded, with the calibrated numbers where the configuration says that they are stored.
    fn input(&self) -> Result<Option<RoundedInput>, ImportError> {
        let Some(mut spec) = self.scheme.input.filter(|s| s.grain == Grain::Tensor) else {
            if let Some(part) = ["input_scale", "input_zero_point"].into_iter().find(|p| self.has(p)) {
                let what = format!(
                    "tensor `{}.{part}` is there, but the configuration says of no stored scale of inputs",
                    self.name
                );
                return Err(self.fail(what, CONTRADICT));
            }
            return Ok(self.scheme.input.map(RoundedInput::by_itself));
        };
        let scale = self.input_scale(float)?;
        spec.scale = scale_type(scale.ty.elem);
        let mut calibrated = vec![scale];
        if spec.zero {
            let (_, shape) = self.need("input_zero_point", |e| e == Elem::I8)?;
            self.one("input_zero_point", shape)?;
            let raised = self.bytes("input_zero_point")?.iter().map(|b| b ^ 0x80).collect();
            calibrated.push(self.small("input_zero_point", Elem::U8, &[1], raised));
        } else {
            self.no_zeros("input_zero_point")?;
        }
        Ok(Some(RoundedInput { calibrated, ..RoundedInput::by_itself(spec) }))
    }

    /// The one scale of an input, in a type that fits.
    pub(super) fn input_scale(&self, fits: impl Fn(Elem) -> bool) -> Result<SmallTensor, ImportError> {
        let (elem, shape) = self.need("input_scale", fits)?;
        self.one("input_scale", shape)?;
        let bytes = self.bytes("input_scale")?;
        let value = Tensor::from_le_bytes(elem, &[1], &bytes).ok();
        let value = value.and_then(|t| t.as_f32().map(|v| v[0])).unwrap_or(f32::NAN);
        if !value.is_normal() || value < 0.0 {
            let what = format!("`{}.input_scale` is {value}, which is no scale", self.name);
            return Err(self.fail(what, AGAIN));
        }
        Ok(self.small("input_scale", elem, &[1], bytes))
    }

    pub(super) fn small(&self, part: &str, elem: Elem, shape: &[usize], bytes: Vec<u8>) -> SmallTensor {
        SmallTensor { name: format!("{}.{part}", self.name), ty: TensorType::new(elem, shape), bytes }
    }

    fn one(&self, part: &str, have: [usize; 2]) -> Result<(), ImportError> {
        if have == [1, 1] {
            return Ok(());
        }
        let what = format!("tensor `{}.{part}` is {have:?}; an input has one scale for all of it", self.name);
        Err(self.fail(what, CONTRADICT))
    }

    /// Rows and columns of packed codes, which `weight_shape` says.
    fn packed(&self) -> Result<[usize; 2], ImportError> {
        let bits = self.scheme.bits;
        let (_, have) = self.need("weight_packed", |e| e == Elem::I32)?;
        let Some((_, said)) = self.files.shapes().find(|(name, _)| *name == self.name) else {
            let what = format!("tensor `{}.weight_shape` is missing", self.name);
            return Err(
                self.fail(what, "it says how many columns the packed codes have; is a shard missing?")
            );
        };
        let size = |n: i64| usize::try_from(n).ok().filter(|n| (1..=1 << 28).contains(n));
        let [Some(rows), Some(cols)] = said.map(size) else {
            let what = format!("`{}.weight_shape` is {said:?}", self.name);
            return Err(
                self.fail(what, "sizes are from 1 to 2^28; the checkpoint is damaged: download it again")
            );
        };
        // Before codes crossed words, a word held as many as fit into it.
        let apart = cols.div_ceil(32 / usize::from(bits));
        if 32 % bits != 0
            && have == [rows, apart]
            && (apart != word_count(cols, bits) || !cols.is_multiple_of(32))
        {
            let what =
                format!("`{}.weight_packed` is {have:?}: words of whole codes of {bits} bits", self.name);
            return Err(self
                .fail(what, "older releases wrote these; save it again with a current compressed-tensors"));
        }
        self.shape("weight_packed", have, [rows, word_count(cols, bits)])?;
        Ok([rows, cols])
    }
}

fn scale_type(elem: Elem) -> ScaleType {
    match elem {
        Elem::F16 => ScaleType::F16,
        Elem::BF16 => ScaleType::BF16,
        _ => ScaleType::F32,
    }
}

fn float(e: Elem) -> bool {
    matches!(e, Elem::F32 | Elem::F16 | Elem::BF16)
}

impl Linear {
    /// Checks the tensors of a layer against each other and against what the configuration says. Reads only the groups
    /// of columns and, where they decide whether the codes are signed, the zero points.
    ///
    /// # Errors
    /// If one is missing, has another type or shape than the others ask for, or a group is out of range.
    pub(super) fn open(
        files: &SafetensorsFolder,
        folder: &Path,
        name: &str,
        scheme: &Scheme,
    ) -> Result<Self, ImportError> {
        let open = Open::new(files, folder, name, *scheme);
        match scheme.storage {
            Storage::Awq | Storage::Gptq { .. } => Linear::words(&open),
            Storage::Packed | Storage::Bytes => Linear::compressed(&open),
            Storage::Ascend(beside) => Linear::ascend(&open, beside),
        }
    }

    fn words(o: &Open<'_>) -> Result<Self, ImportError> {
        let (scheme, bits) = (o.scheme, o.scheme.bits);
        let word = |e| e == Elem::I32;
        let (_, q) = o.need("qweight", word)?;
        let (_, z) = o.need("qzeros", word)?;
        let (elem, [groups, rows]) = o.need("scales", float)?;
        let cols = match scheme.storage {
            Storage::Awq => q[0],
            _ if o.has("g_idx") => o.need("g_idx", word)?.1[0],
            _ => q[0].saturating_mul(32) / usize::from(bits),
        };
        let want = match scheme.storage {
            Storage::Awq => [cols, word_count(rows, bits)],
            _ => [word_count(cols, bits), rows],
        };
        o.shape("qweight", q, want)?;
        o.shape("scales", [groups, rows], [o.groups(cols)?, rows])?;
        o.shape("qzeros", z, [groups, word_count(rows, bits)])?;
        if scheme.storage == Storage::Awq && !rows.is_multiple_of(8) {
            let what = format!("`{}` has {rows} rows, no whole words of 8", o.name);
            return Err(o.fail(what, "the tensors are damaged: download them again"));
        }
        let order = match scheme.storage {
            Storage::Awq => None,
            _ => o.order("g_idx", cols, groups)?,
        };
        let spec = QuantSpec { scale: scale_type(elem), ..QuantSpec::asym(bits, scheme.grain) };
        let name = o.name.to_owned();
        let mut linear = Linear { name, rows, cols, spec, scheme, groups, order, input: None };
        if matches!(scheme.storage, Storage::Gptq { .. }) {
            let zeros = linear.zeros(o.files).map_err(|e| o.fail(e.to_string(), AGAIN))?;
            let middle = 1u8 << (bits - 1);
            match zeros.iter().position(|&z| z != middle) {
                // `scale * (code - 2^(b-1))` is what the code less 2^(b-1) means without a zero point.
                None => linear.spec = QuantSpec { signed: true, zero: false, ..spec },
                Some(at) if scheme.symmetric == Some(true) => {
                    let what = format!(
                        "`sym` is true, but zero point {at} of `{}.qzeros` is {}, not {middle}",
                        o.name, zeros[at]
                    );
                    let hint = "is `checkpoint_format` right? `gptq` stores zero points less one, `gptq_v2` as they are";
                    return Err(o.fail(what, hint));
                }
                Some(_) => {}
            }
        }
        Ok(linear)
    }

    fn compressed(o: &Open<'_>) -> Result<Self, ImportError> {
        let (scheme, bits) = (o.scheme, o.scheme.bits);
        let [rows, cols] = match scheme.storage {
            Storage::Packed => o.packed()?,
            _ => o.need("weight", |e| e == Elem::I8)?.1,
        };
        let groups = o.groups(cols)?;
        let (elem, s) = o.need("weight_scale", float)?;
        let scales = if scheme.grain == Grain::Tensor { [1, 1] } else { [rows, groups] };
        o.shape("weight_scale", s, scales)?;
        let signed = scheme.symmetric == Some(true);
        if !signed {
            let (_, z) = match scheme.storage {
                Storage::Packed => o.need("weight_zero_point", |e| e == Elem::I32)?,
                _ => o.need("weight_zero_point", |e| e == Elem::I8)?,
            };
            let want = match scheme.storage {
                Storage::Packed => [word_count(scales[0], bits), scales[1]],
                _ => scales,
            };
            o.shape("weight_zero_point", z, want)?;
        } else {
            o.no_zeros("weight_zero_point")?;
        }
        let order = o.order("weight_g_idx", cols, groups)?;
        let spec = QuantSpec { bits, signed, grain: scheme.grain, scale: scale_type(elem), zero: !signed };
        let input = o.input()?;
        Ok(Linear { name: o.name.to_owned(), rows, cols, spec, scheme, groups, order, input })
    }
}
