//! The `qrmc` command line.

mod calib;
mod cli;
mod cmd;
mod fail;
mod memory;
mod model;
mod settings;
mod store;
mod ui;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = match cli::Cli::try_parse() {
        Ok(args) => args,
        Err(e) => {
            // Help and version go to stdout with 0, usage errors to stderr with 2.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { fail::USAGE } else { 0 });
        }
    };
    let ui = ui::Ui::new(args.json);
    match cmd::run(args, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(f) => {
            ui.fail(&f);
            ExitCode::from(f.code)
        }
    }
}
