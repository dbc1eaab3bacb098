//! What can be wrong with a PTX file or a launch before anything runs.  What a kernel does wrong while it runs is a
//! [`Finding`], not an error.

use crate::check::Finding;

/// A place in a PTX file that can't be read or that the simulator doesn't know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct PtxError {
    /// Counted from 1.
    pub line: u32,
    pub message: String,
}

impl PtxError {
    pub(crate) fn new(line: u32, message: impl Into<String>) -> PtxError {
        PtxError { line, message: message.into() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All that was found wrong, in order of lines.
    #[error("{}", list(.0))]
    Ptx(Vec<PtxError>),
    #[error("there is no kernel \"{name}\" in the module; it has {}", or_none(.have))]
    NoKernel { name: String, have: Vec<String> },
    #[error("kernel {kernel} takes {want} parameters, {got} were given: {signature}")]
    ParamCount { kernel: String, want: usize, got: usize, signature: String },
    #[error("parameter {index} of {kernel} is {want} bytes wide, {got} were given")]
    ParamSize { kernel: String, index: usize, want: usize, got: usize },
    #[error("argument {index} of {kernel}: {what}")]
    Argument { kernel: String, index: usize, what: String },
    #[error("a launch of {kernel} can't have {what}")]
    Launch { kernel: String, what: String },
    #[error("buffer \"{name}\" can't be made: {what}")]
    Buffer { name: String, what: String },
    #[error("buffer \"{buffer}\", {kind}: {what}")]
    Product { buffer: String, kind: &'static str, what: String },
    #[error("{0}")]
    Unknown(String),
    /// Only of a simulator that is strict.
    #[error("kernel {kernel} is wrong in {} of its places, first: {}", .findings.len(), .findings[0])]
    Findings { kernel: String, findings: Vec<Finding> },
}

impl From<Error> for rambac_driver::Error {
    fn from(e: Error) -> Self {
        rambac_driver::Error::Refused(Box::new(e))
    }
}

impl From<PtxError> for Error {
    fn from(e: PtxError) -> Error {
        Error::Ptx(vec![e])
    }
}

fn list(all: &[PtxError]) -> String {
    let shown = 12;
    let mut lines: Vec<String> = all.iter().take(shown).map(ToString::to_string).collect();
    if all.len() > shown {
        lines.push(format!("and {} more", all.len() - shown));
    }
    lines.join("\n")
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
