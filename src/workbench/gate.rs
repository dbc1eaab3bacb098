//! What is asked of an attention before a model with it is trained or compiled: those questions of `try` that cost next to
//! nothing.  What sees the future is refused; what merely learns nothing, or chooses oddly, is told.

use super::checks;
use crate::error::{self, Result, warn};
use miette::miette;
use rambac_ir::{Diagnostic, Severity, verify};
use rambac_models::Config;
use rambac_models::variants::{Fragment, Sizes};
use rambac_passes::probe::{self, ProbeError};
use std::path::Path;

/// What will be done with the attention.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    /// Whether it is trained.
    pub trained: bool,
    /// Tokens of the longest rows, where they are known.
    pub len: Option<usize>,
    /// Whether to go on whatever is found.
    pub anyway: bool,
}

/// Asks of the attention of `config`, whose text is in the file `path`, and tells what is found.
///
/// # Errors
/// The future comes in, sequences mix, or NaN comes out, and `how` does not say to go on anyway.
pub fn pass(path: &Path, config: &Config, how: Use) -> Result<()> {
    let Some(a) = &config.attention else { return Ok(()) };
    let sizes = Sizes::of(config);
    let told = |e| error::findings(path, &a.text, e);
    let own = Fragment::at(&a.text, &sizes, &[]).map_err(told)?;
    // Whether it is right does not depend on how wide heads are, nor on how many share one.
    let small = Fragment::at(&a.text, &smaller(sizes), &[]);
    let mut found = match asked(small.as_ref().unwrap_or(&own), how.trained) {
        Ok(found) => found,
        Err(e) => {
            warn(format!("{}: what it computes was not looked at: {e}", path.display()));
            vec![]
        }
    };
    let many = how.len.map_or(vec![], |len| checks::too_many(&own.graph, len));
    found.extend(many.into_iter().map(|d| Diagnostic { severity: Severity::Warning, ..d }));
    if found.is_empty() {
        return Ok(());
    }
    found.sort_by_key(|d| d.severity != Severity::Error);
    let wrong = found.iter().any(|d| d.severity == Severity::Error);
    error::report(told(found));
    if wrong && !how.anyway {
        let what = if how.trained { "trained" } else { "compiled" };
        return Err(miette!(
            help = format!("`rambac try {} --no-train` asks more; with --anyway this goes on as it is", path.display()),
            "{} is not {what}: first put right what is wrong",
            path.display()
        ));
    }
    Ok(())
}

/// Tells what is found of a graph in text form, if it has the inputs and outputs of an attention; nothing is refused.
pub fn tell(path: &Path, text: &str, trained: bool) {
    let Ok(f) = Fragment::read(text, &[]) else { return };
    let small = Fragment::at(text, &smaller(super::sizes(&f)), &[]);
    let found = asked(small.as_ref().unwrap_or(&f), trained).unwrap_or_default();
    if !found.is_empty() {
        let warning = |d: Diagnostic| Diagnostic { severity: Severity::Warning, ..d };
        error::report(error::findings(path, text, found.into_iter().map(warning).collect()));
    }
}

fn smaller(s: Sizes) -> Sizes {
    let kv_heads = s.kv_heads.min(2);
    let (heads, dim) = (kv_heads * (s.heads / s.kv_heads.max(1)).clamp(1, 2), s.dim.min(16));
    Sizes { heads, kv_heads, dim, width: heads * dim, ..s }
}

/// The findings; errors are what no training and no inference can do with.
fn asked(f: &Fragment, trained: bool) -> std::result::Result<Vec<Diagnostic>, ProbeError> {
    let (g, seed) = (&f.graph, 7);
    let l = super::check_len(super::unit(g));
    let warning = |d: Diagnostic| Diagnostic { severity: Severity::Warning, ..d };
    let mut out = if trained { verify::lint(g) } else { verify::lint_untrained(g) };
    if let Some(bad) = probe::finite(g, l, seed)? {
        out.push(bad);
        return Ok(out);
    }
    let ahead = probe::causality(g, l, seed)?;
    if ahead.is_empty() {
        out.extend(probe::any_length(g, l, seed)?.map(warning));
    }
    out.extend(ahead);
    out.extend(probe::sequences_apart(g, l, seed)?);
    out.extend(probe::heads_together(g, l, seed)?.into_iter().map(warning));
    if trained {
        out.extend(probe::unreached(g, l, seed)?.into_iter().map(warning));
    }
    Ok(out)
}
