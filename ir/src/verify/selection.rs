//! The traps of attention that selects: what is chosen, weighed and attended must belong together.
//!
//! Everything here follows operands backward: choices (indices, counts) through ops that move or adjust elements,
//! scores through elementwise ops, moves and reductions.

use super::{chunks, mention};
use crate::diagnostic::Diagnostic;
use crate::dim::Dim;
use crate::graph::{Graph, NodeId, Value};
use crate::ops::{BinaryFn, FusedMap, MapFn, Op, UnaryFn, Weighting};
use crate::ty::DType;
use std::collections::{BTreeSet, HashMap};

/// A graph with what the rules ask of it.
struct Facts<'g> {
    g: &'g Graph,
    /// The first node that computes the same as each node.
    same: Vec<NodeId>,
}

/// Whether an op hands elements on: moved, cast, or changed one by one.
fn passes_on(op: &Op) -> bool {
    op.def().is_elementwise()
        || matches!(op, Op::Reshape(_) | Op::Transpose(_) | Op::Slice(_) | Op::Pad(_) | Op::Concat(_) | Op::Reduce(_))
}

/// Whether an op hands elements on unchanged.
fn moves(op: &Op) -> bool {
    matches!(op, Op::Cast(_) | Op::Broadcast(_) | Op::Reshape(_) | Op::Transpose(_))
}

/// Operands of a map whose elements, not mere comparisons of them, are in its result.
fn carried(m: &FusedMap, operands: usize, result: usize) -> BTreeSet<usize> {
    let (mut out, mut todo) = (BTreeSet::new(), vec![m.outs[result]]);
    while let Some(r) = todo.pop() {
        let Some(i) = r.checked_sub(operands) else {
            out.insert(r);
            continue;
        };
        let inst = &m.body[i];
        match inst.f {
            MapFn::Binary(f) if f.is_comparison() => {}
            MapFn::Where => todo.extend(inst.args[1..].iter().map(|a| *a as usize)),
            _ => todo.extend(inst.args.iter().map(|a| *a as usize)),
        }
    }
    out
}

fn has_selections(g: &Graph) -> bool {
    g.nodes.iter().any(|n| {
        matches!(
            n.op,
            Op::Select(_)
                | Op::Selection(_)
                | Op::Weigh(_)
                | Op::WeighGrad(_)
                | Op::Attend(_)
                | Op::AttendGrad(_)
                | Op::ChunkAttention(_)
                | Op::ChunkAttentionGrad(_)
                | Op::SelectionGrad(_)
        )
    })
}

impl<'g> Facts<'g> {
    fn new(g: &'g Graph) -> Self {
        let mut first: HashMap<(String, Vec<Value>), NodeId> = HashMap::new();
        let mut same: Vec<NodeId> = Vec::with_capacity(g.nodes.len());
        for (id, n) in g.iter() {
            let inputs = n.inputs.iter().map(|v| Value { node: same[v.node.index()], ..*v }).collect();
            same.push(*first.entry((format!("{:?}", n.op), inputs)).or_insert(id));
        }
        Self { g, same }
    }
    fn canon(&self, v: Value) -> Value {
        Value { node: self.same[v.node.index()], ..v }
    }
    fn op(&self, v: Value) -> &'g Op {
        &self.g.node(v.node).op
    }
    fn operand(&self, v: Value, i: usize) -> Value {
        self.g.node(v.node).inputs[i]
    }

    /// Every value behind `v`, itself included, going on from values whose op satisfies `through`.
    fn behind(&self, v: Value, through: impl Fn(Value) -> bool) -> BTreeSet<Value> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![v];
        while let Some(v) = todo.pop() {
            if seen.insert(self.canon(v)) && through(v) {
                todo.extend(&self.g.node(v.node).inputs);
            }
        }
        seen
    }

    /// The selections (nodes of `select` or `selection`) that an index or count comes from.
    fn choices(&self, v: Value) -> BTreeSet<NodeId> {
        let behind = self.behind(v, |v| passes_on(self.op(v)));
        let chosen = behind.iter().filter(|v| matches!(self.op(**v), Op::Select(_) | Op::Selection(_)));
        chosen.map(|v| v.node).collect()
    }

    /// The selections that weights belong to; empty if they come from none.
    fn weight_choices(&self, w: Value) -> BTreeSet<NodeId> {
        let behind = self.behind(w, |v| passes_on(self.op(v)));
        let mut out = BTreeSet::new();
        for v in behind {
            match self.op(v) {
                Op::Weigh(_) => out.extend(self.choices(self.operand(v, 1))),
                Op::Selection(_) if v.result >= 2 => {
                    out.insert(v.node);
                }
                _ => {}
            }
        }
        out
    }

    /// The ops behind a score that hide what is not complete: `score`, or `mask` where scores are made otherwise.
    fn scorers(&self, s: Value) -> BTreeSet<Value> {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![s]);
        while let Some(v) = todo.pop() {
            let inputs = &self.g.node(v.node).inputs;
            if !seen.insert(self.canon(v)) || !passes_on(self.op(v)) || !self.g.ty(v).dtype.is_float() {
                continue;
            }
            // A comparison of scores is no score: it may choose among others.
            match self.op(v) {
                Op::Where(_) => todo.extend(&inputs[1..]),
                Op::FusedMap(m) => {
                    todo.extend(carried(m, inputs.len(), v.result as usize).into_iter().map(|i| inputs[i]))
                }
                _ => todo.extend(inputs),
            }
        }
        seen.into_iter().filter(|v| matches!(self.op(*v), Op::Score(_) | Op::Mask(_))).collect()
    }

    /// Chunk sizes of the scores that a selection chose by, each with its scorer.
    fn chunk_sizes(&self, choice: NodeId) -> Vec<(usize, NodeId)> {
        match &self.g.node(choice).op {
            Op::Selection(s) => vec![(s.chunk, choice)],
            Op::Select(_) => {
                let scorers = self.scorers(self.g.node(choice).inputs[0]);
                let size = |v: Value| match self.op(v) {
                    Op::Score(s) => Some((s.chunk, v.node)),
                    Op::Mask(m) => Some((m.chunk, v.node)),
                    _ => None,
                };
                scorers.into_iter().filter_map(size).collect()
            }
            _ => vec![],
        }
    }

    /// How many chunks a selection chose from.
    fn n_chunks(&self, choice: NodeId) -> Option<&'g Dim> {
        let n = self.g.node(choice);
        match n.op {
            Op::Selection(_) => Some(&self.g.ty(n.inputs[1]).shape[1]),
            Op::Select(_) => Some(&self.g.ty(n.inputs[0]).shape[3]),
            _ => None,
        }
    }

    /// `v` without casts and moves.
    fn stripped(&self, mut v: Value) -> Value {
        while moves(self.op(v)) {
            v = self.operand(v, 0);
        }
        self.canon(v)
    }

    /// How the scores `s` relate to those that `choice` was made by.
    fn relation(&self, s: Value, choice: NodeId) -> Relation {
        let node = self.g.node(choice);
        let mine = self.scorers(s);
        match &node.op {
            Op::Select(_) => {
                let by = node.inputs[0];
                if self.stripped(s) == self.stripped(by) {
                    return Relation::Same;
                }
                let behind_s = self.behind(s, |v| passes_on(self.op(v)));
                let behind_by = self.behind(by, |v| passes_on(self.op(v)));
                let derived = behind_s.contains(&self.canon(by)) || behind_by.contains(&self.canon(s));
                if derived || mine.iter().any(|v| behind_by.contains(v)) { Relation::Related } else { Relation::None }
            }
            Op::Selection(sel) => {
                let equal = |v: Value| match self.op(v) {
                    Op::Score(sc) => {
                        (sc.chunk, sc.scale) == (sel.chunk, sel.scale)
                            && (0..3).all(|i| self.canon(self.operand(v, i)) == self.canon(node.inputs[i]))
                    }
                    _ => false,
                };
                if equal(self.stripped(s)) {
                    Relation::Same
                } else if mine.into_iter().any(equal) {
                    Relation::Related
                } else {
                    Relation::None
                }
            }
            _ => Relation::None,
        }
    }

    fn names(&self, choices: &BTreeSet<NodeId>) -> String {
        if choices.is_empty() {
            return "no selection".into();
        }
        choices.iter().map(|&c| mention(self.g, c)).collect::<Vec<_>>().join(" and ")
    }
}

#[derive(PartialEq)]
enum Relation {
    Same,
    Related,
    None,
}

/// The operands of an op that uses a selection.
struct Use {
    indices: usize,
    weights: Option<usize>,
    /// Dense scores.
    scores: Option<usize>,
    /// Chunk size; then operand 1 has the keys.
    chunk: Option<usize>,
}

impl Use {
    fn of(op: &Op) -> Option<Use> {
        let attend = |chunk: usize, weights| Use { indices: 3, weights, scores: None, chunk: Some(chunk) };
        Some(match op {
            Op::Weigh(_) | Op::WeighGrad(_) => Use { indices: 1, weights: None, scores: Some(0), chunk: None },
            Op::SelectionGrad(_) => Use { indices: 2, weights: Some(5), scores: None, chunk: None },
            Op::Attend(a) => attend(a.chunk, None),
            Op::AttendGrad(a) => attend(a.chunk, None),
            Op::ChunkAttention(a) => attend(a.chunk, Some(5)),
            Op::ChunkAttentionGrad(a) => attend(a.chunk, Some(5)),
            _ => return None,
        })
    }
}

fn at(g: &Graph, id: NodeId, make: fn(String) -> Diagnostic, message: String, help: impl Into<String>) -> Diagnostic {
    let n = g.node(id);
    make(format!("{} = {}: {message}", g.label(id.result(0)), n.op.mnemonic())).on(id, &n.loc).help(help)
}

/// Invariants 8 to 10 of [`verify`](super::verify).
pub(super) fn check(g: &Graph) -> Vec<Diagnostic> {
    let mut out = vec![];
    if !has_selections(g) {
        return out;
    }
    let f = Facts::new(g);
    for (id, n) in g.iter() {
        let mut error = |message: String, help: &str| out.push(at(g, id, Diagnostic::error, message, help));
        if let Op::Aggregate(_) | Op::AggregateGrad(_) = n.op {
            // What is aggregated was attended by some indices; the weights must be theirs.  Slots given one by one are
            // branches, which gates mix.
            let back = usize::from(matches!(n.op, Op::AggregateGrad(_)));
            if n.inputs.len() != 2 + back {
                continue;
            }
            let behind = f.behind(n.inputs[0], |v| passes_on(f.op(v)));
            let attended = behind.into_iter().filter(|v| matches!(f.op(*v), Op::Attend(_)));
            let by: BTreeSet<NodeId> = attended.flat_map(|v| f.choices(f.operand(v, 3))).collect();
            let weights = f.weight_choices(n.inputs[1]);
            if !by.is_empty() && !weights.is_empty() && by.is_disjoint(&weights) {
                let what = format!("its weights belong to {}, but its chunks to {}", f.names(&weights), f.names(&by));
                error(what, "weigh the scores of the selection that was attended");
            }
            continue;
        }
        let Some(u) = Use::of(&n.op) else { continue };
        let choices = f.choices(n.inputs[u.indices]);
        let counted = f.choices(n.inputs[u.indices + 1]);
        if choices != counted {
            let what = format!("its indices come from {}, but its count from {}", f.names(&choices), f.names(&counted));
            error(what, "use both results of one selection: slots beyond its count hold no chunk");
        }
        if let Some(w) = u.weights {
            let weights = f.weight_choices(n.inputs[w]);
            if !choices.is_empty() && !weights.is_empty() && choices.is_disjoint(&weights) {
                let what =
                    format!("its weights belong to {}, but its indices to {}", f.names(&weights), f.names(&choices));
                error(what, "weigh the scores of the selection whose indices are used");
            }
        }
        for &choice in &choices {
            if let Some(s) = u.scores
                && f.relation(n.inputs[s], choice) == Relation::None
            {
                let what = format!("its scores are not those that {} chose by", mention(g, choice));
                error(what, "weigh the scores that went into the selection");
            }
            let Some(chunk) = u.chunk else { continue };
            for (size, scorer) in f.chunk_sizes(choice).into_iter().filter(|&(size, _)| size != chunk) {
                let what = format!("its chunk is {chunk}, but {} has chunk {size}", mention(g, scorer));
                error(what, "a chunk's index means nothing at another chunk size: make them equal");
            }
            let keys = &g.ty(n.inputs[1]).shape[1];
            if let (Some(c), have) = (f.n_chunks(choice), chunks(keys, chunk))
                && have.as_ref() != Some(c)
            {
                let have = have.map_or("?".into(), |h| h.to_string());
                let what = format!("its {keys} keys are {have} chunks, but {} chose from {c}", mention(g, choice));
                error(what, "there must be one landmark for every chunk of keys");
            }
        }
    }
    out
}

/// The warnings of [`lint`](super::lint).
pub(super) fn lint(g: &Graph, trained: bool) -> Vec<Diagnostic> {
    if !has_selections(g) {
        return vec![];
    }
    let f = Facts::new(g);
    let mut out = vec![];
    for (id, n) in g.iter() {
        let mut warn = |message: String, help: String| out.push(at(g, id, Diagnostic::warning, message, help));
        if let Op::Select(_) = n.op {
            unmasked(&f, n.inputs[0], &mut warn);
        }
        let k = match &n.op {
            Op::Select(s) => Some(s.k),
            Op::Selection(s) => Some(s.k),
            _ => None,
        };
        if let (Some(k), Some(c)) = (k, f.n_chunks(id).and_then(Dim::as_int))
            && k > c
        {
            let what = format!("k is {k}, but there are only {c} chunks");
            warn(what, format!("slots beyond the first {c} are never filled: use k = {c}"));
        }
        if let Op::Weigh(_) = n.op {
            for choice in f.choices(n.inputs[1]) {
                if f.relation(n.inputs[0], choice) == Relation::Related {
                    let what = format!("it weighs other scores than {} chose by", mention(g, choice));
                    warn(
                        what,
                        "this trains the weighed scores only; weigh the very scores of the choice if that is not meant"
                            .into(),
                    );
                }
            }
        }
    }
    if trained {
        out.extend(unreached(&f));
    }
    out.sort_by_key(|d| d.node);
    out
}

/// Warns of scores that reach a choice without their causal mask.
fn unmasked(f: &Facts, s: Value, warn: &mut impl FnMut(String, String)) {
    let behind = f.behind(s, |v| passes_on(f.op(v)));
    // A mask of one's own: some -inf is mixed in.
    let masks = |v: &Value| matches!(f.op(*v), Op::Constant(c) if c.value == f64::NEG_INFINITY);
    if f.scorers(s).is_empty() {
        if behind.iter().any(masks) {
            return;
        }
        let from = mention(f.g, f.stripped(s).node);
        let what = format!("its scores come from {from}, not from `score`: nothing hides chunks that are not complete");
        let help =
            "compute them by `score`, or set scores of unfinished chunks to -inf: mask %scores, %start {chunk = …}";
        return warn(what, help.into());
    }
    // -inf must stay -inf on its way from `score` to the choice.
    let lifts = |v: &Value| match f.op(*v) {
        Op::Unary(u) => u.f.eval(f64::NEG_INFINITY) != f64::NEG_INFINITY,
        Op::Binary(b) => b.f == BinaryFn::Max && f.g.node(v.node).inputs.iter().any(|&i| f.scorers(i).is_empty()),
        _ => false,
    };
    for v in behind.iter().filter(|v| lifts(v)) {
        if f.scorers(*v).is_empty() {
            continue;
        }
        let help = match f.op(*v) {
            Op::Unary(u) if u.f == UnaryFn::Exp => "choose by the scores themselves: exp does not change their order",
            _ => "choose by the scores themselves and apply it after the choice",
        };
        warn(
            format!("{} turns the -inf of unfinished chunks into numbers, so they can be chosen", mention(f.g, v.node)),
            help.into(),
        );
    }
}

/// Warns of scorers that depend on params but only decide which chunks are chosen.
fn unreached(f: &Facts) -> Vec<Diagnostic> {
    let g = f.g;
    // Backward from the outputs: which results matter at all, and which by a way that carries gradients.
    let mut live = vec![false; g.nodes.len()];
    let mut reached: Vec<Vec<bool>> = g.nodes.iter().map(|n| vec![false; n.tys.len()]).collect();
    for o in &g.outputs {
        live[o.value.node.index()] = true;
        reached[o.value.node.index()][o.value.result as usize] = g.ty(o.value).dtype.is_float();
    }
    for (id, n) in g.iter().rev().filter(|(_, n)| !n.inputs.is_empty()) {
        if !live[id.index()] {
            continue;
        }
        let any = reached[id.index()].iter().any(|&r| r);
        for (i, v) in n.inputs.iter().enumerate() {
            live[v.node.index()] = true;
            let carries = match &n.op {
                Op::Select(_) => false,
                Op::Unary(u) if u.f == UnaryFn::Detach => false,
                Op::Weigh(w) => i == 0 && w.rule != Weighting::One,
                Op::Selection(s) => i < 2 && s.rule != Weighting::One,
                _ => true,
            };
            let float = |d: DType| d.is_float();
            reached[v.node.index()][v.result as usize] |= any && carries && float(g.ty(*v).dtype);
        }
    }
    // Behind a scorer that shares its params with what is attended, they learn anyway.
    let mut learned = vec![false; g.nodes.len()];
    for (id, n) in g.iter() {
        let untaught = n.op.mnemonic() == "param" && !reached[id.index()][0];
        learned[id.index()] = untaught || n.inputs.iter().any(|v| learned[v.node.index()]);
    }
    let mut out = vec![];
    for (id, n) in g.iter().filter(|(id, n)| live[id.index()] && matches!(n.op, Op::Score(_) | Op::Selection(_))) {
        let is_learned = n.inputs[..2].iter().any(|v| learned[v.node.index()]);
        let gets = match &n.op {
            Op::Selection(s) => s.rule != Weighting::One && reached[id.index()][2],
            _ => reached[id.index()][0],
        };
        if is_learned && !gets {
            let what = "no gradient reaches this learned scorer: its scores only choose chunks, and a choice has none";
            let help = "let its weights enter the result: weigh the scores by stick_breaking, softmax or sigmoid (not \
                        one) and aggregate with them, or give it a loss of its own: return …, \"aux\" = %loss";
            out.push(at(g, id, Diagnostic::warning, what.into(), help));
        }
    }
    out
}
