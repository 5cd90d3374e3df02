//! `--emit fake`: an ordinary Hugging Face folder in bf16 whose weights are the de-quantized ones.

use std::collections::HashMap;
use std::path::Path;

use qrmc_ir::{RawWeight, TensorType, WeightError, WeightSource};
use qrmc_lowering::artefact::{ArtefactWriter, StoredTensor, TensorPlan};
use qrmc_lowering::export::{ExportError, Plan};

/// Whether a folder is an export, or what `--emit fake` wrote.
pub(crate) fn is_export(path: &Path) -> bool {
    path.join("manifest.json").is_file() && !path.join("model.qir").exists()
}

/// Turns the tensors of an artefact, in their order, into those of a checkpoint.
pub(crate) struct Fake<'a> {
    plan: Plan<'a>,
    next: usize,
    held: Held,
}

/// The parts of the tensor that comes next.
#[derive(Default)]
struct Held(HashMap<String, (TensorType, Vec<u8>)>);

impl WeightSource for Held {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        match self.0.get(name) {
            Some((ty, bytes)) => Ok(RawWeight { ty: ty.clone(), bytes: bytes.into() }),
            None => Err(WeightError::new(name, "has not come yet")),
        }
    }
}

impl<'a> Fake<'a> {
    pub(crate) fn new(plan: Plan<'a>) -> Self {
        Fake { plan, next: 0, held: Held::default() }
    }

    /// What will be written, in order.
    pub(crate) fn tensors(&self) -> Vec<StoredTensor> {
        self.plan.parts.iter().map(|p| p.tensor.clone()).collect()
    }

    /// `config.json` as the tensors are.
    pub(crate) fn config(&self, source: &[u8], untied: bool) -> Result<Vec<u8>, ExportError> {
        self.plan.config(source, untied)
    }

    /// Takes the next tensor of the artefact; writes the next of the checkpoint when all its parts are there.
    pub(crate) fn take(
        &mut self,
        t: &TensorPlan,
        bytes: &[u8],
        writer: &mut ArtefactWriter<'_>,
    ) -> Result<(), ExportError> {
        self.held.0.insert(t.name.clone(), (t.ty.clone(), bytes.to_vec()));
        let Some(part) = self.plan.parts.get(self.next) else { return Ok(()) };
        if part.from.iter().all(|name| self.held.0.contains_key(*name)) {
            writer.begin(&part.tensor.name)?;
            part.write(&self.held, &mut |bytes| writer.put(bytes))?;
            writer.end()?;
            self.held.0.clear();
            self.next += 1;
        }
        Ok(())
    }
}
