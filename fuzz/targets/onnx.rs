//! The reader of ONNX models, up to the module and every tensor: any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = qrmc_fuzz::folder().join("m.onnx");
    qrmc_fuzz::write(&path, &[data]);
    qrmc_fuzz::within_limit(data.len(), || qrmc_fuzz::import(&path));
});
