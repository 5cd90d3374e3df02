//! The settings of AutoAWQ and of GPTQ (methods.md §10.2, §10.3).

use qrmc_ir::Grain;
use serde_json::Value;

use super::{Pattern, Rules, Scheme, Settings, Storage, clipped, shown};
use crate::ImportError;

/// AutoAWQ's GEMM layout: `bits` or `w_bit`, `group_size` or `q_group_size`, `zero_point`, `version`,
/// `modules_to_not_convert`.
pub(super) fn awq(s: &Settings<'_>) -> Result<Rules, ImportError> {
    // transformers writes its words for the layout under `version`, GPTQModel under `format`.
    for key in ["version", "format", "checkpoint_format"] {
        if let Some(v) = s.text(key)?.filter(|v| !v.eq_ignore_ascii_case("gemm")) {
            return Err(s.fail(key, &format!("is `{v}`, which is not read"), "read is AWQ's layout `gemm`"));
        }
    }
    if s.flag("zero_point")? == Some(false) {
        return Err(s.fail("zero_point", "is false", "AWQ checkpoints are read with zero points only"));
    }
    let bits = s.bits(&["bits", "w_bit"], &[4])?;
    let grain = group_size(s, &["group_size", "q_group_size"], 128)?;
    let scheme =
        Scheme { storage: Storage::Awq, bits, grain, symmetric: Some(false), reordered: false, input: None };
    let mut rules: Vec<(Pattern, Option<Scheme>)> = Vec::new();
    for name in s.texts("modules_to_not_convert")? {
        rules.push((Pattern::Contains(name.to_owned()), None));
    }
    finish(s, &mut rules, scheme)?;
    Ok(Rules { format: "AWQ".into(), name: "awq", path: s.path.clone(), caches: false, rules })
}

fn group_size(s: &Settings<'_>, keys: &[&str], default: i64) -> Result<Grain, ImportError> {
    for key in keys {
        if let Some(n) = s.int(key)? {
            return s.group(key, n);
        }
    }
    s.group(keys[0], default)
}

/// The rules for the head and for everything else.
fn finish(
    s: &Settings<'_>,
    rules: &mut Vec<(Pattern, Option<Scheme>)>,
    scheme: Scheme,
) -> Result<(), ImportError> {
    if s.flag("lm_head")? == Some(true) {
        rules.push((Pattern::Exact("lm_head".into()), Some(scheme)));
    }
    rules.push((Pattern::Layers, Some(scheme)));
    Ok(())
}

/// GPTQ: `bits`, `group_size`, `sym`, `desc_act`, `checkpoint_format`, `dynamic`, `lm_head`,
/// `modules_in_block_to_quantize`.
pub(super) fn gptq(s: &Settings<'_>) -> Result<Rules, ImportError> {
    let less_one = match (s.text("checkpoint_format")?, s.text("format")?) {
        (None, None) | (Some("gptq"), None | Some("gptq")) | (None, Some("gptq")) => true,
        (Some("gptq_v2"), None | Some("gptq_v2")) | (None, Some("gptq_v2")) => false,
        (a, b) => {
            let key = if a.is_some() { "checkpoint_format" } else { "format" };
            let what = format!("is `{}`, which is not read", a.or(b).unwrap_or_default());
            return Err(s.fail(key, &what, "read are `gptq` and `gptq_v2`"));
        }
    };
    for key in ["is_marlin_format", "rotation", "adapter", "lora", "activation"] {
        s.refuse(key, "it changes what the tensors mean; start from the float checkpoint")?;
    }
    if let Some(t) = s.text("pack_dtype")?.filter(|t| *t != "int32") {
        return Err(s.fail("pack_dtype", &format!("is `{t}`"), "words of 32 bits (`int32`) are read"));
    }
    let scheme = Scheme {
        storage: Storage::Gptq { less_one },
        bits: s.bits(&["bits"], &BITS)?,
        grain: group_size(s, &["group_size"], 128)?,
        symmetric: s.flag("sym")?.filter(|sym| *sym),
        reordered: s.flag("desc_act")? == Some(true),
        input: None,
    };
    let mut rules = Vec::new();
    dynamic(s, scheme, &mut rules)?;
    blocks(s, scheme, &mut rules)?;
    finish(s, &mut rules, scheme)?;
    let (format, name) = if less_one { ("GPTQ", "gptq") } else { ("GPTQ v2", "gptq-v2") };
    Ok(Rules { format: format.into(), name, path: s.path.clone(), caches: false, rules })
}

const BITS: [i64; 4] = [2, 3, 4, 8];

/// Settings of single layers by pattern: `-:PATTERN` leaves them in floats, others replace some keys.
fn dynamic(
    s: &Settings<'_>,
    scheme: Scheme,
    rules: &mut Vec<(Pattern, Option<Scheme>)>,
) -> Result<(), ImportError> {
    let Some(d) = s.within("dynamic")? else { return Ok(()) };
    for pattern in d.map.keys() {
        if let Some(text) = pattern.strip_prefix("-:") {
            rules.push((d.regex("", text)?, None));
            continue;
        }
        let text = pattern.strip_prefix("+:").unwrap_or(pattern);
        let mut own = scheme;
        if let Some(o) = d.within(pattern)? {
            let known = ["bits", "group_size", "sym", "desc_act"];
            if let Some(key) = o.map.keys().find(|k| !known.contains(&k.as_str())) {
                let hint = "understood are bits, group_size, sym and desc_act";
                return Err(o.fail(key, "is not understood", hint));
            }
            if o.get("bits").is_some() {
                own.bits = o.bits(&["bits"], &BITS)?;
            }
            if let Some(n) = o.int("group_size")? {
                own.grain = o.group("group_size", n)?;
            }
            if let Some(sym) = o.flag("sym")? {
                own.symmetric = sym.then_some(true);
            }
            own.reordered = o.flag("desc_act")?.unwrap_or(own.reordered);
        }
        rules.push((d.regex(&clipped(pattern), text)?, Some(own)));
    }
    Ok(())
}

/// Which linear layers of a block are quantized, where not all are.
fn blocks(
    s: &Settings<'_>,
    scheme: Scheme,
    rules: &mut Vec<(Pattern, Option<Scheme>)>,
) -> Result<(), ImportError> {
    let key = "modules_in_block_to_quantize";
    let Some(v) = s.get(key) else { return Ok(()) };
    let flat = |v: &Value| match v {
        Value::Array(a) => a.clone(),
        other => vec![other.clone()],
    };
    for name in v.as_array().iter().flat_map(|a| a.iter()).flat_map(flat) {
        let Some(name) = name.as_str() else {
            return Err(s.fail(key, &format!("holds {}", shown(&name)), "it lists names of linear layers"));
        };
        let pattern = format!(r"model\.layers\.\d+\.{}$", regex::escape(name));
        rules.push((s.regex(key, &pattern)?, Some(scheme)));
    }
    rules.push((Pattern::Layers, None));
    Ok(())
}
