//! Hugging Face folders: `config.json`, safetensors weights and the files that travel with them.

mod headers;
mod open;
mod safetensors;

pub use headers::headers;
pub use open::open_folder;
pub(crate) use open::{read_small, side_files};
pub(crate) use safetensors::map_file;
pub use safetensors::{SafetensorsFile, SafetensorsFolder};
