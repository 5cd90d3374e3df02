//! What passes work on: a module, and the tensors that passes have made for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use qrmc_ir::{
    Diag, Elem, Module, RawWeight, Shape, Tensor, TensorType, WeightError, WeightId, WeightSource,
};

/// The weights of a checkpoint with tensors laid over them.
#[derive(Clone)]
pub struct Overlay {
    base: Arc<dyn WeightSource>,
    own: BTreeMap<String, Tensor>,
}

impl Overlay {
    /// Nothing laid over yet.
    pub fn new(base: Arc<dyn WeightSource>) -> Self {
        Overlay { base, own: BTreeMap::new() }
    }

    /// The tensors laid over, by name.
    pub fn own(&self) -> &BTreeMap<String, Tensor> {
        &self.own
    }
}

impl WeightSource for Overlay {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let Some(t) = self.own.get(name) else { return self.base.raw(name) };
        let bytes = t.to_le_bytes(t.elem()).map_err(|why| WeightError::new(name, why))?;
        Ok(RawWeight { ty: t.ty(), bytes: bytes.into() })
    }

    fn read(&self, name: &str) -> Result<Tensor, WeightError> {
        match self.own.get(name) {
            Some(t) => Ok(t.clone()),
            None => self.base.read(name),
        }
    }
}

/// A module under compilation.
#[derive(Clone)]
pub struct Unit {
    /// The graph.
    pub module: Module,
    /// Its weights.
    pub weights: Overlay,
}

impl Unit {
    /// A freshly imported module.
    pub fn new(module: Module, weights: Arc<dyn WeightSource>) -> Self {
        Unit { module, weights: Overlay::new(weights) }
    }

    /// Declares an `f32` tensor that a pass has made, under this name or, if that is taken, the name with a number.
    ///
    /// # Errors
    /// If the tensor is not finite.
    pub fn define(&mut self, name: &str, tensor: Tensor) -> Result<WeightId, Diag> {
        let finite = tensor.as_f32().is_some_and(|v| v.iter().all(|x| x.is_finite()));
        if !finite {
            return Err(Diag::new("Q0601", format!("@{name} would hold NaN or infinity"))
                .hint("look at the calibration text and the source weights: one of them is out of range"));
        }
        let ty = TensorType::new(Elem::F32, Shape::fixed(tensor.shape()));
        let taken = |n: &str| self.module.find_weight(n).is_some() || self.weights.own.contains_key(n);
        let mut free = name.to_owned();
        let mut number = 2;
        while taken(&free) {
            free = format!("{name}.{number}");
            number += 1;
        }
        let id = self
            .module
            .declare(&free, ty)
            .map_err(|have| Diag::new("Q0601", format!("@{free} exists already as {have}")))?;
        self.weights.own.insert(free, tensor);
        Ok(id)
    }
}
