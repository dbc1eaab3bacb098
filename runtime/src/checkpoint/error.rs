//! What can go wrong with weights and checkpoints.  Each message names the file, what was expected, what came, and
//! what to do.

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// What can go wrong with weights and checkpoints.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The system refused a file operation.
    #[error("{path}: cannot {action} ({source}){}", hint(source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// "open it", "write it", …
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A safetensors file ends too early.
    #[error(
        "{path}: truncated: {expected} bytes expected by its header, {found} found; copy or download it again",
        path = path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A safetensors header that cannot be trusted.
    #[error("{path}: not a valid safetensors file: {reason}; copy, download or convert it again", path = path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that is not there.
    #[error("{path}: no tensor {name:?} among its {count}", path = path.display())]
    NoTensor {
        /// The file or folder.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// Tensors that there are.
        count: usize,
    },
    /// A tensor of a type that cannot be read as asked.
    #[error("{path}: tensor {name:?} is {found}, expected {expected}", path = path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type, and where a value is at fault, the value.
        found: String,
        /// Types that can be read.
        expected: &'static str,
    },
    /// PyTorch's pickled weights, which can run code when opened.
    #[error(
        "{path}: a pickled PyTorch file is not opened, because that can run code; convert it once where you trust it:\n  \
         python -c \"import sys, torch; from safetensors.torch import save_file; \
         sd = torch.load(sys.argv[1], map_location='cpu', weights_only=True); \
         save_file({{k: v.clone().contiguous() for k, v in sd.items()}}, sys.argv[2], metadata={{'format': 'pt'}})\" \
         {path} {target}", path = path.display(), target = path.with_file_name("model.safetensors").display()
    )]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// A folder without weights.
    #[error(
        "{path}: no weights here; expected model.safetensors, or model.safetensors.index.json with its shards",
        path = path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A JSON file beside the weights that cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Weights that are not those of the model; every difference is listed.
    #[error("{path}: the weights do not fit the model, {} problem{}:{}", problems.len(), plural(problems.len()), list(problems), path = path.display())]
    Mismatch {
        /// The file or folder.
        path: PathBuf,
        /// All differences.
        problems: Vec<Mismatch>,
    },
    /// No checkpoint could be found.
    #[error("{path}: no whole checkpoint here{}; expected step-* folders as `rambac train --out` writes them", reasons(broken), path = path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
        /// Why the candidates were refused.
        broken: Vec<String>,
    },
    /// Another process writes checkpoints into the folder.
    #[error("{path}: another process is writing checkpoints here; wait for it, stop it, or choose another folder", path = path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// Something to be saved that would not load again.
    #[error("checkpoint: {what}")]
    Unsavable {
        /// What, what was expected and what came.
        what: String,
    },
}

/// One difference between weights and model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The model has it, the file does not.
    Missing {
        /// The tensor.
        name: String,
        /// Its shape in the model.
        expected: Vec<usize>,
    },
    /// The file has it, the model does not.
    Unexpected {
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// Both have it in different shapes.
    Shape {
        /// The tensor.
        name: String,
        /// Its shape in the model.
        expected: Vec<usize>,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// Two names in the file mean the same tensor.
    Twice {
        /// The tensor.
        name: String,
        /// Both names in the file.
        found: [String; 2],
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Missing { name, expected } => write!(f, "missing: {name} {expected:?}"),
            Mismatch::Unexpected { name, found } => write!(f, "unexpected: {name} {found:?}"),
            Mismatch::Shape { name, expected, found } => {
                write!(f, "shape of {name}: expected {expected:?}, found {found:?}")
            }
            Mismatch::Twice { name, found: [a, b] } => write!(f, "{name} comes twice, as {a} and as {b}"),
        }
    }
}

impl CheckpointError {
    /// Wraps an error of the system on `path`.
    pub(crate) fn io(path: impl AsRef<Path>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| CheckpointError::Io { path, action, source }
    }

    pub(super) fn header(path: &Path, reason: impl Into<String>) -> Self {
        CheckpointError::Header { path: path.into(), reason: reason.into() }
    }
}

/// What the user can do about an error of the system.
fn hint(e: &io::Error) -> &'static str {
    match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free some space or keep fewer checkpoints: those already written are whole and untouched"
        }
        ErrorKind::FileTooLarge => {
            "; the file system or a limit (ulimit -f) forbids files of this size: checkpoints already written are untouched"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "; choose a folder you may write to, or change its permissions"
        }
        ErrorKind::NotFound => "; check that the path is right",
        ErrorKind::NotADirectory => "; a part of the path is a file, not a folder",
        _ => "",
    }
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

fn list(problems: &[Mismatch]) -> String {
    problems.iter().map(|p| format!("\n  - {p}")).collect()
}

fn reasons(broken: &[String]) -> String {
    if broken.is_empty() { String::new() } else { format!(" (refused: {})", broken.join("; ")) }
}
