//! What passes work on: a module, and the tensors that passes have made for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use qrmc_ir::{
    Data, Diag, Elem, Hash, Module, RawWeight, Shape, Tensor, TensorType, WeightError, WeightId, WeightSource,
};

use crate::calibrate::StepStore;

/// A tensor that a pass has made.
#[derive(Clone)]
struct Own {
    ty: TensorType,
    place: Place,
}

/// Where such a tensor is.
#[derive(Clone)]
enum Place {
    /// In memory; codes as packed bytes.
    Held(Arc<Tensor>),
    /// In the store of finished steps, under this name in this step.
    Kept(Kept, String),
}

/// A finished step of a store that outlives the run of a pass.
#[derive(Clone)]
pub(crate) struct Kept {
    /// The store.
    pub(crate) store: Arc<dyn StepStore>,
    /// The step.
    pub(crate) key: Hash,
}

type Step = (Hash, Arc<Vec<(String, Tensor)>>);

/// The weights of a checkpoint with tensors laid over them.
#[derive(Clone)]
pub struct Overlay {
    base: Arc<dyn WeightSource>,
    own: BTreeMap<String, Own>,
    /// The step that was read last: the tensors of a layer are asked for one after another.
    last: Arc<Mutex<Option<Step>>>,
}

impl Overlay {
    /// Nothing laid over yet.
    pub fn new(base: Arc<dyn WeightSource>) -> Self {
        Overlay { base, own: BTreeMap::new(), last: Arc::default() }
    }

    /// Identity of the tensors laid over.
    pub(crate) fn hash(&self) -> Hash {
        self.own.iter().fold(Hash::of([]), |h, (name, own)| match &own.place {
            Place::Held(t) => {
                let bytes = t.to_le_bytes(t.elem()).unwrap_or_default();
                Hash::of([&h.0[..], name.as_bytes(), &bytes])
            }
            Place::Kept(kept, item) => Hash::of([&h.0[..], name.as_bytes(), &kept.key.0, item.as_bytes()]),
        })
    }

    fn tensor(&self, name: &str, own: &Own) -> Result<Arc<Tensor>, WeightError> {
        let (kept, item) = match &own.place {
            Place::Held(t) => return Ok(t.clone()),
            Place::Kept(kept, item) => (kept, item),
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let step = match &*last {
            Some((key, step)) if *key == kept.key => step.clone(),
            _ => {
                let lost = || WeightError::new(name, "the finished step that holds it is gone or damaged");
                let step = Arc::new(kept.store.get(&kept.key).ok_or_else(lost)?);
                *last = Some((kept.key, step.clone()));
                step
            }
        };
        let found = step.iter().find(|(n, _)| n == item).map(|(_, t)| Arc::new(t.clone()));
        found.ok_or_else(|| WeightError::new(name, "the finished step does not hold it"))
    }
}

impl WeightSource for Overlay {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let Some(own) = self.own.get(name) else { return self.base.raw(name) };
        let t = self.tensor(name, own)?;
        let bytes = t.to_le_bytes(t.elem()).map_err(|why| WeightError::new(name, why))?;
        Ok(RawWeight { ty: own.ty.clone(), bytes: bytes.into() })
    }

    fn read(&self, name: &str) -> Result<Tensor, WeightError> {
        let Some(own) = self.own.get(name) else { return self.base.read(name) };
        let t = self.tensor(name, own)?;
        match (own.ty.elem, t.data(), own.ty.shape.as_fixed()) {
            (Elem::Quant(spec), Data::U8(bytes), Some(shape)) => {
                qrmc_ir::pack::unpack(bytes, spec, &shape).map_err(|why| WeightError::new(name, why))
            }
            _ => Ok((*t).clone()),
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
        self.put(name, Own { ty, place: Place::Held(Arc::new(tensor)) })
    }

    /// Declares a tensor of integers that a pass has made.
    ///
    /// # Errors
    /// If the name cannot be declared.
    pub(crate) fn define_integers(&mut self, name: &str, tensor: Tensor) -> Result<WeightId, Diag> {
        self.put(name, Own { ty: tensor.ty(), place: Place::Held(Arc::new(tensor)) })
    }

    /// Declares a tensor of any type that a finished step holds: codes as packed bytes. Where the store forgets at once,
    /// the tensor stays in memory.
    ///
    /// # Errors
    /// If the name cannot be declared.
    pub(crate) fn define_kept(
        &mut self,
        name: &str,
        ty: TensorType,
        (item, tensor): (&str, Tensor),
        kept: &Kept,
    ) -> Result<WeightId, Diag> {
        let place = match kept.store.keeps() {
            true => Place::Kept(kept.clone(), item.to_owned()),
            false => Place::Held(Arc::new(tensor)),
        };
        self.put(name, Own { ty, place })
    }

    fn put(&mut self, name: &str, own: Own) -> Result<WeightId, Diag> {
        let taken = |n: &str| self.module.find_weight(n).is_some() || self.weights.own.contains_key(n);
        let mut free = name.to_owned();
        let mut number = 2;
        while taken(&free) {
            free = format!("{name}.{number}");
            number += 1;
        }
        let id = self
            .module
            .declare(&free, own.ty.clone())
            .map_err(|have| Diag::new("Q0601", format!("@{free} exists already as {have}")))?;
        self.weights.own.insert(free, own);
        Ok(id)
    }
}
