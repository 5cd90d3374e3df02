//! What a safetensors file says that it holds.

use std::path::Path;

use super::map_file;
use crate::ImportError;

/// Name, element type as the format calls it, and sizes of each tensor of a file, by name: also of types that no model is
/// read from. No tensor is read.
///
/// # Errors
/// If the file is no safetensors file, or is cut short.
pub fn headers(path: &Path) -> Result<Vec<(String, String, Vec<usize>)>, ImportError> {
    let map = map_file(path, 8)?;
    let file = safetensors::SafeTensors::deserialize(&map).map_err(|e| {
        ImportError::new(path, format!("the safetensors library refuses the file: {e}"))
            .hint("write or fetch it again")
    })?;
    let all = file.tensors().into_iter();
    let mut out: Vec<_> =
        all.map(|(name, t)| (name, format!("{:?}", t.dtype()), t.shape().to_vec())).collect();
    out.sort_unstable();
    Ok(out)
}
