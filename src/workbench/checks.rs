//! Whether a variant is right: causal, the same alone and in a batch, in short texts and long ones, and learnable.

use super::Subject;
use crate::error::{Result, wrap};
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{Bindings, Diagnostic, Graph, Severity, Sym, verify};
use rambac_passes::{Options, optimise, probe};
use rambac_runtime::{Executor, Store, Tensor};
use std::sync::Arc;

/// One question and its answer.
pub struct Answer {
    pub what: &'static str,
    pub ok: bool,
    pub detail: String,
}

/// All that was asked.
#[derive(Default)]
pub struct Checks {
    pub answers: Vec<Answer>,
    pub findings: Vec<Diagnostic>,
    /// Operations of the attention: lines without inputs, params and constants.
    pub lines: usize,
    /// Nothing more could be asked after what was found.
    cut_short: bool,
}

impl Checks {
    fn answer(&mut self, what: &'static str, found: Vec<Diagnostic>, fine: impl Into<String>) {
        let ok = !found.iter().any(|d| d.severity == Severity::Error);
        let detail = if ok { fine.into() } else { found[0].message.clone() };
        self.answers.push(Answer { what, ok, detail });
        self.findings.extend(found);
    }
    /// Whether all was asked that there is to ask, and costs mean something.
    pub fn asked(&self) -> bool {
        !self.cut_short
    }
    /// Whether nothing is wrong.
    pub fn ok(&self) -> bool {
        self.answers.iter().all(|a| a.ok)
    }
}

/// Asks everything; `train_len` is the length that a training would have.
///
/// # Errors
/// Sizes that do not fit the graph.
pub fn run(s: &Subject, train_len: usize, pool: &Arc<rayon::ThreadPool>) -> Result<Checks> {
    let (g, l, seed) = (&s.fragment.graph, s.check_len(), 7);
    let mut c = Checks { lines: s.fragment.attention_nodes().len(), ..Checks::default() };
    // What the verifier warns of is wrong in a variant.
    let strict = |d: Diagnostic| Diagnostic { severity: Severity::Error, ..d };
    let many = too_many(g, train_len);
    c.cut_short = !many.is_empty();
    let lints: Vec<Diagnostic> = verify::lint(g).into_iter().map(strict).chain(many).collect();
    c.answer("well-formed", lints, "the verifier has nothing to say");
    // Slots that are never filled cost as much as those that are.
    if c.cut_short {
        return Ok(c);
    }
    let bad = probe::finite(g, l, seed).map_err(wrap)?;
    let finite = bad.is_none();
    c.answer("finite", bad.into_iter().collect(), "no NaN and no infinity comes out");
    if !finite {
        return Ok(c);
    }
    // They know nothing of each other, and some take long at real sizes.
    let ((ahead, length), ((mixed, heads), learning)) = rayon::join(
        || (probe::causality(g, l, seed), probe::any_length(g, l, seed)),
        || {
            let forward = || (probe::sequences_apart(g, l, seed), probe::heads_together(g, l, seed));
            rayon::join(forward, || probe::learning(g, l, seed))
        },
    );
    let (ahead, length, mixed, heads) =
        (ahead.map_err(wrap)?, length.map_err(wrap)?, mixed.map_err(wrap)?, heads.map_err(wrap)?);
    let causal = ahead.is_empty();
    c.answer("causal", ahead, format!("no change at a token moves what earlier ones get ({l} tokens)"));
    let same = format!("{l} tokens get the same alone and in a text of {}", 2 * l);
    c.answer("any length", length.into_iter().collect(), same);
    // Who sees the future gets something else where there is more of it: said once.
    if !causal && !c.answers.last().is_some_and(|a| a.ok) {
        c.findings.pop();
    }
    c.answer("sequences apart", mixed.into_iter().collect(), "exchanging sequences exchanges their outputs");
    c.answer("heads together", heads, "query heads choose for the key head that they share");
    let learning = learning.map_err(wrap)?;
    let sizes: Vec<String> = learning.params.iter().map(|(n, v)| format!("{n} {v:.1e}")).collect();
    let reach = if sizes.is_empty() {
        "it learns nothing of its own".into()
    } else {
        format!("they reach {}", sizes.join(", "))
    };
    c.answer("gradients", learning.findings, format!("equal to finite differences ({:.0e}); {reach}", learning.worst));
    match differential(s, l, pool)? {
        Ok(worst) => c.answer("compiled", vec![], format!("the CPU's kernels agree with the definition ({worst:.0e})")),
        Err(d) => c.answer("compiled", vec![d], ""),
    }
    Ok(c)
}

/// Choices of more units than there are at the length that is trained.
pub fn too_many(g: &Graph, len: usize) -> Vec<Diagnostic> {
    let dims = Bindings::new([("N", 1), ("L", len)]);
    let check = |(id, n): (rambac_ir::NodeId, &rambac_ir::Node)| {
        let Op::Select(op) = &n.op else { return None };
        let units = &g.ty(n.inputs[0]).shape[3];
        let have = units.eval(&dims).ok()?;
        (op.k > have).then(|| {
            let message = format!(
                "{} = select: k is {}, but a text of {len} tokens has only {have} of {units}",
                g.label(id.result(0)),
                op.k
            );
            let remedy = format!(
                "choose fewer (k = {}), make chunks smaller, or train on longer texts: --len {} or more",
                (have / 2).max(1),
                op.k.saturating_mul(units.divisor() as usize)
            );
            Diagnostic::error(message).on(id, &n.loc).help(remedy)
        })
    };
    g.iter().filter_map(check).collect()
}

/// The compiled graph on the CPU against its definition: values and gradients of a loss over all outputs.
fn differential(s: &Subject, l: usize, pool: &Arc<rayon::ThreadPool>) -> Result<std::result::Result<f64, Diagnostic>> {
    let (g, outputs) = probe::with_gradients(&s.fragment.graph).map_err(wrap)?;
    let dims = Bindings::new([("N", 2), ("L", l)]);
    let sources = probe::random_sources(&g, &dims, 11).map_err(wrap)?;
    let want = interp::outputs(&g, &dims, &sources, Precision::Exact).map_err(wrap)?;
    let mut store = Store::default();
    let mut inputs = vec![];
    for (_, src) in g.sources() {
        let t = Tensor::from_host(&sources[&src.name]);
        match src.kind {
            SourceKind::Input => inputs.push((src.name.as_str(), t)),
            _ => store.insert(src.name.clone(), t),
        }
    }
    let views: Vec<_> = inputs.iter().map(|(n, t)| (*n, t.view())).collect();
    let mut e = Executor::new(rambac_codegen::lower(&optimise(&g, &Options::default())), pool.clone());
    let got = e.run(&dims, &views, &mut store).map_err(wrap)?;
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut worst = 0.0f64;
    for (name, want) in &want {
        let got = got.iter().find(|(n, _)| n == name).map(|(_, t)| t.to_host().to_f64()).unwrap_or_default();
        let want = want.to_f64();
        let apart: Vec<f64> = got.iter().zip(&want).map(|(a, b)| a - b).collect();
        let error = norm(&apart) / norm(&want).max(1e-3 * (want.len() as f64).sqrt());
        if error.is_nan() || error >= 1e-3 {
            let what = format!("{name}: the compiled graph is off by {error:.1e} from its definition");
            let id = outputs.iter().find(|(n, _)| n == name).map(|o| o.1.node);
            let help =
                "two scores so near that rounding decides? If not, this is a mistake of the compiler: please report it";
            let d = Diagnostic::error(what).help(help);
            return Ok(Err(match id.filter(|i| i.index() < s.fragment.graph.nodes.len()) {
                Some(id) => d.on(id, &s.fragment.graph.node(id).loc),
                None => d,
            }));
        }
        worst = worst.max(error);
    }
    Ok(Ok(worst))
}

/// Symbols and types of the interface, for people.
pub fn interface(s: &Subject) -> Vec<(String, String)> {
    let g = &s.fragment.graph;
    let known = |name: &str| g.syms.contains(&Sym::new(name));
    debug_assert!(known("N") && known("L"), "BUG: a checked fragment is over N and L");
    let sources = g.sources().map(|(_, src)| {
        (
            format!("{} \"{}\"", g.source(&src.name).map_or("", |(id, _)| g.node(id).op.mnemonic()), src.name),
            src.ty.to_string(),
        )
    });
    let outputs = g.outputs.iter().map(|o| (format!("returns \"{}\"", o.name), g.ty(o.value).to_string()));
    sources.chain(outputs).collect()
}
