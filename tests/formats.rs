//! Exported folders read back from the descriptions of their formats, a bit at a time: nothing of the code under test.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use qrmc_ir::{Data, Elem, Grain, Tensor, WeightSource};
use qrmc_lowering::artefact::Artefact;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Codes, scales and zero points of a matrix, as `value = scale * (code - zero)` with codes from 0.
#[derive(PartialEq, Debug)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) codes: Vec<u32>,
    pub(crate) scales: Vec<f32>,
    pub(crate) zeros: Vec<u32>,
}

/// The matrices of an artefact, by module name.
pub(crate) fn stored(out: &Path) -> HashMap<String, Matrix> {
    let a = Artefact::map(out).unwrap();
    let mut all = HashMap::new();
    for w in a.module.weights() {
        let (Elem::Quant(spec), Some(base)) = (w.ty.elem, w.name.strip_suffix(".codes")) else { continue };
        let codes = a.read(&w.name).unwrap();
        let scales = a.read(&format!("{base}.scale")).unwrap();
        let zeros = spec.zero.then(|| a.read(&format!("{base}.zero")).unwrap());
        let (rows, cols) = (codes.shape()[0], codes.shape()[1]);
        let each = if spec.grain == Grain::Tensor { rows } else { 1 };
        let spread = |v: Vec<f32>| v.iter().flat_map(|&x| vec![x; each]).collect::<Vec<_>>();
        let scales = spread(scales.as_f32().unwrap().to_vec());
        let zeros = match zeros {
            Some(z) => integers(&z, 0),
            None => vec![(-spec.qmin()) as u32; scales.len()],
        };
        let name = base.strip_suffix(".weight").unwrap_or(base).to_owned();
        all.insert(name, Matrix { rows, cols, codes: integers(&codes, spec.qmin()), scales, zeros });
    }
    all
}

pub(crate) fn integers(t: &Tensor, least: i32) -> Vec<u32> {
    match t.data() {
        Data::U8(v) => v.iter().map(|&x| (i32::from(x) - least) as u32).collect(),
        Data::I8(v) => v.iter().map(|&x| (i32::from(x) - least) as u32).collect(),
        _ => panic!("no codes"),
    }
}

/// An exported folder of one file.
pub(crate) struct Exported {
    pub(crate) bytes: Vec<u8>,
    pub(crate) config: Value,
}

impl Exported {
    pub(crate) fn open(dir: &Path) -> Self {
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        Exported { bytes: std::fs::read(dir.join("model.safetensors")).unwrap(), config }
    }

    pub(crate) fn words(&self, name: &str) -> (Vec<u32>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::I32, "{name}");
        let words = view.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        (words.collect(), view.shape().to_vec())
    }

    pub(crate) fn floats(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let two = |b: &[u8]| [b[0], b[1]];
        let values = match view.dtype() {
            Dtype::F32 => view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::F16 => view.data().chunks(2).map(|b| f16::from_le_bytes(two(b)).to_f32()).collect(),
            Dtype::BF16 => view.data().chunks(2).map(|b| bf16::from_le_bytes(two(b)).to_f32()).collect(),
            other => panic!("{name} is {other:?}"),
        };
        (values, view.shape().to_vec())
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }
}

/// Bits `at * bits ..` of a line of words, least significant first.
pub(crate) fn field(line: &dyn Fn(usize) -> u32, at: usize, bits: usize) -> u32 {
    (0..bits).fold(0, |code, b| {
        let bit = at * bits + b;
        code | (line(bit / 32) >> (bit % 32) & 1) << b
    })
}

/// methods.md §10.2: `[in, out / 8]`, nibble `i` of word `c` is output `8 c + order[i]`.
pub(crate) fn awq(x: &Exported, name: &str, rows: usize, cols: usize) -> Matrix {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let code = |words: &[u32], line: usize, out: usize| {
        let nibble = ORDER.iter().position(|&o| o == out % 8).unwrap();
        words[line * (rows / 8) + out / 8] >> (4 * nibble) & 15
    };
    let (qweight, shape) = x.words(&format!("{name}.qweight"));
    assert_eq!(shape, [cols, rows / 8]);
    let (qzeros, zshape) = x.words(&format!("{name}.qzeros"));
    let (scales, sshape) = x.floats(&format!("{name}.scales"));
    let groups = zshape[0];
    assert_eq!((zshape[1], sshape), (rows / 8, vec![groups, rows]));
    Matrix {
        rows,
        cols,
        codes: (0..rows * cols).map(|i| code(&qweight, i % cols, i / cols)).collect(),
        scales: (0..rows * groups).map(|i| scales[i % groups * rows + i / groups]).collect(),
        zeros: (0..rows * groups).map(|i| code(&qzeros, i % groups, i / groups)).collect(),
    }
}

/// methods.md §10.3: words along the inputs; zero points along the outputs, in the first form less one a whole word.
pub(crate) fn gptq(x: &Exported, name: &str, rows: usize, cols: usize) -> Matrix {
    let bits = x.config["quantization_config"]["bits"].as_u64().unwrap() as usize;
    let (qweight, shape) = x.words(&format!("{name}.qweight"));
    assert_eq!(shape, [cols * bits / 32, rows]);
    let (mut qzeros, zshape) = x.words(&format!("{name}.qzeros"));
    let groups = zshape[0];
    assert_eq!(zshape[1], rows * bits / 32);
    let first = x.config["quantization_config"]["checkpoint_format"] == "gptq";
    if first && 32usize.is_multiple_of(bits) {
        // A field of ones at every position, added to the word as a whole.
        let ones = (0..32).step_by(bits).fold(0u32, |w, b| w | 1 << b);
        qzeros.iter_mut().for_each(|w| *w = w.wrapping_add(ones));
    }
    // Fields that cross words are lessened each on its own.
    let one = u32::from(first && !32usize.is_multiple_of(bits));
    let (scales, _) = x.floats(&format!("{name}.scales"));
    let (g_idx, _) = x.words(&format!("{name}.g_idx"));
    let group = cols / groups;
    assert!(g_idx.iter().enumerate().all(|(i, &g)| g as usize == i / group));
    let zero = |g: usize, out: usize| (field(&|w| qzeros[g * zshape[1] + w], out, bits) + one) % (1 << bits);
    Matrix {
        rows,
        cols,
        codes: (0..rows * cols).map(|i| field(&|w| qweight[w * rows + i / cols], i % cols, bits)).collect(),
        scales: (0..rows * groups).map(|i| scales[i % groups * rows + i / groups]).collect(),
        zeros: (0..rows * groups).map(|i| zero(i % groups, i / groups)).collect(),
    }
}

/// methods.md §10.4.
pub(crate) fn compressed(x: &Exported, name: &str, rows: usize, cols: usize) -> Matrix {
    let weights = &x.config["quantization_config"]["config_groups"]["group_0"]["weights"];
    let bits = weights["num_bits"].as_u64().unwrap() as usize;
    let middle = 1u32 << (bits - 1);
    let (scales, sshape) = x.floats(&format!("{name}.weight_scale"));
    let groups = sshape[1];
    let symmetric = weights["symmetric"] == true;
    if x.config["quantization_config"]["format"] == "int-quantized" {
        let signed = |b: Vec<u8>| b.iter().map(|&b| (i32::from(b as i8) + middle as i32) as u32).collect();
        let zeros = match symmetric {
            true => vec![middle; scales.len()],
            false => signed(x.bytes(&format!("{name}.weight_zero_point"))),
        };
        return Matrix { rows, cols, codes: signed(x.bytes(&format!("{name}.weight"))), scales, zeros };
    }
    let shape: Vec<u8> = [rows as u64, cols as u64].iter().flat_map(|n| n.to_le_bytes()).collect();
    assert_eq!(x.bytes(&format!("{name}.weight_shape")), shape);
    let (packed, pshape) = x.words(&format!("{name}.weight_packed"));
    assert_eq!(pshape, [rows, (cols * bits).div_ceil(32)]);
    let code = |row: usize, at: usize| field(&|w| packed[row * pshape[1] + w], at, bits);
    let zeros = match symmetric {
        true => vec![middle; scales.len()],
        false => {
            let (z, zshape) = x.words(&format!("{name}.weight_zero_point"));
            assert_eq!(zshape, [(rows * bits).div_ceil(32), groups]);
            (0..rows * groups).map(|i| field(&|w| z[w * groups + i % groups], i / groups, bits)).collect()
        }
    };
    let codes = (0..rows * cols).map(|i| code(i / cols, i % cols)).collect();
    Matrix { rows, cols, codes, scales, zeros }
}

pub(crate) type Decode = fn(&Exported, &str, usize, usize) -> Matrix;

pub(crate) fn decoder(format: &str) -> Decode {
    match format {
        "awq" => awq,
        "compressed-tensors" => compressed,
        _ => gptq,
    }
}
