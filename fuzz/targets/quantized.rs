//! Quantized folders: a length, `config.json`, a length, the header of a safetensors file, and its data. Lengths have two
//! bytes; the length in front of the header is made, so that a changed header stays one. What stands behind a record
//! separator (0x1E) in the first part is vllm-ascend's description.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// A part behind its length, and what follows it.
fn part(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

fuzz_target!(|data: &[u8]| {
    let Some((config, rest)) = part(data) else { return };
    let Some((header, bytes)) = part(rest) else { return };
    let folder = qrmc_fuzz::folder();
    let mut texts = config.splitn(2, |&b| b == 0x1E);
    qrmc_fuzz::write(&folder.join("config.json"), &[texts.next().unwrap_or_default()]);
    let description = folder.join("quant_model_description.json");
    let weights = match texts.next() {
        None => {
            let _ = std::fs::remove_file(description);
            "model.safetensors"
        }
        Some(text) => {
            qrmc_fuzz::write(&description, &[text]);
            "quant_model_weights.safetensors"
        }
    };
    let length = (header.len() as u64).to_le_bytes();
    qrmc_fuzz::write(&folder.join(weights), &[&length, header, bytes]);
    qrmc_fuzz::within_limit(data.len(), || qrmc_fuzz::import(&folder));
});
