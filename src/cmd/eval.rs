//! `qrmc eval`: perplexity on a text, or the share of right answers to questions.

mod accuracy;
mod perplexity;

use std::path::{Path, PathBuf};

use qrmc_runtime::tasks::{TASKS, Task};
use qrmc_runtime::text::{Split, available_splits};

use crate::cli::EvalArgs;
use crate::fail::{FAILURE, Failure};
use crate::settings;
use crate::ui::Ui;

/// The task whose text has a name.
const WIKITEXT2: &str = "wikitext2";

pub(crate) fn run(args: &EvalArgs, ui: &Ui) -> Result<(), Failure> {
    match Task::find(&args.task) {
        Some(task) => accuracy::run(args, task, ui),
        None => perplexity::run(args, ui),
    }
}

/// Refuses the flags of the other kind of task.
fn refuse(task: &str, given: &[(&str, bool)], hint: &str) -> Result<(), Failure> {
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => {
            Err(Failure::usage(format!("{flag} does not apply to the task `{task}`")).hint(hint))
        }
        None => Ok(()),
    }
}

/// The names of all tasks, for advice.
fn known() -> String {
    let names: Vec<&str> = TASKS.iter().map(|t| t.name).collect();
    format!("tasks: {WIKITEXT2}, {}; or a text, jsonl, parquet or arrow file", names.join(", "))
}

/// A data set of the hub: where it is below a folder of data sets, and below what ships with the repository.
struct Place<'a> {
    task: &'a str,
    folders: &'a [&'a str],
    split: Split,
    shipped: &'a str,
}

impl Place<'_> {
    /// Where the data set is: below what was given, else below the folder of the environment, else what ships.
    fn locate(&self, given: Option<&Path>) -> Result<PathBuf, Failure> {
        let below = |root: &Path| {
            if root.is_file() {
                return Some(root.to_owned());
            }
            let mut places = self.folders.iter().copied().chain([""]).map(|f| root.join(f));
            places.find(|p| available_splits(p).contains(&self.split))
        };
        if let Some(root) = given {
            let Place { split, folders, .. } = self;
            return below(root).ok_or_else(|| {
                let what = format!("{}: there is no {split} split of {}", root.display(), folders[0]);
                Failure::new(FAILURE, what).hint("give its folder, or the one that holds it, with --data")
            });
        }
        let environment = settings::data_folder().and_then(|root| below(&root));
        environment.or_else(|| settings::shipped(self.shipped)).ok_or_else(|| {
            Failure::usage(format!("the data set of `{}` is not known", self.task)).hint(format!(
                "give its folder ({}) with --data, or set {} to where data sets are",
                self.folders[0],
                settings::DATA_VARIABLE
            ))
        })
    }
}
