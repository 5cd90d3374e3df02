//! The parser of the text form, the verifier, and the way back: any text.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    qrmc_fuzz::within_limit(data.len(), || {
        let module = match qrmc_ir::parse(text) {
            Ok(module) => module,
            Err(d) => return assert!(!d.message.is_empty()),
        };
        let shown = qrmc_ir::print(&module);
        match qrmc_ir::parse(&shown) {
            Ok(again) => assert!(again == module, "another module than was printed"),
            Err(d) => panic!("what was printed is not read: {d}"),
        }
        let _ = qrmc_ir::verify(&module);
    });
});
