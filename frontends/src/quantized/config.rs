//! What the configuration of a quantized checkpoint says about each of its linear layers.

use std::path::{Path, PathBuf};

use qrmc_ir::{Grain, QuantSpec};
use regex::Regex;
use serde_json::{Map, Value};

use crate::ImportError;

pub(super) mod ascend;
mod compressed;
mod words;

/// How the codes of a linear layer are laid out in its tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Storage {
    /// AutoAWQ GEMM: words along the output axis, input-major (methods.md §10.2).
    Awq,
    /// GPTQ: words along the input axis, input-major (methods.md §10.3).
    Gptq {
        /// The first version of the format, whose zero points are stored less one.
        less_one: bool,
    },
    /// compressed-tensors `pack-quantized`: words along the input axis, output-major (methods.md §10.4).
    Packed,
    /// compressed-tensors `int-quantized` and `naive-quantized`: a signed byte for each code.
    Bytes,
    /// vllm-ascend's description: a signed byte for each code (methods.md §10.5).
    Ascend(Ascend),
}

/// What stands beside the codes of vllm-ascend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ascend {
    /// Scales of rows.
    Plain,
    /// The same, a Kronecker pair before the rounding of inputs, and a clip of their range.
    Transformed,
    /// One scale and zero point of the input, and the products of that scale with those of rows.
    Static,
}

/// What the configuration says about one linear layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Scheme {
    pub(super) storage: Storage,
    pub(super) bits: u8,
    /// `Row`, `Group` or `Tensor`.
    pub(super) grain: Grain,
    /// Whether there are no zero points, where the configuration is believed about it.
    pub(super) symmetric: Option<bool>,
    /// Whether columns were taken in another order than they stand in, so that `g_idx` must be there.
    pub(super) reordered: bool,
    /// How the layer's input is rounded when the model runs.
    pub(super) input: Option<QuantSpec>,
}

/// Which linear layers a rule is about.
#[derive(Clone, Debug)]
enum Pattern {
    /// This one.
    Exact(String),
    /// Those whose names hold this.
    Contains(String),
    /// Those whose names begin as this says.
    Regex(Regex),
    /// Those of the layers, but not the head.
    Layers,
    /// All.
    Linear,
}

impl Pattern {
    fn matches(&self, module: &str) -> bool {
        match self {
            Pattern::Exact(name) => module == name,
            Pattern::Contains(part) => module.contains(part.as_str()),
            Pattern::Regex(r) => r.is_match(module),
            Pattern::Layers => module.starts_with("model.layers."),
            Pattern::Linear => true,
        }
    }
}

/// The schemes of a checkpoint.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// For people: `AWQ`, `GPTQ v2`, `compressed-tensors pack-quantized`.
    pub(super) format: String,
    /// The same as `qrmc export --format` calls it.
    pub(super) name: &'static str,
    /// Whether keys and values are cached by calibrated scales of channels.
    pub(super) caches: bool,
    /// The file that says it.
    pub(super) path: PathBuf,
    /// The first that matches decides; `None` leaves a layer in floats.
    rules: Vec<(Pattern, Option<Scheme>)>,
}

impl Rules {
    /// What is said about a linear layer, such as `model.layers.0.mlp.up_proj`; `None` if it stays in floats.
    pub(super) fn of(&self, module: &str) -> Option<&Scheme> {
        self.rules.iter().find(|(p, _)| p.matches(module))?.1.as_ref()
    }

    /// The `quantization_config` of `config.json`, if it has one.
    ///
    /// # Errors
    /// If the method, its format or one of its settings is not understood. Settings that would change the model if they
    /// were ignored are refused by name.
    pub(super) fn read(folder: &Path, config: &Value) -> Result<Option<Rules>, ImportError> {
        let path = folder.join("config.json");
        let keys = ["quantization_config", "compression_config"];
        let found = keys.iter().find_map(|k| Some((*k, config.get(k).filter(|v| !v.is_null())?)));
        let Some((key, value)) = found else { return Ok(None) };
        let Some(map) = value.as_object() else {
            return Err(ImportError::new(path, format!("`{key}` is no JSON object")).hint(DAMAGED));
        };
        let s = Settings { path, key: format!("{key}."), map };
        let method = match s.text("quant_method")? {
            Some(method) => method,
            None if map.contains_key("config_groups") => "compressed-tensors",
            None => return Err(s.fail("quant_method", "is missing", READ)),
        };
        match method {
            "awq" => words::awq(&s).map(Some),
            "gptq" => words::gptq(&s).map(Some),
            "compressed-tensors" => compressed::read(&s).map(Some),
            other => Err(s.fail("quant_method", &format!("is `{other}`, which is not read"), READ)),
        }
    }

    /// The settings that older checkpoints of GPTQ and AWQ hold in a file of their own; for folders with packed weights.
    ///
    /// # Errors
    /// As [`Rules::read`]; also if the file is no JSON object.
    pub(super) fn read_beside(
        folder: &Path,
        read: impl Fn(&Path) -> Result<Vec<u8>, ImportError>,
    ) -> Result<Option<Rules>, ImportError> {
        for (name, awq) in [("quantize_config.json", false), ("quant_config.json", true)] {
            let path = folder.join(name);
            if !path.is_file() {
                continue;
            }
            let value: Value = serde_json::from_slice(&read(&path)?)
                .map_err(|e| ImportError::new(&path, format!("this is not JSON: {e}")).hint(DAMAGED))?;
            let Some(map) = value.as_object() else {
                return Err(ImportError::new(path, "this is JSON, but not an object").hint(DAMAGED));
            };
            let s = Settings { path, key: String::new(), map };
            return match (s.text("quant_method")?, awq) {
                (Some("gptq"), _) | (None, false) => words::gptq(&s).map(Some),
                (Some("awq"), _) | (None, true) => words::awq(&s).map(Some),
                (Some(other), _) => {
                    Err(s.fail("quant_method", &format!("is `{other}`, which is not read"), READ))
                }
            };
        }
        Ok(None)
    }
}

const DAMAGED: &str = "download the file again";
const READ: &str =
    "read are awq, gptq and compressed-tensors with integer weights; else start from the float checkpoint";

/// An object of settings, and how to name it in an error.
struct Settings<'a> {
    path: PathBuf,
    /// What stands before a key.
    key: String,
    map: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    fn fail(&self, key: &str, what: &str, hint: &str) -> ImportError {
        ImportError::new(&self.path, format!("`{}{key}` {what}", self.key)).hint(hint)
    }

    /// The value of a key; `null` is as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The object under a key.
    fn within(&self, key: &str) -> Result<Option<Settings<'a>>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Settings { path: self.path.clone(), key: format!("{}{key}.", self.key), map }))
            }
            Some(v) => Err(self.fail(key, &format!("is {}, not an object", shown(v)), DAMAGED)),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => Err(self.fail(key, &format!("is {}, not a string", shown(v)), DAMAGED)),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(v) => Err(self.fail(key, &format!("is {}, not true or false", shown(v)), DAMAGED)),
        }
    }

    fn int(&self, key: &str) -> Result<Option<i64>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_i64() {
                Some(n) => Ok(Some(n)),
                None => Err(self.fail(key, &format!("is {}, not an integer", shown(v)), DAMAGED)),
            },
        }
    }

    /// A list of strings; empty if the key is absent.
    fn texts(&self, key: &str) -> Result<Vec<&'a str>, ImportError> {
        let bad = |v: &Value| self.fail(key, &format!("holds {}, not a list of names", shown(v)), DAMAGED);
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(a)) => a.iter().map(|v| v.as_str().ok_or_else(|| bad(v))).collect(),
            Some(v) => Err(bad(v)),
        }
    }

    /// The number of bits under one of these keys.
    fn bits(&self, keys: &[&str], read: &[i64]) -> Result<u8, ImportError> {
        for key in keys {
            if let Some(n) = self.int(key)? {
                if read.contains(&n) {
                    return Ok(n as u8);
                }
                let list = read.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let hint = format!("read here are {list}; else start from the float checkpoint");
                return Err(self.fail(key, &format!("is {n}"), &hint));
            }
        }
        Err(self.fail(keys[0], "is missing", DAMAGED))
    }

    /// The grain of a group size, which is -1 where a row has one scale.
    fn group(&self, key: &str, size: i64) -> Result<Grain, ImportError> {
        match size {
            -1 => Ok(Grain::Row),
            // Larger rows belong to no model; refusing them keeps every later product in range.
            1..=0x1000_0000 => Ok(Grain::Group(size as u32)),
            _ => Err(self.fail(key, &format!("is {size}"), "a group has at least one column, or is -1")),
        }
    }

    /// Refuses a key that is set to something, where ignoring it would change the model.
    fn refuse(&self, key: &str, hint: &str) -> Result<(), ImportError> {
        let empty = |v: &Value| match v {
            Value::Bool(b) => !b,
            Value::Object(o) => o.is_empty(),
            Value::Array(a) => a.is_empty(),
            _ => false,
        };
        match self.get(key).filter(|v| !empty(v)) {
            None => Ok(()),
            Some(v) => Err(self.fail(key, &format!("is {}, which is not understood", shown(v)), hint)),
        }
    }

    /// A regular expression that is to match from the start of a name.
    fn regex(&self, key: &str, text: &str) -> Result<Pattern, ImportError> {
        Regex::new(&format!("^(?:{text})")).map(Pattern::Regex).map_err(|_| {
            let what = format!("holds the pattern `{}`, which is not understood", clipped(text));
            self.fail(key, &what, "look-around and back references are not read; list the names instead")
        })
    }
}

/// A value in a message, not longer than a line.
fn shown(v: &Value) -> String {
    clipped(&v.to_string())
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}
