//! The one error type of this crate.  Each message names the thing, what was expected, what came, and what to do.

use crate::config::Problem;
use std::path::PathBuf;

/// What can go wrong with configurations, tokenisers and data.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Nothing to train on.
    #[error("{path}: the file is empty; give a file with text in it", path = path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
    },
    /// A file or folder could not be read.
    #[error("{path}: cannot be read ({source}); check that the path exists and is readable", path = path.display())]
    Read {
        /// What was opened.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A configuration is not JSON.
    #[error(
        "{origin}: not valid JSON ({source}); expected a config.json: one object with keys such as \"hidden_size\""
    )]
    Json {
        /// The file, or where the text came from.
        origin: String,
        /// Position and reason.
        source: serde_json::Error,
    },
    /// A configuration contradicts itself; every problem is listed.
    #[error("{origin}: {} problem{} in the configuration{}", problems.len(), if problems.len() == 1 { "" } else { "s" }, list(problems))]
    Config {
        /// The file, or where the text came from.
        origin: String,
        /// All that is wrong, in the order of the keys.
        problems: Vec<Problem>,
    },
    /// No preset has this name.
    #[error("no preset is called {name:?}{}; the presets are: {known}", suggestion.map(|s| format!(" (did you mean {s:?}?)")).unwrap_or_default())]
    UnknownPreset {
        /// The name that was asked for.
        name: String,
        /// The nearest known name, if one is near.
        suggestion: Option<&'static str>,
        /// All names.
        known: String,
    },
    /// A tokenizer.json cannot be used.
    #[error("{origin}: the tokenizer {action} ({reason}); expected a tokenizer.json of the tokenizers library")]
    Tokenizer {
        /// The tokenizer's file.
        origin: String,
        /// What failed: "cannot be loaded", …
        action: &'static str,
        /// The library's reason.
        reason: String,
    },
    /// The tokenizer can produce ids that the model has no embedding for.
    #[error(
        "{origin}: the tokenizer has ids up to {max_id} but the model's vocab_size is {vocab_size}; \
         use the tokenizer that belongs to the model, or a model with vocab_size >= {}", max_id + 1
    )]
    TokenizerTooLarge {
        /// The tokenizer.
        origin: String,
        /// The largest id it can produce.
        max_id: usize,
        /// Ids that the model knows.
        vocab_size: usize,
    },
    /// A token id cannot be decoded.
    #[error("{origin}: token id {id} is outside the tokenizer's {size} ids; do model and tokenizer belong together?")]
    TokenId {
        /// The tokenizer.
        origin: String,
        /// The id that came.
        id: i64,
        /// Ids that the tokenizer knows.
        size: usize,
    },
    /// Text data that a tokenizer.json cannot read.
    #[error(
        "{path}: not UTF-8 at byte {at}; a tokenizer.json needs UTF-8 text: convert the file, \
         or train on bytes (leave the tokenizer out)", path = path.display()
    )]
    NotUtf8 {
        /// The text.
        path: PathBuf,
        /// Offset of the first bad byte.
        at: usize,
    },
    /// Text data with fewer tokens than one training row.
    #[error(
        "{path}: the {split} part has {have} tokens, but one row of length {len} needs {}; \
         use a longer text or a shorter length", len.saturating_add(1), path = path.display()
    )]
    TextTooShort {
        /// The text.
        path: PathBuf,
        /// "training" or "validation".
        split: &'static str,
        /// Tokens in that part.
        have: usize,
        /// Tokens asked for per row.
        len: usize,
    },
    /// A task cannot make rows of this length.
    #[error("{task}: a row of {len} tokens is too short, it needs at least {min}; use a longer length")]
    RowTooShort {
        /// The task.
        task: &'static str,
        /// Tokens asked for.
        len: usize,
        /// Tokens needed.
        min: usize,
    },
    /// A batch of absurd size.
    #[error("{task}: a batch of {n} rows of {len} tokens does not fit in memory; use fewer or shorter rows")]
    BatchTooLarge {
        /// The task.
        task: &'static str,
        /// Rows asked for.
        n: usize,
        /// Tokens per row.
        len: usize,
    },
    /// A setting of a task is out of range.
    #[error("{task}: {setting} = {value} is out of range, expected {expected}")]
    Setting {
        /// The task.
        task: &'static str,
        /// The setting's name.
        setting: &'static str,
        /// What came.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("\n  - {p}")).collect()
}
