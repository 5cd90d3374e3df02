//! The reader of safetensors files: any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qrmc_frontends::hf::SafetensorsFolder;

fuzz_target!(|data: &[u8]| {
    let folder = qrmc_fuzz::folder();
    qrmc_fuzz::write(&folder.join("model.safetensors"), &[data]);
    qrmc_fuzz::within_limit(data.len(), || match SafetensorsFolder::open(&folder) {
        Ok(Some(weights)) => qrmc_fuzz::read(&weights),
        Ok(None) => panic!("the file is there"),
        Err(e) => assert!(!e.what.is_empty()),
    });
});
