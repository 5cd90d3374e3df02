//! `qrmc export`.

use std::path::Path;

use qrmc_ir::verify;
use qrmc_lowering::artefact::Output;
use qrmc_lowering::export::onnx;

use super::opt::faults;
use crate::cli::{ExportArgs, ExportFormat, OnnxForm};
use crate::fail::Failure;
use crate::model;
use crate::ui::Ui;

/// Whether a folder is what this command wrote.
fn is_export(path: &Path) -> bool {
    path.join(onnx::MODEL).is_file() && path.join(onnx::DATA).is_file()
}

pub(crate) fn run(args: &ExportArgs, ui: &Ui) -> Result<(), Failure> {
    let engine = super::engine(&args.machine)?;
    let model = model::open(&args.model, &engine)?;
    let verified = verify(&model.module).map_err(faults)?;
    let output = Output::prepare(&args.output, is_export)?;
    match args.format {
        ExportFormat::Onnx => {
            let form = match args.form {
                OnnxForm::Qdq => onnx::Form::Qdq,
                OnnxForm::Ort => onnx::Form::Ort,
            };
            onnx::write(verified, &*model.weights, &output.folder(), &onnx::Options { form })?;
        }
    }
    for f in &model.files {
        output.file(&f.name, &f.bytes)?;
    }
    output.publish()?;
    if ui.json() {
        ui.object(&serde_json::json!({ "output": args.output.display().to_string() }));
    } else {
        ui.out(&format!("-> {}", args.output.display()));
    }
    Ok(())
}
