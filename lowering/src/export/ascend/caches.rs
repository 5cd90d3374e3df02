//! `C8`: cached keys and values by one calibrated scale a channel (ascend.md §5.2).

use qrmc_ir::{Grain, QuantSpec, ScaleType, WeightSource};

use super::super::plan::{no_caches, scale_bytes};
use super::super::{ExportError, Kept, Part, View};
use crate::artefact::{Dtype, StoredTensor};

/// What the description calls it.
pub(super) const KIND: &str = "C8";

/// Whether the attention of the NPU reads caches of this scheme.
pub(in crate::export) fn fits(spec: QuantSpec) -> bool {
    spec.bits == 8 && spec.signed && !spec.zero && spec.grain == Grain::Channel
}

/// Refuses caches that the NPU does not read; says whether there are some that it does.
pub(super) fn checked(view: &View) -> Result<bool, ExportError> {
    if !view.caches.iter().all(|spec| fits(*spec)) {
        no_caches(view, "ascend files have no such cache")?;
    }
    if view.caches.is_empty() {
        return Ok(false);
    }
    let want = 2 * view.facts.layers as usize;
    if view.kept.len() != want {
        return Err(ExportError::illegal(format!(
            "{} of {want} caches have codes by calibrated scales; {KIND} is for those of all layers",
            view.kept.len()
        ))
        .hint("compile static-caches without skip"));
    }
    Ok(true)
}

/// Refuses scales that the loader of a model of this type would round.
pub(super) fn fit(view: &View, ty: ScaleType, src: &dyn WeightSource) -> Result<(), ExportError> {
    for k in &view.kept {
        let all = scales(k, src)?;
        if let Some(at) = all.iter().position(|&s| ty.round(s) != s) {
            return Err(ExportError::illegal(format!(
                "{}: scale {:e} of cached channel {at} is no {ty}, and the loader would round it",
                k.module, all[at]
            ))
            .hint("compile with static-caches{scale=bf16}, or f16 for a model in f16"));
        }
    }
    Ok(())
}

/// `[kv_heads * head_dim]`
fn scales(k: &Kept, src: &dyn WeightSource) -> Result<Vec<f32>, ExportError> {
    let t = src.read(&k.scale)?;
    let v = t.as_f32().map(<[f32]>::to_vec);
    v.ok_or_else(|| ExportError::fault(format!("`{}` holds no floats", k.scale)))
}

/// Scales, and offsets of 0, of every cache.
pub(super) fn parts<'a>(view: &'a View, out: &mut Vec<Part<'a>>) {
    let width = (view.facts.kv_heads * view.facts.head_dim) as usize;
    for k in &view.kept {
        let tensor = |part: &str| StoredTensor {
            name: format!("{}.kv_cache_{part}", k.module),
            dtype: Dtype::F32,
            shape: vec![width],
        };
        out.push(Part::made(tensor("scale"), &k.scale, move |src, put| {
            Ok(put(&scale_bytes(&scales(k, src)?, ScaleType::F32)?)?)
        }));
        out.push(Part::made(tensor("offset"), &k.scale, move |_, put| Ok(put(&vec![0; 4 * width])?)));
    }
}
