//! Questions put to a graph over `N` sequences of `L` tokens by running it: is it causal, are its gradients right and do they
//! reach what it learns, does it treat sequences alone and texts of any length alike.
//!
//! Everything runs by the reference interpreter in f64 on random values, so a difference is a fact about the graph and not a
//! rounding error.  Findings name the line where the trouble begins and what to do about it.

use crate::autodiff::{AutodiffError, gradients};
use crate::rewrite::rewrite;
use rambac_ir::host::Data;
use rambac_ir::interp::{self, InterpError, Precision};
use rambac_ir::ops::{Op, Source, SourceKind, UnaryFn};
use rambac_ir::{Bindings, Builder, Diagnostic, Dim, Graph, HostArray, NodeId, Output, Sym, Ty, Value};
use std::collections::HashMap;

/// Why a graph can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error(transparent)]
    Interp(#[from] InterpError),
    #[error(transparent)]
    Autodiff(#[from] AutodiffError),
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn uniform(&mut self, lo: f64, hi: f64) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        lo + (hi - lo) * ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Values of sources by name.
pub type Sources = HashMap<String, HostArray>;

fn dims(n: usize, l: usize) -> Bindings {
    Bindings::new([("N", n), ("L", l)])
}

/// Random values for every source at these sizes, in the range of normalised activations.
pub fn random_sources(g: &Graph, dims: &Bindings, seed: u64) -> Result<Sources, ProbeError> {
    let mut rng = Rng(seed ^ 0x70726f6265);
    let mut out = Sources::new();
    for (_, s) in g.sources() {
        let ty = s.ty.bind(dims).map_err(InterpError::from)?;
        let values = (0..ty.elements()).map(|_| rng.uniform(-1.0, 1.0)).collect();
        out.insert(s.name.clone(), HostArray::from_f64(&ty, values));
    }
    Ok(out)
}

fn all_values(g: &Graph) -> Vec<Value> {
    g.iter().flat_map(|(id, n)| (0..n.tys.len()).map(move |r| id.result(r))).collect()
}

fn run_all(g: &Graph, dims: &Bindings, sources: &Sources) -> Result<HashMap<Value, HostArray>, ProbeError> {
    let all = all_values(g);
    let values = interp::run(g, dims, sources, &all, Precision::Exact)?;
    Ok(all.into_iter().zip(values).collect())
}

fn on(g: &Graph, id: NodeId, message: String, help: impl Into<String>) -> Diagnostic {
    let n = g.node(id);
    let label = g.label(id.result(0));
    Diagnostic::error(format!("{label} = {}: {message}", n.op.mnemonic())).on(id, &n.loc).help(help)
}

/// Where the first NaN or infinity arises, if one comes out of a run at `l` tokens.
pub fn finite(g: &Graph, l: usize, seed: u64) -> Result<Option<Diagnostic>, ProbeError> {
    let d = dims(2, l);
    let values = run_all(g, &d, &random_sources(g, &d, seed)?)?;
    let bad = |a: &HostArray| a.dtype.is_float() && a.f().iter().any(|v| v.is_nan() || *v == f64::INFINITY);
    // Within, a bound may be infinite and a mask undone and done again.
    let comes_out = |a: &HostArray| a.dtype.is_float() && a.f().iter().any(|v| !v.is_finite());
    if !g.outputs.iter().any(|o| comes_out(&values[&o.value])) {
        return Ok(None);
    }
    let first = all_values(g).into_iter().find(|v| bad(&values[v]));
    let first = first.or_else(|| g.outputs.iter().map(|o| o.value).find(|v| comes_out(&values[v])));
    Ok(first.map(|v| {
        let help = "a row may see nothing at all: divide by a sum that can be 0 only after max with a small number";
        on(g, v.node, "it gives NaN or infinity for ordinary operands".into(), help)
    }))
}

/// Axes of a value that count tokens.
fn token_axes(ty: &Ty) -> Vec<usize> {
    let l = Dim::sym("L");
    (0..ty.rank()).filter(|&i| ty.shape[i] == l).collect()
}

/// Whether rows before token `t` differ along every axis that counts tokens: what a token knows has changed with the future.
fn looks_ahead(ty: &Ty, a: &HostArray, b: &HostArray, t: usize) -> bool {
    let axes = token_axes(ty);
    let st = rambac_ir::host::strides(&a.shape);
    let differs = |i: usize| {
        let (x, y) = (a.get(i), b.get(i));
        x != y && (x - y).abs() > 1e-11 * (1.0 + x.abs().max(y.abs())) || x.is_finite() != y.is_finite()
    };
    let early = |axis: usize| (0..a.len()).any(|i| i / st[axis] % a.shape[axis] < t && differs(i));
    !axes.is_empty() && axes.into_iter().all(early)
}

/// Whether a change at a token moves what earlier tokens get: the place where the future comes in, or nothing.
///
/// # Errors
/// Sizes that do not fit.
pub fn causality(g: &Graph, l: usize, seed: u64) -> Result<Vec<Diagnostic>, ProbeError> {
    let d = dims(1, l);
    let before = random_sources(g, &d, seed)?;
    let base = run_all(g, &d, &before)?;
    let mut rng = Rng(seed ^ 0xca05a1);
    let mut places: Vec<usize> =
        [1, l / 4, l / 2, l / 2 + 1, 3 * l / 4 + 1, l - 1].into_iter().filter(|t| *t < l).collect();
    places.dedup();
    let mut out: Vec<Diagnostic> = vec![];
    for t in places {
        let mut moved = before.clone();
        for (_, s) in g.sources().filter(|(_, s)| s.kind == SourceKind::Input) {
            let axes = token_axes(&s.ty);
            let a = moved.get_mut(&s.name).expect("BUG: every source has a value");
            let (shape, Data::Float(v)) = (a.shape.clone(), &mut a.data) else { continue };
            let st = rambac_ir::host::strides(&shape);
            for (i, v) in v.iter_mut().enumerate() {
                if axes.iter().any(|&axis| i / st[axis] % shape[axis] == t) {
                    *v += rng.uniform(-2.0, 2.0);
                }
            }
        }
        let after = run_all(g, &d, &moved)?;
        let ahead = |v: &Value| looks_ahead(g.ty(*v), &base[v], &after[v], t);
        let Some(mut at) = g.outputs.iter().filter(|o| &*o.name != "aux").map(|o| o.value).find(ahead) else {
            continue;
        };
        // Backward, as long as an operand already knows too much.
        while let Some(&v) = g.node(at.node).inputs.iter().find(|v| ahead(v)) {
            at = v;
        }
        let finding = on(g, at.node, format!("tokens before {t} change with what token {t} is"), remedy(g, at.node));
        if !out.iter().any(|o| o.node == finding.node) {
            out.push(finding);
        }
    }
    Ok(out)
}

/// What to do where the future comes in.
fn remedy(g: &Graph, id: NodeId) -> String {
    match &g.node(id).op {
        Op::Attention(_) => "say causal = true (with window or local), or unit = S where keys stand for chunks of S tokens".into(),
        Op::MatMul(_) => {
            let to = &g.node(id).tys[0];
            let scores = to.shape.last().is_some_and(|d| d.syms().contains(&Sym::new("L")));
            match scores {
                true => "these scores are not masked: use `score`, or hide what is not complete by mask %scores, %start {chunk = S} \
                         before a choice or a softmax"
                    .into(),
                false => "a product over tokens must leave out later ones: mask its weights before it".into(),
            }
        }
        Op::Attend(_) | Op::ChunkAttention(_) => "it attends chunks that are not complete: choose by scores of `score`, or mask them".into(),
        Op::Softmax(_) | Op::Select(_) => "its scores are not masked: mask %scores, %start {chunk = S} before it".into(),
        Op::Reduce(_) | Op::Summarise(_) => {
            "a sum over tokens reads later ones: summarise whole chunks and let `score`, `mask` or attention with unit = S hide \
             those that are not complete"
                .into()
        }
        _ => "what it reads here holds later tokens: use `score`, `mask`, or attention with causal or unit".into(),
    }
}

/// Whether the first `l` tokens of a longer text get what they get alone.
///
/// # Errors
/// Sizes that do not fit.
pub fn any_length(g: &Graph, l: usize, seed: u64) -> Result<Option<Diagnostic>, ProbeError> {
    let (short, long) = (dims(1, l), dims(1, 2 * l));
    let all = random_sources(g, &long, seed)?;
    let mut cut = Sources::new();
    for (_, s) in g.sources() {
        let (a, ty) = (&all[&s.name], s.ty.bind(&short).map_err(InterpError::from)?);
        let st = rambac_ir::host::strides(&a.shape);
        let index: Vec<usize> =
            rambac_ir::host::indices(&ty.shape).map(|ix| ix.iter().zip(&st).map(|(i, s)| i * s).sum()).collect();
        cut.insert(s.name.clone(), a.gathered(&ty.shape, index.into_iter()));
    }
    let outputs: Vec<Value> = g.outputs.iter().filter(|o| &*o.name != "aux").map(|o| o.value).collect();
    let (x, y) = (
        interp::run(g, &short, &cut, &outputs, Precision::Exact)?,
        interp::run(g, &long, &all, &outputs, Precision::Exact)?,
    );
    for ((v, x), y) in outputs.iter().zip(&x).zip(&y) {
        let st = rambac_ir::host::strides(&y.shape);
        let worst = rambac_ir::host::indices(&x.shape)
            .zip(x.to_f64())
            .map(|(ix, a)| (a - y.get(ix.iter().zip(&st).map(|(i, s)| i * s).sum())).abs())
            .fold(0.0, f64::max);
        if worst.is_nan() || worst > 1e-9 {
            let what = format!(
                "the first {l} tokens of a text of {} get something else than alone (off by {worst:.1e})",
                2 * l
            );
            let help =
                "nothing may depend on L itself: divide by what a token sees, and keep k the same for every length";
            return Ok(Some(on(g, v.node, what, help)));
        }
    }
    Ok(None)
}

/// Whether every sequence of a batch is treated alone: exchanged inputs give exchanged outputs.
///
/// # Errors
/// Sizes that do not fit.
pub fn sequences_apart(g: &Graph, l: usize, seed: u64) -> Result<Option<Diagnostic>, ProbeError> {
    let d = dims(2, l);
    let sources = random_sources(g, &d, seed)?;
    let swap = |a: &HostArray| {
        let half = a.len() / 2;
        a.gathered(&a.shape, (half..a.len()).chain(0..half))
    };
    let batched = |ty: &Ty| ty.shape.first() == Some(&Dim::sym("N"));
    let mut swapped = sources.clone();
    for (_, s) in g.sources().filter(|(_, s)| batched(&s.ty)) {
        swapped.insert(s.name.clone(), swap(&sources[&s.name]));
    }
    let outputs: Vec<Value> = g.outputs.iter().map(|o| o.value).filter(|v| batched(g.ty(*v))).collect();
    let x = interp::run(g, &d, &sources, &outputs, Precision::Exact)?;
    let y = interp::run(g, &d, &swapped, &outputs, Precision::Exact)?;
    let close = |a: &HostArray, b: &HostArray| {
        a.to_f64().iter().zip(b.to_f64()).all(|(a, b)| *a == b || (a - b).abs() <= 1e-9 * (1.0 + a.abs()))
    };
    let bad = outputs.iter().zip(x.iter().zip(&y)).find(|(_, (x, y))| !close(&swap(x), y));
    Ok(bad.map(|(v, _)| {
        let help = "do not reduce over the axis N, and reshape so that it stays the first";
        on(g, v.node, "exchanging two sequences changes more than their order: they mix".into(), help)
    }))
}

/// What [`learning`] found.
#[derive(Debug, Default)]
pub struct Learning {
    pub findings: Vec<Diagnostic>,
    /// Largest relative difference between a gradient and finite differences.
    pub worst: f64,
    /// Every param with the size of its gradient, root mean square.
    pub params: Vec<(String, f64)>,
}

/// The graph with every detached value as an input: what flows through `detach` is constant to gradients.
fn cut_at_detach(g: &Graph) -> (Graph, Vec<(String, Value)>) {
    let mut inputs = vec![];
    let cut = rewrite(g, |b, id, n, _| {
        let Op::Unary(u) = &n.op else { return None };
        (u.f == UnaryFn::Detach).then(|| {
            let name = format!("detached.{}", inputs.len());
            let v = b.source(SourceKind::Input, &name, n.tys[0].clone());
            inputs.push((name, id.result(0)));
            vec![v]
        })
    });
    (cut, inputs)
}

/// A scalar that every output takes part in: `Σ r∘o` with random `r`, and the scalars themselves.
fn probed(g: Graph) -> Result<(Graph, Value), AutodiffError> {
    let outputs = g.outputs.clone();
    let mut b = Builder::extend(g);
    let mut loss = b.constant(0.0, Ty::f32([0usize; 0]));
    for (i, o) in outputs.iter().enumerate() {
        let ty = b.ty(o.value).clone();
        if !ty.dtype.is_float() {
            continue;
        }
        let r = b.input(&format!("probe.{i}"), ty);
        let part = b.mul(o.value, r);
        let part = b.sum_all(part);
        loss = b.add(loss, part);
    }
    let g = b.finish().map_err(|e| AutodiffError::IllTyped { op: "the probe", error: e.to_string() })?;
    Ok((g, loss))
}

/// The graph with the gradients of `Σ r∘o` over its float outputs at every float source, as outputs `grad.<source>`; `r` are
/// inputs `probe.<i>`.  Also all outputs.
///
/// # Errors
/// An op without a gradient.
pub fn with_gradients(g: &Graph) -> Result<(Graph, Vec<(String, Value)>), ProbeError> {
    let (probed, loss) = probed(g.clone())?;
    let wrt: Vec<(String, Value)> = g
        .sources()
        .filter(|(_, s)| s.ty.dtype.is_float())
        .map(|(id, s)| (format!("grad.{}", s.name), id.result(0)))
        .collect();
    let values: Vec<Value> = wrt.iter().map(|w| w.1).collect();
    let (mut graph, grads) = gradients(probed, loss, &values)?;
    for ((name, _), value) in wrt.iter().zip(&grads) {
        graph.outputs.push(Output { name: name.as_str().into(), value: *value });
    }
    let outputs = graph.outputs.iter().map(|o| (o.name.to_string(), o.value)).collect();
    Ok((graph, outputs))
}

/// Gradients of every float source against finite differences, and whether they reach every param.
///
/// # Errors
/// Sizes that do not fit; an op without a gradient.
pub fn learning(g: &Graph, l: usize, seed: u64) -> Result<Learning, ProbeError> {
    let d = dims(2, l);
    let (cut, detached) = cut_at_detach(g);
    let (probed, loss) = probed(cut)?;
    let wrt: Vec<(NodeId, Source)> = probed
        .sources()
        .filter(|(_, s)| s.ty.dtype.is_float() && !s.name.starts_with("probe.") && !s.name.starts_with("detached."))
        .map(|(id, s)| (id, s.clone()))
        .collect();
    let values: Vec<Value> = wrt.iter().map(|(id, _)| id.result(0)).collect();
    let (graph, grads) = gradients(probed, loss, &values)?;
    let mut out = Learning::default();
    let mut reached: HashMap<&str, f64> = HashMap::new();
    for round in 0..2 {
        let mut sources = random_sources(&graph, &d, seed + 100 * round)?;
        // What is detached has the values that it has.
        let own = random_sources(g, &d, seed + 100 * round)?;
        own.into_iter().for_each(|(n, a)| drop(sources.insert(n, a)));
        let wanted: Vec<Value> = detached.iter().map(|(_, v)| *v).collect();
        let fixed = interp::run(g, &d, &sources, &wanted, Precision::Exact)?;
        detached.iter().zip(fixed).for_each(|((n, _), a)| drop(sources.insert(n.clone(), a)));
        let analytic = interp::run(&graph, &d, &sources, &grads, Precision::Exact)?;
        let mut rng = Rng(seed ^ 0x96ad ^ round);
        for ((_, s), grad) in wrt.iter().zip(&analytic) {
            let v = grad.f();
            let rms = (v.iter().map(|x| x * x).sum::<f64>() / v.len().max(1) as f64).sqrt();
            let best = reached.entry(&s.name).or_default();
            *best = best.max(rms);
            // A choice may flip between the two sides; a smaller step makes that unlikely.
            let errors = [1e-5, 1e-6, 1e-7].map(|h| -> Result<f64, ProbeError> {
                let direction: Vec<f64> = v.iter().map(|_| rng.uniform(-1.0, 1.0)).collect();
                let at = |by: f64| -> Result<f64, ProbeError> {
                    let mut moved = sources.clone();
                    if let Some(Data::Float(x)) = moved.get_mut(&s.name).map(|a| &mut a.data) {
                        x.iter_mut().zip(&direction).for_each(|(x, u)| *x += by * u);
                    }
                    Ok(interp::run(&graph, &d, &moved, &[loss], Precision::Exact)?[0].get(0))
                };
                let slope = (at(h)? - at(-h)?) / (2.0 * h);
                let given: f64 = v.iter().zip(&direction).map(|(g, u)| g * u).sum();
                Ok((slope - given).abs() / (1.0 + slope.abs().max(given.abs())))
            });
            let mut least = f64::INFINITY;
            for e in errors {
                // NaN counts as wrong.
                let e = e?;
                least = if e.is_nan() { least } else { least.min(e) };
            }
            out.worst = out.worst.max(least);
            if least >= 1e-4 {
                let id = g.source(&s.name).map(|(id, _)| id).unwrap_or(NodeId(0));
                let what = format!("its gradient is off by {least:.1e} from finite differences");
                let help = "a value jumps here (a choice, a comparison) and takes the gradient with it: put detach around what \
                            must not learn";
                if !out.findings.iter().any(|f| f.node == Some(id)) {
                    out.findings.push(on(g, id, what, help));
                }
            }
        }
    }
    for (id, s) in g.sources().filter(|(_, s)| s.kind == SourceKind::Param && s.ty.dtype.is_float()) {
        let rms = reached.get(s.name.as_str()).copied().unwrap_or(0.0);
        out.params.push((s.name.clone(), rms));
        if rms == 0.0 {
            let what = format!("no gradient reaches \"{}\", so it never learns", s.name);
            let help = "a choice has no gradient: let its scores weigh what was chosen (weigh … {rule = stick_breaking} and \
                        aggregate), or give them a loss of their own: return …, \"aux\" = %loss";
            out.findings.push(on(g, id, what, help));
        }
    }
    Ok(out)
}
