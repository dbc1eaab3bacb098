//! What is wrong with a text or a graph, where, and what to do: made by the parser, the verifier and the linter.
//!
//! Plain data: the command renders it with colours; [`render`] is the plain rendering for tests and logs.

use crate::graph::{Loc, NodeId};
use std::fmt;
use std::ops::Range;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    Warning,
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Severity::Warning => "warning",
            Severity::Error => "error",
        })
    }
}

/// One finding.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    pub severity: Severity,
    pub message: String,
    /// Bytes of the parsed text, where there is one; always inside it.
    pub span: Option<Range<usize>>,
    /// The node it is about; `None` for findings about the text or the whole graph.
    pub node: Option<NodeId>,
    pub loc: Loc,
    /// What to do.
    pub help: Option<String>,
}

impl Diagnostic {
    pub fn error(message: impl Into<String>) -> Self {
        let (severity, message) = (Severity::Error, message.into());
        Self { severity, message, span: None, node: None, loc: Loc::Unknown, help: None }
    }
    pub fn warning(message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(message) }
    }
    /// At bytes of the text.
    pub fn at(self, span: Range<usize>) -> Self {
        Self { loc: Loc::Text(span.clone()), span: Some(span), ..self }
    }
    /// About a node made at `loc`.
    pub fn on(self, node: NodeId, loc: &Loc) -> Self {
        let span = if let Loc::Text(r) = loc { Some(r.clone()) } else { None };
        Self { node: Some(node), loc: loc.clone(), span, ..self }
    }
    pub fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.message)?;
        if !matches!(self.loc, Loc::Unknown) {
            write!(f, " (at {})", self.loc)?;
        }
        match &self.help {
            Some(h) => write!(f, "; {h}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Diagnostic {}

/// All findings as plain text, each with its line of `src` underlined where it has a span.
pub fn render(diagnostics: &[Diagnostic], src: &str) -> String {
    let mut out = String::new();
    for d in diagnostics {
        out += &format!("{}: {}\n", d.severity, d.message);
        match (&d.span, &d.loc) {
            (Some(span), _) if span.end <= src.len() && src.is_char_boundary(span.start) => {
                let start = src[..span.start].rfind('\n').map_or(0, |i| i + 1);
                let line = src[start..].split('\n').next().unwrap_or_default();
                let number = src[..start].matches('\n').count() + 1;
                let before = src[start..span.start].chars().count();
                let marked =
                    src.get(span.clone()).map_or(1, |s| s.split('\n').next().unwrap_or_default().chars().count());
                out += &format!("{number:4} | {line}\n     | {}{}\n", " ".repeat(before), "^".repeat(marked.max(1)));
            }
            (None, Loc::Caller(_)) => out += &format!("     at {}\n", d.loc),
            _ => {}
        }
        if let Some(h) = &d.help {
            out += &format!("     = {h}\n");
        }
    }
    out
}

/// The candidate most like `name`, if one is near enough to be meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Long names only come from broken input; their distance isn't worth its time.
    let len = name.chars().count();
    let limit = if len > 64 { 0 } else { (len / 3).max(1) };
    candidates
        .into_iter()
        .filter(|c| c.chars().count().abs_diff(len) <= limit)
        .map(|c| (if name.eq_ignore_ascii_case(c) { 0 } else { distance(name, c) }, c))
        .filter(|&(d, c)| d <= limit && d < c.chars().count())
        .min()
        .map(|(_, c)| c)
}

/// Edits (insert, delete, replace, swap neighbours) from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let up = &rows[i - 1];
            let mut d = (up[j] + 1).min(row[j - 1] + 1).min(up[j - 1] + (a[i - 1] != b[j - 1]) as usize);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                d = d.min(rows[i - 2][j - 2] + 1);
            }
            row.push(d);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}
