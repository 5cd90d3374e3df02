//! Tensor parallelism as an attribute of the quantized graph (methods.md §1.5): what belongs to one rank stays within
//! it, so that a shard can be cut without computing anything anew.

use qrmc_ir::{Diag, ModelFacts};

/// Refuses a number of ranks that the model cannot be cut into.
///
/// # Errors
/// The first size that does not divide, with the nearest numbers of ranks that do.
pub(crate) fn check_tp(facts: &ModelFacts, tp: u32) -> Result<(), Diag> {
    let fits = |tp: u64| {
        tp > 0
            && facts.heads.is_multiple_of(tp)
            && facts.intermediate.is_multiple_of(tp)
            && (facts.kv_heads.is_multiple_of(tp) || tp.is_multiple_of(facts.kv_heads))
    };
    if fits(u64::from(tp)) {
        return Ok(());
    }
    let mut near: Vec<u64> = (1..=facts.heads).filter(|n| fits(*n)).collect();
    near.sort_by_key(|n| (n.abs_diff(u64::from(tp)), *n));
    near.truncate(3);
    near.sort_unstable();
    let near = near.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let m = format!(
        "{tp} ranks do not divide this model: {} query heads, {} key heads, {} channels of the feed-forward block",
        facts.heads, facts.kv_heads, facts.intermediate
    );
    Err(Diag::new("Q0606", m).hint(format!("numbers of ranks that do: {near}")))
}
