//! Errors of the command, rendered by miette.

use miette::{Diagnostic, LabeledSpan, NamedSource, Report, Severity, miette};
use rambac_codegen::FitError;
use rambac_ir::{Sym, diagnostic};
use rambac_runtime::TrainError;
use std::fmt;
use std::path::PathBuf;

/// What a verb returns.
pub type Result<T> = std::result::Result<T, Report>;

/// Anything the crates below refuse, as a report with their message.
pub fn wrap(e: impl std::error::Error + Send + Sync + 'static) -> Report {
    Report::msg(chained(&e))
}

/// An error and its causes in one line; most messages hold those of their causes already.
fn chained(e: &(dyn std::error::Error + 'static)) -> String {
    joined(std::iter::successors(Some(e), |c| c.source()).map(ToString::to_string))
}

fn joined(causes: impl Iterator<Item = String>) -> String {
    causes.fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        t if t.contains(&cause) => text,
        t => format!("{t}: {cause}"),
    })
}

/// All that a report says, in one line: its causes and what helps.
pub fn told(e: &Report) -> String {
    let text = joined(e.chain().map(ToString::to_string));
    match e.help() {
        Some(help) => format!("{text}; {help}"),
        None => text,
    }
}

/// A limit of memory that cannot be met, with what would help; other errors as [`wrap`].
pub fn unfit(e: FitError) -> Report {
    let FitError::TooSmall { ref dims, limit, least, arena, .. } = e else { return wrap(e) };
    let fixed = least - arena;
    let size = |sym: &str| dims.get(&Sym::new(sym));
    let help = match (size("N"), size("L")) {
        _ if limit <= fixed => "weights, optimiser and inputs alone are more than that: use a smaller model".into(),
        (Some(n), Some(l)) => {
            // Activations grow with the number of tokens; rounded down to whole chunks of any size in use.
            let part = (limit - fixed) as f64 / arena as f64;
            let len = (l as f64 * part) as usize / 64 * 64;
            let rows = (n as f64 * part) as usize;
            let batch = if rows > 0 { format!("--batch {rows}, or ") } else { String::new() };
            let len = if len > 0 { format!("about --len {len}") } else { "a shorter --len".into() };
            format!("use {batch}{len}, or --memory-limit {}M", least.div_ceil(1 << 20))
        }
        _ => format!("use smaller sizes, or --memory-limit {}M", least.div_ceil(1 << 20)),
    };
    miette!(help = help, "{e}")
}

/// What a trainer refuses.
pub fn train(e: TrainError) -> Report {
    match e {
        TrainError::Fit(e) => unfit(e),
        e => wrap(e),
    }
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
#[derive(Debug)]
struct Findings {
    path: PathBuf,
    findings: Vec<Finding>,
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let errors = self.findings.iter().filter(|d| d.severity == Severity::Error).count();
        let warnings = self.findings.len() - errors;
        let each = [(errors, "error"), (warnings, "warning")].into_iter().filter(|(n, _)| *n > 0);
        let counts: Vec<String> = each.map(|(n, noun)| crate::show::plural(n, noun)).collect();
        write!(f, "{}: {}", self.path.display(), counts.join(", "))
    }
}

impl std::error::Error for Findings {}

impl Diagnostic for Findings {
    fn severity(&self) -> Option<Severity> {
        self.findings.iter().map(|d| d.severity).max()
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

/// A report as it is shown: of a file's findings how many there are, then each.
pub fn parts(e: Report) -> Vec<Report> {
    match e.downcast::<Findings>() {
        Ok(all) => {
            let (head, severity) = (all.to_string(), all.severity().unwrap_or(Severity::Error));
            let each = all.findings.into_iter().map(Report::new);
            std::iter::once(miette!(severity = severity, "{head}")).chain(each).collect()
        }
        Err(e) => vec![e],
    }
}

/// Prints an error to standard error, its [`parts`] one below the other.
pub fn report(e: Report) {
    parts(e).iter().for_each(|e| eprintln!("{e:?}"));
}

/// Prints a warning to standard error.
pub fn warn(message: impl std::fmt::Display) {
    eprintln!("warning: {message}");
}
