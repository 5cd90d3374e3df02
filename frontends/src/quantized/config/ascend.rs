//! The description of msModelSlim and vllm-ascend: a type for every tensor (methods.md §10.5, ascend.md §5).

use std::path::Path;

use qrmc_ir::{Grain, QuantSpec};
use serde_json::{Map, Value};

use super::{Ascend, DAMAGED, Pattern, Rules, Scheme, Settings, Storage};
use crate::ImportError;

/// The file that tells such a folder.
const DESCRIPTION: &str = "quant_model_description.json";
const FLOATS: &str = "start from the float checkpoint";

/// The description in a folder, if there is one.
///
/// # Errors
/// If it is no JSON object of types, or gives a linear layer one that is not read.
pub(in crate::quantized) fn read(
    folder: &Path,
    read: impl Fn(&Path) -> Result<Vec<u8>, ImportError>,
) -> Result<Option<Rules>, ImportError> {
    let path = folder.join(DESCRIPTION);
    if !path.is_file() {
        return Ok(None);
    }
    let map: Map<String, Value> = serde_json::from_slice(&read(&path)?).map_err(|e| {
        ImportError::new(&path, format!("this is no JSON object of tensors and their types: {e}"))
            .hint(DAMAGED)
    })?;
    let s = Settings { path: path.clone(), key: String::new(), map: &map };
    s.refuse("fa_quant_type", &format!("codes of attention are not read; {FLOATS}"))?;
    let caches = match s.text("kv_cache_type")?.or(s.text("kv_quant_type")?) {
        None => false,
        Some("C8") => true,
        Some(other) => {
            return Err(s.fail("kv_cache_type", &format!("is `{other}`"), &format!("read is C8; {FLOATS}")));
        }
    };
    let mut rules = Vec::new();
    for (name, kind) in &map {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        let Some(kind) = kind.as_str() else {
            return Err(s.fail(name, "has no type that is a text", DAMAGED));
        };
        let (bits, input, beside) = match kind {
            "FLOAT" => {
                rules.push((Pattern::Exact(module.to_owned()), None));
                continue;
            }
            "W8A16" => (8, None, Ascend::Plain),
            "W8A8_DYNAMIC" => (8, Some(Grain::Token), Ascend::Plain),
            "W8A8" => (8, Some(Grain::Tensor), Ascend::Static),
            "W4A4_DYNAMIC" => (4, Some(Grain::Token), Ascend::Plain),
            "W4A4_FLATQUANT_DYNAMIC" => (4, Some(Grain::Token), Ascend::Transformed),
            other => {
                let hint = format!(
                    "read are FLOAT, W8A16, W8A8, W8A8_DYNAMIC, W4A4_DYNAMIC and W4A4_FLATQUANT_DYNAMIC; {FLOATS}"
                );
                return Err(s.fail(name, &format!("is of type `{other}`"), &hint));
            }
        };
        let scheme = Scheme {
            storage: Storage::Ascend(beside),
            bits,
            grain: Grain::Row,
            symmetric: Some(true),
            reordered: false,
            input: input.map(|grain| QuantSpec::sym(bits, grain)),
        };
        rules.push((Pattern::Exact(module.to_owned()), Some(scheme)));
    }
    let kind = s.text("model_quant_type")?.unwrap_or("without a type");
    Ok(Some(Rules { format: format!("vllm-ascend {kind}"), name: "ascend", caches, path, rules }))
}
