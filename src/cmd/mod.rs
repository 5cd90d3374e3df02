//! One file a command.

mod bench;
mod check;
mod compile;
mod diff;
mod emit;
mod eval;
mod export;
mod generate;
mod inspect;
mod opt;
mod passes;
mod plan;
mod recipe;
mod summary;

use qrmc_runtime::engine::CpuEngine;

use crate::cli::{Cli, Command, MachineArgs};
use crate::fail::Failure;
use crate::settings;
use crate::ui::Ui;

pub(crate) fn run(cli: Cli, ui: &Ui) -> Result<(), Failure> {
    match cli.command {
        Command::Compile(args) => compile::run(&args, ui),
        Command::Check(args) => check::run(&args, ui),
        Command::Bench(args) => bench::run(&args, ui),
        Command::Plan(args) => plan::run(&args, ui),
        Command::Opt(args) => opt::run(&args, ui),
        Command::Export(args) => export::run(&args, ui),
        Command::Inspect(args) => inspect::run(&args, ui),
        Command::Diff(args) => diff::run(&args, ui),
        Command::Eval(args) => eval::run(&args, ui),
        Command::Generate(args) => generate::run(&args, ui),
        Command::Passes(args) => passes::run(&args, ui),
        Command::Targets => passes::targets(ui),
    }
}

/// The engine that the flags ask for.
fn engine(args: &MachineArgs) -> Result<CpuEngine, Failure> {
    let threads = args.threads.unwrap_or_else(settings::default_threads);
    if threads == 0 || threads > 4096 {
        return Err(Failure::usage(format!("--threads {threads}: give 1 to 4096")));
    }
    Ok(CpuEngine::new(threads)?)
}
