//! FlatQuant for `--target vllm-ascend` (ascend.md §5.3). The operator rounds each token to signed codes of 4 bits within
//! one clip, behind a Kronecker pair of the one shape that its loader computes. Everything else has 8 bits.

use qrmc_ir::{Diag, Module};
use qrmc_lowering::export::ascend::pair_of;
use qrmc_lowering::export::rules::Fault;
use qrmc_passes::{Call, OptionValue, Pipeline, kronecker_pairs};

/// The runtime of these rules.
pub(super) const NAME: &str = "vllm-ascend";

/// Gives calls of the preset `flatquant` what the operator needs where the user did not say. The linear layers without a
/// pair that it takes get 8 bits: `o_proj`, whose transform mixes heads, and `down_proj` where its width makes none or
/// ranks share it.
pub(super) fn fill(pipeline: &mut Pipeline, module: &Module, ranks: u32) {
    let word = |w: &str| OptionValue::Word(w.into());
    for call in pipeline.0.iter_mut().filter(|c| c.name == "flatquant") {
        let narrow = option(call, "edges").is_some_and(|v| v == word("norms"));
        let down = !narrow && ranks == 1 && pair_of(module.facts.intermediate as usize).is_ok();
        let wide = match down {
            true => word("o_proj"),
            false => OptionValue::List(vec![word("o_proj"), word("down_proj")]),
        };
        for (name, value) in [
            ("a_sym", word("true")),
            ("kv", OptionValue::Number("16".into())),
            ("scale", word("bf16")),
            ("wide", wide),
            ("edges", word("pairs")),
            ("clips", word("one")),
            // A row has one scale on every rank, and a rank rounds its part of a token by itself.
            ("tp", OptionValue::Number("1".into())),
        ] {
            if option(call, name).is_none() {
                call.options.push((name.to_owned(), value));
            }
        }
    }
}

fn option(call: &Call, name: &str) -> Option<OptionValue> {
    call.options.iter().find(|(k, _)| k.replace('-', "_") == name).map(|(_, v)| v.clone())
}

/// What the operator cannot hold of the transforms that passes in normal form will train.
///
/// # Errors
/// If a pass does not fit the module.
pub(super) fn faults(pipeline: &Pipeline, module: &Module, ranks: u32) -> Result<Vec<Fault>, Diag> {
    let mut out = Vec::new();
    let mut fault = |what: String, hint: &str| out.push(Fault { what, hint: hint.to_owned() });
    for call in pipeline.0.iter().filter(|c| c.name == "affine") {
        for (name, want, why) in [
            ("w", "4", "behind a transform it multiplies codes of 4 bits"),
            ("a", "4", "behind a transform it multiplies codes of 4 bits"),
            ("a_sym", "true", "it rounds activations to signed codes without a zero point"),
            ("clips", "one", "it has one clip for both ends of a range"),
            ("fold", "true", "it has no place for scales of channels that stay online"),
        ] {
            if let Some(have) = option(call, name).map(|v| v.to_string()).filter(|v| v != want) {
                fault(format!("`affine`: {name}={have}; {why}"), &format!("compile with {name}={want}"));
            }
        }
        if option(call, "edges").is_some_and(|v| v.to_string() == "all") {
            let what = "`affine`: edges=all; it has no place for transforms of heads";
            fault(what.to_owned(), "compile with edges=pairs");
        }
        for pair in kronecker_pairs(call, module)? {
            let at = format!("@{}: {}", pair.layer, pair.edge);
            let hint = "give the linear layers that read it 8 bits, such as wide=[o_proj,down_proj]";
            if pair.edge == "down_in" && ranks.max(pair.ranks as u32) > 1 {
                fault(format!("{at} is shared by ranks, and its transform is for all inputs"), hint);
            } else if let Err(why) = pair_of((pair.left * pair.right) as usize) {
                fault(format!("{at}: {why}"), hint);
            }
        }
    }
    Ok(out)
}
