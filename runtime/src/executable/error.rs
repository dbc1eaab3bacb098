//! Why an executable can't be written or loaded.

use crate::checkpoint::CheckpointError;
use rambac_codegen::cuda::EmitError;
use rambac_ir::Diagnostic;
use std::path::{Path, PathBuf};

/// See the module's comment.
#[derive(Debug, thiserror::Error)]
pub enum ExecutableError {
    #[error(transparent)]
    File(#[from] CheckpointError),
    #[error(transparent)]
    Emit(#[from] EmitError),
    #[error("{path}: {what}: this is no executable; make one with: rambac compile MODEL -o FILE", path = path.display())]
    NotOne { path: PathBuf, what: String },
    #[error(
        "{path}: an executable of form {found}, made by {compiler}; this version reads form {reads}: compile it again",
        path = path.display(), reads = super::VERSION
    )]
    Version { path: PathBuf, found: String, compiler: String },
    #[error("{path}: damaged: {what}; copy it again, or compile it again", path = path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{path}: the graph of part {part:?} is not well-formed: {errors}; compile it again", path = path.display())]
    Ir { path: PathBuf, part: String, errors: String },
    #[error(
        "{path}: what {compiler} made of it is not what this version makes: {what} at {at}; compile it again",
        path = path.display()
    )]
    Differs { path: PathBuf, compiler: String, what: String, at: String },
    #[error(
        "{path}: there is no code for {wanted} in it, only for {have}; compile it with --target {wanted}",
        path = path.display()
    )]
    NoTarget { path: PathBuf, wanted: String, have: String },
    #[error("part {part:?} has no text form that reads as itself: {errors}")]
    Text { part: String, errors: String },
    #[error("{what}")]
    Unsavable { what: String },
}

fn first(errors: &[Diagnostic]) -> String {
    let rest = if errors.len() > 1 { format!(" (and {} more)", errors.len() - 1) } else { String::new() };
    errors.first().map(|e| e.message.clone()).unwrap_or_default() + &rest
}

impl ExecutableError {
    pub(super) fn unprintable(part: &str, errors: &[Diagnostic]) -> Self {
        ExecutableError::Text { part: part.into(), errors: first(errors) }
    }
    pub(super) fn ir(path: &Path, part: &str, errors: &[Diagnostic]) -> Self {
        ExecutableError::Ir { path: path.into(), part: part.into(), errors: first(errors) }
    }
    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        ExecutableError::Damaged { path: path.into(), what: what.into() }
    }
}
