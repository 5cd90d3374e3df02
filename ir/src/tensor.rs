//! Host tensors: dense, row-major, owned.

use crate::types::{Elem, Shape, TensorType};

/// The elements of a [`Tensor`]. Codes of quantized types are `U8` (unsigned) or `I8` (signed),
/// one code an element: packing is a matter of storage, not of meaning.
#[derive(Clone, PartialEq, Debug)]
pub enum Data {
    /// Floats; `f16` and `bf16` are widened when read.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// Token ids, positions.
    I32(Vec<i32>),
    /// Signed codes and bytes.
    I8(Vec<i8>),
    /// Unsigned codes and bytes.
    U8(Vec<u8>),
}

impl Data {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::F64(v) => v.len(),
            Data::I32(v) => v.len(),
            Data::I8(v) => v.len(),
            Data::U8(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn elem(&self) -> Elem {
        match self {
            Data::F32(_) => Elem::F32,
            Data::F64(_) => Elem::F64,
            Data::I32(_) => Elem::I32,
            Data::I8(_) => Elem::I8,
            Data::U8(_) => Elem::U8,
        }
    }
}

/// A dense row-major tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

impl Tensor {
    /// A tensor from its parts.
    ///
    /// # Panics
    /// If the number of elements differs from the product of `shape`: a bug of the caller.
    pub fn new(shape: impl Into<Vec<usize>>, data: Data) -> Self {
        let shape = shape.into();
        let n = data.len();
        assert_eq!(shape.iter().product::<usize>(), n, "shape {shape:?} does not hold {n} elements");
        Tensor { shape, data }
    }

    /// An `f32` tensor.
    pub fn f32(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        Tensor::new(shape, Data::F32(data))
    }

    /// An `i32` tensor.
    pub fn i32(shape: impl Into<Vec<usize>>, data: Vec<i32>) -> Self {
        Tensor::new(shape, Data::I32(data))
    }

    /// An `f32` tensor of zeros.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let n = shape.iter().product();
        Tensor::f32(shape, vec![0.0; n])
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The elements, given up.
    pub fn into_data(self) -> Data {
        self.data
    }

    /// The elements, if they are `f32`.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Data::F32(v) => Some(v),
            _ => None,
        }
    }

    /// The elements, if they are `i32`.
    pub fn as_i32(&self) -> Option<&[i32]> {
        match &self.data {
            Data::I32(v) => Some(v),
            _ => None,
        }
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// If the number of elements differs: a bug of the caller.
    pub fn reshaped(self, shape: impl Into<Vec<usize>>) -> Self {
        Tensor::new(shape, self.data)
    }

    /// The element type that this host representation stands for.
    pub fn elem(&self) -> Elem {
        self.data.elem()
    }

    /// Element type and shape.
    pub fn ty(&self) -> TensorType {
        TensorType::new(self.elem(), Shape::fixed(&self.shape))
    }

    /// Whether this tensor is an acceptable value of type `elem`: floats are widened, codes are bytes.
    pub fn represents(&self, elem: Elem) -> bool {
        match (elem, &self.data) {
            (Elem::F16 | Elem::BF16 | Elem::F32, Data::F32(_))
            | (Elem::F64, Data::F64(_))
            | (Elem::I32, Data::I32(_))
            | (Elem::I8, Data::I8(_))
            | (Elem::U8, Data::U8(_)) => true,
            (Elem::Quant(q), Data::I8(_)) => q.signed,
            (Elem::Quant(q), Data::U8(_)) => !q.signed,
            _ => false,
        }
    }

    /// Reads little-endian bytes of a plain (not quantized) element type.
    ///
    /// # Errors
    /// A sentence, if the byte count does not fit or the type has no plain storage.
    pub fn from_le_bytes(elem: Elem, shape: &[usize], bytes: &[u8]) -> Result<Self, String> {
        let n: usize = shape.iter().product();
        let size = elem.bits() / 8;
        if matches!(elem, Elem::Quant(_)) || bytes.len() != n * size {
            return Err(format!("{} bytes do not hold {n} elements of {elem}", bytes.len()));
        }
        let data = match elem {
            Elem::F32 => Data::F32(le(bytes, f32::from_le_bytes)),
            Elem::F64 => Data::F64(le(bytes, f64::from_le_bytes)),
            Elem::I32 => Data::I32(le(bytes, i32::from_le_bytes)),
            Elem::F16 => Data::F32(le(bytes, |b| half::f16::from_le_bytes(b).to_f32())),
            Elem::BF16 => Data::F32(le(bytes, |b| half::bf16::from_le_bytes(b).to_f32())),
            Elem::I8 => Data::I8(bytes.iter().map(|&b| b as i8).collect()),
            Elem::U8 => Data::U8(bytes.to_vec()),
            Elem::Quant(_) => return Err("quantized codes have no plain storage".into()),
        };
        Ok(Tensor::new(shape, data))
    }

    /// Little-endian bytes in the given plain element type; floats are rounded to nearest even.
    ///
    /// # Errors
    /// A sentence, if this tensor is no value of that type.
    pub fn to_le_bytes(&self, elem: Elem) -> Result<Vec<u8>, String> {
        Ok(match (elem, &self.data) {
            (Elem::F32, Data::F32(v)) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            (Elem::F16, Data::F32(v)) => {
                v.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
            }
            (Elem::BF16, Data::F32(v)) => {
                v.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
            }
            (Elem::F64, Data::F64(v)) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            (Elem::I32, Data::I32(v)) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            (Elem::I8, Data::I8(v)) => v.iter().map(|&x| x as u8).collect(),
            (Elem::U8, Data::U8(v)) => v.clone(),
            _ => return Err(format!("a {} tensor is not stored as {elem}", self.elem())),
        })
    }
}

fn le<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|c| read(std::array::from_fn(|i| c[i]))).collect()
}
