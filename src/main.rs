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
    memory::give_back_early();
    // `--max_new` means `--max-new`; what comes behind `=` is a value.
    let args = std::env::args_os().map(|a| match a.to_str() {
        Some(flag) if flag.starts_with("--") => {
            let (name, value) = flag.split_at(flag.find('=').unwrap_or(flag.len()));
            format!("{}{value}", name.replace('_', "-")).into()
        }
        _ => a,
    });
    let args = match cli::Cli::try_parse_from(args) {
        Ok(args) => args,
        Err(e) => {
            // Help and version go to stdout with 0, usage errors to stderr with 2.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { fail::USAGE } else { 0 });
        }
    };
    let ui = ui::Ui::new(args.json);
    match cmd::run(args, &ui) {
        Ok(()) => {
            ui.finish();
            ExitCode::SUCCESS
        }
        Err(f) => {
            ui.fail(&f);
            ExitCode::from(f.code)
        }
    }
}
