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
        let what = || on(g, at.node, format!("tokens before {t} change with what token {t} is"), remedy(g, at.node));
        let finding = early_choice(g, &base, at.node).unwrap_or_else(what);
        if !out.iter().any(|o| o.node == finding.node) {
            out.push(finding);
        }
    }
    Ok(out)
}

/// The choice that what is attended comes from, through whatever moves or adjusts indices.
fn choice_of(g: &Graph, indices: Value) -> Option<NodeId> {
    let mut todo = vec![indices];
    while let Some(v) = todo.pop() {
        let n = g.node(v.node);
        match n.op {
            Op::Select(_) => return Some(v.node),
            _ => todo.extend(n.inputs.iter().filter(|v| !g.ty(**v).dtype.is_float())),
        }
    }
    None
}

/// Where scores let a token choose a chunk that is not complete, for an `attend` that reads such a one.
fn early_choice(g: &Graph, values: &HashMap<Value, HostArray>, attend: NodeId) -> Option<Diagnostic> {
    let Op::Attend(op) = &g.node(attend).op else { return None };
    let choice = choice_of(g, g.node(attend).inputs[3])?;
    let early = |v: Value| {
        let a = &values[&v];
        let [_, l, h, c] = a.shape[..] else { return None };
        let visible = |t: usize, unit: usize| (0..h).any(|i| a.get((t * h + i) * c + unit).is_finite());
        (0..l).find_map(|t| (t / op.chunk..c).find(|&unit| visible(t, unit)).map(|unit| (t, unit)))
    };
    let mut at = g.node(choice).inputs[0];
    let (t, unit) = early(at)?;
    // Backward, as long as an operand of the op lets as much be chosen and the op itself is no mask.
    loop {
        let n = g.node(at.node);
        let masks = matches!(n.op, Op::Mask(_) | Op::Score(_)) || hides(g, at, values);
        let same = |v: &&Value| g.ty(**v).shape == g.ty(at).shape && g.ty(**v).dtype.is_float() && early(**v).is_some();
        match n.inputs.iter().find(same).filter(|_| !masks && n.op.def().is_elementwise()) {
            Some(&v) if !matches!(g.node(v.node).op, Op::Constant(_)) => at = v,
            _ => break,
        }
    }
    let s = op.chunk;
    let help = format!(
        "token t sees chunk c once it is complete, t >= (c + 1)*{s}: `score` hides the others, and so does mask %scores, %start \
         {{chunk = {s}}} with %start = constant 0 : i32[N]"
    );
    let last = (unit + 1) * s - 1;
    Some(on(g, at.node, format!("it lets token {t} choose chunk {unit}, whose last token is {last}"), help))
}

/// Whether a value has an -inf where an operand of its shape has none.
fn hides(g: &Graph, v: Value, values: &HashMap<Value, HostArray>) -> bool {
    let out = &values[&v];
    let hidden = |i: usize| out.get(i) == f64::NEG_INFINITY;
    g.node(v.node).inputs.iter().map(|x| &values[x]).any(|x| {
        x.shape == out.shape && x.dtype.is_float() && (0..out.len()).any(|i| hidden(i) && x.get(i).is_finite())
    })
}

/// Whether chunks are chosen by the query heads that attend them: query head `i` of `H` goes with key head `i·h/H` of `h`.
///
/// # Errors
/// Sizes that do not fit.
pub fn heads_together(g: &Graph, l: usize, seed: u64) -> Result<Vec<Diagnostic>, ProbeError> {
    let Some((_, Op::Source(q))) = g.source("q").map(|(id, _)| (id, &g.node(id).op)) else { return Ok(vec![]) };
    let heads = q.ty.shape.get(2).and_then(Dim::as_int).unwrap_or(0);
    let shared = |by: Value| {
        let h = g.ty(by).shape.get(2).and_then(Dim::as_int).unwrap_or(0);
        (h > 1 && heads > h && heads.is_multiple_of(h)).then_some(h)
    };
    let choices: Vec<Value> = g.nodes.iter().filter(|n| matches!(n.op, Op::Select(_))).map(|n| n.inputs[0]).collect();
    let choices: Vec<(Value, usize)> = choices.into_iter().filter_map(|by| Some((by, shared(by)?))).collect();
    if choices.is_empty() {
        return Ok(vec![]);
    }
    let mut cut = g.clone();
    cut.outputs = choices.iter().map(|(v, _)| Output { name: "scores".into(), value: *v }).collect();
    let cut = crate::dce::dce(&cut);
    let wanted: Vec<Value> = cut.outputs.iter().map(|o| o.value).collect();
    let d = dims(1, l);
    let sources = random_sources(g, &d, seed)?;
    let base = interp::run(&cut, &d, &sources, &wanted, Precision::Exact)?;
    // By choice and key head: the query heads that its scores depend on.
    let mut by: Vec<Vec<Vec<usize>>> = choices.iter().map(|(_, h)| vec![vec![]; *h]).collect();
    for head in 0..heads {
        let mut moved = sources.clone();
        if let Some(Data::Float(v)) = moved.get_mut("q").map(|a| &mut a.data) {
            let dim = v.len() / (l * heads);
            v.chunks_mut(dim).skip(head).step_by(heads).flatten().for_each(|x| *x = 0.5 - *x);
        }
        let after = interp::run(&cut, &d, &moved, &wanted, Precision::Exact)?;
        for (((_, h), by), (a, b)) in choices.iter().zip(&mut by).zip(base.iter().zip(&after)) {
            let c = a.shape[3];
            for (j, by) in by.iter_mut().enumerate() {
                let differs = |i: usize| a.get(i) != b.get(i) && (a.get(i) - b.get(i)).abs() > 1e-11;
                if (0..a.len()).any(|i| i / c % h == j && differs(i)) {
                    by.push(head);
                }
            }
        }
    }
    let mut out: Vec<Diagnostic> = vec![];
    for ((v, h), by) in choices.iter().zip(by) {
        let group = heads / h;
        let Some((j, others)) =
            by.iter().enumerate().find(|(j, b)| b.len() <= group && b.iter().any(|head| head / group != *j))
        else {
            continue;
        };
        let at = grouped(g, *v, heads).unwrap_or(v.node);
        let list = |all: &mut dyn Iterator<Item = usize>| all.map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
        let what = format!(
            "key head {j} is chosen for by query heads {}, but query heads {} attend what it chooses",
            list(&mut others.iter().copied()),
            list(&mut (j * group..(j + 1) * group))
        );
        let help = "query head i goes with key head i*kv_heads/heads, so neighbours share one: reshape {shape = [N, L, kv_heads, \
                    heads/kv_heads, dim]}, then reduce {f = sum, axes = [3]}";
        if !out.iter().any(|o| o.node == Some(at)) {
            out.push(on(g, at, what, help));
        }
    }
    Ok(out)
}

/// The reshape behind `v` that puts query heads into groups.
fn grouped(g: &Graph, v: Value, heads: usize) -> Option<NodeId> {
    let (mut todo, mut seen) = (vec![v], std::collections::HashSet::new());
    while let Some(v) = todo.pop() {
        let n = g.node(v.node);
        let from = n.inputs.first().map(|x| &g.ty(*x).shape);
        let split = |s: &Vec<Dim>| s.get(2).and_then(Dim::as_int) == Some(heads) && n.tys[0].rank() > s.len();
        if matches!(n.op, Op::Reshape(_)) && from.is_some_and(split) {
            return Some(v.node);
        }
        todo.extend(n.inputs.iter().filter(|x| seen.insert(**x)));
    }
    None
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
    let d = dims(1, l);
    let (cut, detached) = cut_at_detach(g);
    // The loss alone, which is asked for often.
    let (forward, loss) = probed(cut)?;
    let wrt: Vec<(NodeId, Source)> = forward
        .sources()
        .filter(|(_, s)| s.ty.dtype.is_float() && !s.name.starts_with("probe.") && !s.name.starts_with("detached."))
        .map(|(id, s)| (id, s.clone()))
        .collect();
    let values: Vec<Value> = wrt.iter().map(|(id, _)| id.result(0)).collect();
    let (graph, grads) = gradients(forward.clone(), loss, &values)?;
    let mut out = Learning::default();
    let mut reached: HashMap<String, f64> = HashMap::new();
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
            let best = reached.entry(s.name.clone()).or_default();
            *best = best.max(rms(v));
            // A choice may flip between the two sides; a smaller step makes that unlikely.
            let mut least = f64::INFINITY;
            for h in [1e-5, 1e-6, 1e-7] {
                let direction: Vec<f64> = v.iter().map(|_| rng.uniform(-1.0, 1.0)).collect();
                let at = |by: f64| -> Result<f64, ProbeError> {
                    let mut moved = sources.clone();
                    if let Some(Data::Float(x)) = moved.get_mut(&s.name).map(|a| &mut a.data) {
                        x.iter_mut().zip(&direction).for_each(|(x, u)| *x += by * u);
                    }
                    Ok(interp::run(&forward, &d, &moved, &[loss], Precision::Exact)?[0].get(0))
                };
                let slope = (at(h)? - at(-h)?) / (2.0 * h);
                let given: f64 = v.iter().zip(&direction).map(|(g, u)| g * u).sum();
                let e = (slope - given).abs() / (1.0 + slope.abs().max(given.abs()));
                // NaN counts as wrong.
                least = if e.is_nan() { least } else { least.min(e) };
                if least < 1e-6 {
                    break;
                }
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
    let (params, unreached) = params(g, &reached);
    out.params = params;
    out.findings.extend(unreached);
    Ok(out)
}

fn rms(v: &[f64]) -> f64 {
    (v.iter().map(|x| x * x).sum::<f64>() / v.len().max(1) as f64).sqrt()
}

/// Every param with the size of its gradient, and those that none reaches.
fn params(g: &Graph, reached: &HashMap<String, f64>) -> (Vec<(String, f64)>, Vec<Diagnostic>) {
    let (mut all, mut findings) = (vec![], vec![]);
    for (id, s) in g.sources().filter(|(_, s)| s.kind == SourceKind::Param && s.ty.dtype.is_float()) {
        let rms = reached.get(&s.name).copied().unwrap_or(0.0);
        all.push((s.name.clone(), rms));
        if rms == 0.0 {
            let what = format!("no gradient reaches \"{}\", so it never learns", s.name);
            let help = "a choice has no gradient: let its scores weigh what was chosen (weigh … {rule = stick_breaking} and \
                        aggregate), or give them a loss of their own: return …, \"aux\" = %loss";
            findings.push(on(g, id, what, help));
        }
    }
    (all, findings)
}

/// Params that no gradient reaches: what [`learning`] finds of that, by one run.
///
/// # Errors
/// As [`learning`].
pub fn unreached(g: &Graph, l: usize, seed: u64) -> Result<Vec<Diagnostic>, ProbeError> {
    let (graph, outputs) = with_gradients(g)?;
    let d = dims(1, l);
    let grads: Vec<(&str, Value)> =
        outputs.iter().filter_map(|(name, v)| Some((name.strip_prefix("grad.")?, *v))).collect();
    let wanted: Vec<Value> = grads.iter().map(|(_, v)| *v).collect();
    let values = interp::run(&graph, &d, &random_sources(&graph, &d, seed)?, &wanted, Precision::Exact)?;
    let reached = grads.iter().zip(values).map(|((name, _), a)| (name.to_string(), rms(a.f()))).collect();
    Ok(params(g, &reached).1)
}
