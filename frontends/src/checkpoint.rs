//! A checkpoint as found on disk, before it becomes a module.

use std::path::PathBuf;

use qrmc_ir::{QuantSpec, TensorType, WeightSource};
use serde_json::Value;

/// A [`WeightSource`] that can say what it holds, under Hugging Face tensor names.
pub trait Checkpoint: WeightSource {
    /// Name, type and shape of every tensor, in file order. Shapes are outermost first.
    fn tensors(&self) -> Vec<(String, TensorType)>;

    /// The files that hold the weights, in order: what identifies the source is their content.
    fn weight_files(&self) -> Vec<PathBuf>;

    /// How the input of the linear layer with this weight is rounded when the model runs, where the checkpoint asks for it.
    fn rounded_input(&self, weight: &str) -> Option<&RoundedInput> {
        let _ = weight;
        None
    }

    /// How what the linear layer of this name, one of keys or values, gives to the cache is rounded, where the checkpoint asks
    /// for it.
    fn rounded_cache(&self, module: &str) -> Option<&RoundedInput> {
        let _ = module;
        None
    }

    /// Whether tensors are handed out in another form than the files hold them in, so that each is a copy.
    fn converts(&self) -> bool {
        false
    }
}

/// How the input of a linear layer is rounded when the model runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundedInput {
    /// The scheme.
    pub spec: QuantSpec,
    /// The calibrated scale and, where the scheme has one, the zero point; none where they are found from the input.
    pub calibrated: Vec<SmallTensor>,
    /// Matrices that it is multiplied by before, and elements inside the axis that they multiply.
    pub transforms: Vec<(SmallTensor, u64)>,
    /// A factor of both ends of its range.
    pub clip: Option<SmallTensor>,
}

impl RoundedInput {
    /// Whether both round a value to the same codes of the same meaning.
    pub(crate) fn same(&self, other: &RoundedInput) -> bool {
        let numbers = self.tensors().map(|t| (&t.ty, &t.bytes));
        self.spec == other.spec && numbers.eq(other.tensors().map(|t| (&t.ty, &t.bytes)))
    }

    /// Rounded by scales that are found from the input.
    pub(crate) fn by_itself(spec: QuantSpec) -> Self {
        RoundedInput { spec, calibrated: Vec::new(), transforms: Vec::new(), clip: None }
    }

    /// All numbers of the checkpoint that it takes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &SmallTensor> {
        self.transforms.iter().map(|(t, _)| t).chain(&self.clip).chain(&self.calibrated)
    }
}

/// A tensor of a few numbers, kept in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallTensor {
    /// The name under which a checkpoint hands it out.
    pub name: String,
    /// Element type and shape.
    pub ty: TensorType,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

/// A file that travels with the model byte for byte, such as `tokenizer.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideFile {
    /// Name inside the folder.
    pub name: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// What a Hugging Face folder says of its codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Their format, as `qrmc export --format` calls it.
    pub format: &'static str,
    /// Name of the file that says so: `config.json`, or one beside it.
    pub file: String,
}

/// What a reader of one file format hands to the decoder builder.
pub struct Opened {
    /// File or folder that was named by the user.
    pub path: PathBuf,
    /// Format, for people: `"Hugging Face folder"`, `"Hugging Face folder, AWQ"`, `"GGUF v3"`.
    pub format: String,
    /// The codes of a Hugging Face folder.
    pub quantization: Option<Quantization>,
    /// The Hugging Face `config.json`, read or rebuilt.
    pub config: Value,
    /// The weights.
    pub weights: Box<dyn Checkpoint>,
    /// `config.json`, `generation_config.json`, tokenizer and template files.
    pub files: Vec<SideFile>,
    /// What the user should know about the way the weights were taken, in sentences.
    pub notes: Vec<String>,
}
