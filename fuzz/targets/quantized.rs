//! Quantized folders: a length, `config.json`, a length, the header of a safetensors file, and its data. Lengths have two
//! bytes; the length in front of the header is made, so that a changed header stays one.
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
    qrmc_fuzz::write(&folder.join("config.json"), &[config]);
    let length = (header.len() as u64).to_le_bytes();
    qrmc_fuzz::write(&folder.join("model.safetensors"), &[&length, header, bytes]);
    qrmc_fuzz::within_limit(data.len(), || qrmc_fuzz::import(&folder));
});
