//! The settings of compressed-tensors (methods.md §10.4).

use qrmc_ir::{Grain, QuantSpec};
use serde_json::Value;

use super::{Pattern, Rules, Scheme, Settings, Storage, shown};
use crate::ImportError;

const FLOATS: &str = "start from the float checkpoint";

/// `format`, `config_groups` with `targets`, `weights` and `input_activations`, and `ignore`.
pub(super) fn read(s: &Settings<'_>) -> Result<Rules, ImportError> {
    let status = s.text("quantization_status")?.unwrap_or("compressed");
    if status != "compressed" {
        let hint = "only finished checkpoints are read: save it with `save_compressed=True`";
        return Err(s.fail("quantization_status", &format!("is `{status}`"), hint));
    }
    for key in ["kv_cache_scheme", "transform_config", "moe_sparsity_config"] {
        s.refuse(key, &format!("ignoring it would change the model; {FLOATS}"))?;
    }
    if let Some(sparse) = s.within("sparsity_config")?
        && let Some(f) = sparse.text("format")?.filter(|f| *f != "dense")
    {
        return Err(sparse.fail("format", &format!("is `{f}`"), "sparse tensors are not read"));
    }
    let whole = s.text("format")?;
    let mut rules = Vec::new();
    for name in s.texts("ignore")? {
        rules.push((pattern(s, "ignore", name)?, None));
    }
    let mut by_kind: [Vec<(Pattern, Option<Scheme>)>; 3] = Default::default();
    let groups = s.within("config_groups")?.ok_or_else(|| s.fail("config_groups", "is missing", FLOATS))?;
    let mut formats = Vec::new();
    for key in groups.map.keys() {
        let Some(group) = groups.within(key)? else { continue };
        let format = group.text("format")?.or(whole).unwrap_or("missing");
        let scheme = scheme(&group, format)?;
        if !formats.contains(&format) {
            formats.push(format);
        }
        for target in group.texts("targets")? {
            if target == "Embedding" {
                return Err(group.fail("targets", "names the embedding", "embeddings are read as floats"));
            }
            // compressed-tensors prefers names to patterns, and patterns to classes.
            let pattern = pattern(&group, "targets", target)?;
            let rank = match pattern {
                Pattern::Regex(_) => 1,
                Pattern::Linear => 2,
                _ => 0,
            };
            by_kind[rank].push((pattern, Some(scheme)));
        }
    }
    rules.extend(by_kind.into_iter().flatten());
    let format = format!("compressed-tensors {}", formats.join(", "));
    Ok(Rules { format, name: "compressed-tensors", path: s.path.clone(), caches: false, rules })
}

/// A name, a pattern behind `re:`, or the class of all linear layers.
fn pattern(s: &Settings<'_>, key: &str, text: &str) -> Result<Pattern, ImportError> {
    Ok(match text.strip_prefix("re:") {
        Some(regex) => s.regex(key, regex)?,
        None if text == "Linear" => Pattern::Linear,
        None => Pattern::Exact(text.to_owned()),
    })
}

fn scheme(group: &Settings<'_>, format: &str) -> Result<Scheme, ImportError> {
    let storage = match format {
        "pack-quantized" => Storage::Packed,
        "int-quantized" | "naive-quantized" => Storage::Bytes,
        other => {
            let hint = "read are pack-quantized, int-quantized and naive-quantized";
            return Err(group.fail("format", &format!("is `{other}`"), hint));
        }
    };
    group.refuse("output_activations", "outputs that are rounded are not read")?;
    let Some(w) = group.within("weights")? else {
        return Err(group.fail("weights", "is missing", "groups without quantized weights are not read"));
    };
    integers(&w)?;
    if let Some(v) = w.get("dynamic").filter(|v| v.as_bool() != Some(false)) {
        return Err(w.fail("dynamic", &format!("is {}", shown(v)), "weights have stored scales"));
    }
    let size = w.int("group_size")?;
    let strategy = match (w.text("strategy")?, size) {
        (Some(s), _) => s,
        (None, Some(-1)) => "channel",
        (None, Some(_)) => "group",
        (None, None) => "tensor",
    };
    let grain = match (strategy, size) {
        ("group", Some(n)) => w.group("group_size", n)?,
        ("group", None) => return Err(w.fail("group_size", "is missing", "its strategy is `group`")),
        ("channel", None | Some(-1)) => Grain::Row,
        ("tensor", None) => Grain::Tensor,
        (other, _) => {
            let hint = "read are group with group_size, channel and tensor without";
            return Err(w.fail("strategy", &format!("is `{other}`"), hint));
        }
    };
    Ok(Scheme {
        storage,
        bits: w.bits(&["num_bits"], &[2, 3, 4, 5, 6, 7, 8])?,
        grain,
        symmetric: Some(w.flag("symmetric")?.unwrap_or(true)),
        reordered: matches!(w.get("actorder").and_then(Value::as_str), Some("group" | "dynamic")),
        input: input(group)?,
    })
}

fn integers(s: &Settings<'_>) -> Result<(), ImportError> {
    match s.text("type")? {
        None | Some("int") => Ok(()),
        Some(t) => Err(s.fail("type", &format!("is `{t}`"), &format!("only `int` is read; {FLOATS}"))),
    }
}

/// How inputs are rounded: to 8 bits, with a scale for each token that is found when the model runs, or with one that is
/// stored.
fn input(group: &Settings<'_>) -> Result<Option<QuantSpec>, ImportError> {
    let Some(a) = group.within("input_activations")? else { return Ok(None) };
    integers(&a)?;
    let dynamic = match a.get("dynamic") {
        None => false,
        Some(Value::Bool(d)) => *d,
        Some(v) => {
            let hint =
                format!("read are true, with a scale for each token, and false, with a stored one; {FLOATS}");
            return Err(a.fail("dynamic", &format!("is {}", shown(v)), &hint));
        }
    };
    let grain = match (dynamic, a.text("strategy")?.unwrap_or("tensor")) {
        (true, "token") => Grain::Token,
        (false, "tensor") => Grain::Tensor,
        (dynamic, s) => {
            let what = format!("is `{s}` where `dynamic` is {dynamic}");
            let hint =
                "inputs are rounded with a scale for each token, or with one stored scale for the tensor";
            return Err(a.fail("strategy", &what, hint));
        }
    };
    let bits = a.bits(&["num_bits"], &[8])?;
    Ok(Some(match a.flag("symmetric")?.unwrap_or(true) {
        true => QuantSpec::sym(bits, grain),
        false => QuantSpec::asym(bits, grain),
    }))
}
