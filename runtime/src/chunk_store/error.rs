//! What can go wrong with a chunk store.

use crate::checkpoint::CheckpointError;
use std::io;
use std::path::{Path, PathBuf};

/// Each message names the file, what came, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: cannot {action} ({source}){}", hint(source), path = path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error(
        "{path}: is there already; name another file or remove it first (generate goes on with what it left by \
         --resume-store)", path = path.display()
    )]
    Exists { path: PathBuf },
    #[error("{path}: another process works with this store; wait for it, stop it, or name another file", path = path.display())]
    Locked { path: PathBuf },
    #[error("{path}: is no chunk store (or one of another version of rambac)", path = path.display())]
    NoStore { path: PathBuf },
    #[error("{path}: was made by another model: it holds {found}, this model wants {expected}", path = path.display())]
    Geometry { path: PathBuf, found: String, expected: String },
    #[error("{path}: holds {found}, not {wanted}: give --store-dtype {found}", path = path.display())]
    Precision { path: PathBuf, found: &'static str, wanted: &'static str },
    #[error(
        "{path}: was made with other weights; use the checkpoint, and the --weights, that it was made with", path = path.display()
    )]
    Weights { path: PathBuf },
    #[error(
        "{path}: torn: {chunks} chunks take {expected} bytes, the file has {found}; it was cut or is still being \
         copied.  Nothing was changed; copy it again or start a new one", path = path.display()
    )]
    Torn { path: PathBuf, chunks: usize, expected: u64, found: u64 },
    #[error(
        "{path}: damaged: its contents are not what was stored.  Nothing was changed; copy it again or start a new one", path = path.display()
    )]
    Damaged { path: PathBuf },
    #[error("{path}: {reason}", path = path.display())]
    State { path: PathBuf, reason: String },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

fn hint(e: &io::Error) -> &'static str {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space or name a file on another disk: what was stored before is whole"
        }
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::UnexpectedEof => "; the file became shorter while it was in use",
        _ => "",
    }
}

impl StoreError {
    /// For `map_err`.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.into();
        move |source| StoreError::Io { path, action, source }
    }
}
