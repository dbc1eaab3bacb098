//! The work of a program's steps, by kind of op, by part of a training step and by layer.

use rambac_codegen::program::Step;
use rambac_ir::Cost;
use rambac_ir::ops::Op;

/// What people call a step: its op, or `copy` for a reshape that could not be a view.
pub fn kind(step: &Step) -> &'static str {
    if matches!(step.op, Op::Reshape(_)) { "copy" } else { step.op.mnemonic() }
}

/// `rest` of a scope `part.rest`; an empty rest for `part` itself.
fn inside<'s>(scope: Option<&'s str>, part: &str) -> Option<&'s str> {
    let rest = scope?.strip_prefix(part)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('.') }
}

/// Which part of a training step a scope belongs to.
pub fn phase(scope: Option<&str>) -> &'static str {
    match scope {
        s if inside(s, "grad").is_some() => "backward",
        s if inside(s, "optim").is_some() => "update",
        _ => "forward",
    }
}

/// The layer of a scope, forward or backward: its first part, and the number after `layers`.
pub fn layer(scope: Option<&str>) -> &str {
    let s = inside(scope, "grad").or(scope).unwrap_or_default();
    let parts = if s.starts_with("layers.") { 2 } else { 1 };
    let end = s.match_indices('.').nth(parts - 1).map_or(s.len(), |(i, _)| i);
    if s.is_empty() { "(none)" } else { &s[..end] }
}

/// Sums by key, in the order in which keys first come.
pub struct Sums<K> {
    pub lines: Vec<(K, Sum)>,
}

/// One sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    pub steps: usize,
    pub seconds: f64,
    pub cost: Cost,
}

impl<K: PartialEq> Sums<K> {
    pub fn new() -> Self {
        Self { lines: vec![] }
    }
    pub fn add(&mut self, key: K, seconds: f64, cost: Cost) {
        let at = self.lines.iter().position(|l| l.0 == key).unwrap_or_else(|| {
            self.lines.push((key, Sum::default()));
            self.lines.len() - 1
        });
        let s = &mut self.lines[at].1;
        *s = Sum { steps: s.steps + 1, seconds: s.seconds + seconds, cost: s.cost + cost };
    }
    pub fn seconds(&self) -> f64 {
        self.lines.iter().map(|l| l.1.seconds).sum()
    }
    pub fn cost(&self) -> Cost {
        self.lines.iter().map(|l| l.1.cost).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        let of = |s| (phase(Some(s)), layer(Some(s)));
        assert_eq!(of("layers.3"), ("forward", "layers.3"));
        assert_eq!(of("grad.layers.12.mixer"), ("backward", "layers.12"));
        assert_eq!(of("grad"), ("backward", "(none)"));
        assert_eq!(of("gradual.x"), ("forward", "gradual"));
        assert_eq!(of("optim"), ("update", "optim"));
        assert_eq!((phase(None), layer(None)), ("forward", "(none)"));
    }
}
