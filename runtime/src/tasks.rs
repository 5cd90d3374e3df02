//! Tasks with an answer: questions, the answers that are right, and what a generated text answers.
//!
//! A question goes through the model's chat template as one user message; the answer is the content of the last
//! `\boxed{}` of the text. Answers are compared as numbers, or as LaTeX after harmless spelling is taken away. No
//! algebra is done: an answer in another form than the data set's counts as wrong.

mod answer;

use std::path::Path;

use crate::text::{ReadOptions, Split, TextError, read_fields};

pub use answer::{boxed, normal, number};

/// Where the right answer stands, and how it is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gold {
    /// Behind the last `####` of a column; equal as numbers.
    Hashes(&'static str),
    /// A column; equal as numbers, or as text in normal form.
    Column(&'static str),
}

/// A task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Task {
    /// What it is called.
    pub name: &'static str,
    /// Where it is below a folder of data sets.
    pub folders: &'static [&'static str],
    /// The split that is asked.
    pub split: Split,
    /// The column with the question.
    pub question: &'static str,
    /// The right answer.
    pub gold: Gold,
    /// New tokens when nothing else is said.
    pub max_new: usize,
}

/// All tasks with an answer.
pub const TASKS: [Task; 6] = [
    Task {
        name: "chain-arith",
        folders: &["chain-arith/main", "chain-arith"],
        split: Split::Test,
        question: "question",
        gold: Gold::Hashes("answer"),
        max_new: 110,
    },
    Task {
        name: "gsm8k",
        folders: &["gsm8k/main", "gsm8k"],
        split: Split::Test,
        question: "question",
        gold: Gold::Hashes("answer"),
        max_new: 1024,
    },
    Task {
        name: "math-500",
        folders: &["MATH-500"],
        split: Split::Test,
        question: "problem",
        gold: Gold::Column("answer"),
        max_new: 32768,
    },
    Task {
        name: "aime-90",
        folders: &["AIME90"],
        split: Split::Train,
        question: "problem",
        gold: Gold::Column("answer"),
        max_new: 32768,
    },
    Task {
        name: "aime-2024",
        folders: &["aime_2024"],
        split: Split::Train,
        question: "problem",
        gold: Gold::Column("answer"),
        max_new: 32768,
    },
    Task {
        name: "aime-2025",
        folders: &["aime_2025"],
        split: Split::Train,
        question: "problem",
        gold: Gold::Column("answer"),
        max_new: 32768,
    },
];

/// What every question ends with.
const INSTRUCTION: &str = "\n\nPlease reason step by step, and put your final answer within \\boxed{}.";

/// A question with its right answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// The question alone.
    pub text: String,
    /// The right answer.
    pub gold: String,
}

impl Question {
    /// The message to the model.
    pub fn prompt(&self) -> String {
        format!("{}{INSTRUCTION}", self.text)
    }
}

impl Task {
    /// The task of this name.
    pub fn find(name: &str) -> Option<&'static Task> {
        TASKS.iter().find(|t| t.name == name)
    }

    /// The questions of a file or folder, at most `limit`, in the order of the files.
    ///
    /// # Errors
    /// If a file cannot be read, lacks a column, or a row has no right answer.
    pub fn questions(&self, path: &Path, limit: Option<usize>) -> Result<Vec<Question>, TextError> {
        let (Gold::Hashes(gold) | Gold::Column(gold)) = self.gold;
        let mut options = ReadOptions::new(self.split);
        options.max_rows = limit;
        let fields = read_fields(path, &options, &[self.question, gold])?;
        let question = |(i, row): (usize, Vec<String>)| {
            let [text, gold] = <[String; 2]>::try_from(row).unwrap_or_default();
            let found = match self.gold {
                Gold::Column(_) => Some(gold.trim().to_owned()).filter(|g| !g.is_empty()),
                Gold::Hashes(_) => hashes(&gold),
            };
            let Some(gold) = found else {
                let wanted = match self.gold {
                    Gold::Column(c) => format!("its `{c}` is empty"),
                    Gold::Hashes(c) => format!("its `{c}` does not end in `#### ` and a number"),
                };
                let what = format!("row {} has no right answer: {wanted}", i + 1);
                return Err(TextError::at(
                    path,
                    what,
                    format!("give the data set of the task {}", self.name),
                ));
            };
            Ok(Question { text, gold })
        };
        fields.rows.into_iter().enumerate().map(question).collect()
    }

    /// Whether an answer is the right one.
    pub fn is_right(&self, answer: &str, gold: &str) -> bool {
        let same_number = matches!((number(answer), number(gold)), (Some(a), Some(b)) if a == b);
        match self.gold {
            Gold::Hashes(_) => same_number,
            Gold::Column(_) => same_number || normal(answer) == normal(gold),
        }
    }
}

/// The number behind the last `####`.
fn hashes(text: &str) -> Option<String> {
    let (_, gold) = text.rsplit_once("####")?;
    let gold = gold.trim();
    number(gold).is_some().then(|| gold.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn questions(rows: &str) -> Result<Vec<Question>, TextError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.jsonl");
        std::fs::write(&path, rows).unwrap();
        TASKS[0].questions(dir.path(), Some(2))
    }

    #[test]
    fn names_are_found() {
        assert!(TASKS.iter().all(|t| Task::find(t.name) == Some(t)));
        assert_eq!(Task::find("gsm9k"), None);
    }

    #[test]
    fn questions_with_their_numbers() {
        let rows = "{\"question\":\"q\",\"answer\":\"1 #### 2\\n#### 1,234 \"}\n".repeat(3);
        let got = questions(&rows).unwrap();
        assert_eq!((got.len(), got[1].gold.as_str()), (2, "1,234"));
        assert!(got[0].prompt().starts_with("q\n\nPlease reason") && got[0].prompt().ends_with("\\boxed{}."));
        for (rows, words) in [
            ("{\"question\":\"q\",\"answer\":\"12\"}", "row 1 has no right answer"),
            ("{\"question\":\"q\",\"answer\":\"#### twelve\"}", "does not end in `#### `"),
            ("{\"question\":\"q\",\"gold\":\"#### 1\"}", "no column `answer`"),
            ("{\"question\":null,\"answer\":\"#### 1\"}", "`question` holds null"),
            ("\"q\"", "neither an object"),
            ("", "no rows"),
            ("{\"question\":", "after 0 good rows"),
        ] {
            let err = questions(rows).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        }
    }

    #[test]
    fn right_and_wrong() {
        let numbers = Task::find("gsm8k").unwrap();
        for (answer, gold) in [
            ("033", "33"),
            ("1,234", "1234"),
            ("\\$18.00", "18"),
            ("-0", "0"),
            ("5\\text{ eggs}", "5"),
            ("7.", "7"),
        ] {
            assert!(numbers.is_right(answer, gold), "{answer}");
        }
        for (answer, gold) in
            [("34", "33"), ("", "33"), ("x", "x"), ("3 3", "33"), ("12", "1,2"), ("-5", "5")]
        {
            assert!(!numbers.is_right(answer, gold), "{answer}");
        }
        let latex = Task::find("math-500").unwrap();
        for (answer, gold) in [
            ("\\dfrac{1}{2}", "\\frac{1}{2}"),
            ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
            ("\\text{Evelyn}", "Evelyn"),
            ("090^\\circ", "90"),
            ("70.0", "70"),
            ("x^2+1.", "x^2 + 1"),
        ] {
            assert!(latex.is_right(answer, gold), "{answer}");
        }
        assert!(!latex.is_right("\\frac{1}{2}", "0.5") && !latex.is_right("ab", "b"));
    }
}
