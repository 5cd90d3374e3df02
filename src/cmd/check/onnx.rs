//! What onnxruntime refuses of a model, as its CPU kernels of version 1.32 say it.

use std::path::Path;

use qrmc_frontends::{Integers, OnnxHeader, OnnxNode};
use qrmc_lowering::export::onnx::GENAI;
use qrmc_lowering::export::rules::Fault;
use serde_json::Value;

use crate::fail::Failure;

/// The newest format that is opened.
const VERSION: i64 = 14;
const GROUPED: &str = "com.microsoft.GroupQueryAttention";

/// What of a model would be refused. Its graph need not be one that qrmc reads.
pub(super) fn faults(model: &Path) -> Result<Vec<Fault>, Failure> {
    let header = OnnxHeader::read(model)?;
    let genai = qrmc_frontends::genai_config(model)?;
    let said = genai.as_ref().and_then(|g| g["model"]["decoder"]["head_size"].as_u64());
    let grouped = header.nodes.iter().any(|n| n.op == GROUPED);
    let head = match said {
        Some(head) => head,
        None if !grouped => 0,
        None => qrmc_frontends::import(model, Integers::Keep)?.module.facts.head_dim,
    };
    let mut out = Vec::new();
    if header.version > VERSION {
        let what = format!("the format is version {}; up to {VERSION} is opened", header.version);
        out.push(Fault { what, hint: "export it with an older version of its exporter".into() });
    }
    let found = header.nodes.iter().filter_map(|n| {
        let what = match n.op.as_str() {
            "com.microsoft.MatMulNBits" => packed(n),
            GROUPED => attention(n, head),
            _ => None,
        }?;
        Some(Fault {
            what: format!("node `{}`: {what}", n.name),
            hint: "export with `--form qdq`, which takes standard operators alone".into(),
        })
    });
    out.extend(found);
    out.extend(genai.iter().flat_map(|g| names(g, &header)));
    Ok(out)
}

fn packed(n: &OnnxNode) -> Option<String> {
    let (bits, block) = (n.int("bits").unwrap_or(4), n.int("block_size").unwrap_or(0));
    if ![2, 4, 8].contains(&bits) {
        return Some(format!("codes of {bits} bits; MatMulNBits has 2, 4 and 8"));
    }
    let good = block >= 16 && block.count_ones() == 1 && (bits > 2 || block <= 256);
    (!good).then(|| format!("blocks of {block}; MatMulNBits has powers of two from 16 on"))
}

fn attention(n: &OnnxNode, head: u64) -> Option<String> {
    let of = if n.int("do_rotary") == Some(1) { 16 } else { 8 };
    (!head.is_multiple_of(of)).then(|| format!("heads of {head}, which {of} does not divide"))
}

/// Names that onnxruntime-genai asks for and the graph does not have.
fn names(config: &Value, header: &OnnxHeader) -> Vec<Fault> {
    let decoder = &config["model"]["decoder"];
    let layers = decoder["num_hidden_layers"].as_u64().unwrap_or(0).min(header.nodes.len() as u64);
    let mut out = Vec::new();
    for (side, have) in [("inputs", &header.inputs), ("outputs", &header.outputs)] {
        let all = decoder[side].as_object().into_iter().flatten();
        let wanted = all.filter_map(|(_, name)| name.as_str()).flat_map(|name| match name.contains("%d") {
            true => (0..layers).map(|i| name.replace("%d", &i.to_string())).collect(),
            false => vec![name.to_owned()],
        });
        out.extend(wanted.filter(|name| !have.contains(name)).map(|name| Fault {
            what: format!("{GENAI} names `{name}` among the {side}, which the graph does not have"),
            hint: "write both files anew: `qrmc export --format onnx`".into(),
        }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ints: &[(&str, i64)]) -> OnnxNode {
        let ints = ints.iter().map(|(n, i)| ((*n).to_owned(), *i)).collect();
        OnnxNode { name: "n".into(), op: String::new(), ints }
    }

    // Tried with onnxruntime 1.32, CPU.
    #[test]
    fn kernels_have_these_sizes() {
        let fits = |bits, block| packed(&node(&[("bits", bits), ("block_size", block)])).is_none();
        assert!(fits(4, 16) && fits(8, 512) && fits(2, 256));
        assert!(!fits(2, 512) && !fits(4, 8) && !fits(4, 24) && !fits(3, 32) && !fits(5, 32));
        let heads = |rotary, head| attention(&node(&[("do_rotary", rotary)]), head).is_none();
        assert!(heads(0, 8) && heads(0, 24) && heads(1, 64) && !heads(1, 24) && !heads(0, 12));
    }
}
