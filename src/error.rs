//! Errors of the command, rendered by miette.

use miette::{Diagnostic, LabeledSpan, NamedSource, Report, Severity};
use rambac_ir::diagnostic;
use std::path::PathBuf;

/// What a verb returns.
pub type Result<T> = std::result::Result<T, Report>;

/// Anything the crates below refuse, as a report with their message.
pub fn wrap(e: impl std::error::Error + Send + Sync + 'static) -> Report {
    // Messages already say where and what to do; chains would repeat them.
    Report::msg(e.to_string())
}

/// A finding of the parser or the verifier with its source text.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Finding {
    message: String,
    help: Option<String>,
    severity: Severity,
    span: Option<std::ops::Range<usize>>,
    text: NamedSource<String>,
}

impl Diagnostic for Finding {
    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }
    fn help<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        self.help.as_ref().map(|h| Box::new(h) as _)
    }
    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.span.as_ref().map(|_| &self.text as _)
    }
    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let span = self.span.clone()?;
        Some(Box::new(std::iter::once(LabeledSpan::underline(span))))
    }
}

/// Every finding of a file.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {count} {noun}", path = path.display(), count = findings.len(),
        noun = if findings.len() == 1 { "error" } else { "errors" })]
pub struct Findings {
    path: PathBuf,
    findings: Vec<Finding>,
}

impl Diagnostic for Findings {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.findings.iter().map(|f| f as &dyn Diagnostic)))
    }
}

/// The findings of `path`, whose text is `text`.
pub fn findings(path: &std::path::Path, text: &str, all: Vec<diagnostic::Diagnostic>) -> Report {
    let finding = |d: diagnostic::Diagnostic| Finding {
        message: d.message,
        help: d.help,
        severity: match d.severity {
            diagnostic::Severity::Warning => Severity::Warning,
            diagnostic::Severity::Error => Severity::Error,
        },
        span: d.span,
        text: NamedSource::new(path.display().to_string(), text.to_string()),
    };
    Report::new(Findings { path: path.into(), findings: all.into_iter().map(finding).collect() })
}

/// Prints an error to standard error.
pub fn report(e: Report) {
    eprintln!("{e:?}");
}

/// Prints a warning to standard error.
pub fn warn(message: impl std::fmt::Display) {
    eprintln!("warning: {message}");
}
