//! Mixed precision: activations, products and what attention and scans read in bf16; sums, statistics, decays, states,
//! losses, gradients of parameters and the parameters themselves in f32.
//!
//! ```text
//! %w = param "w" : f32[n, k]                     %s = state "shadow.w" : bf16[n, k]
//! %p = matmul %x, %w {trans_b = true}            %a = cast %h {to = f32}        (%h: bf16, what made %x rounded)
//! …                                        ⇒     %c = cast %s {to = f32}
//! %n = …  (the update of w)                      %p = matmul %a, %c {trans_b = true}
//!                                                %q = cast %p {to = bf16}
//! output "w" = %n                                output "w" = %n      output "shadow.w" = cast %n {to = bf16}
//! ```
//! Every op still computes in f32: a value *is* bf16 where a cast to bf16 stands, and nowhere else, so the reference
//! interpreter says what the graph means.  Kernels of GPUs read through a cast from bf16 and write through a cast to it
//! where [`halves`] allows it; so the casts cost nothing there, and where they stay they are steps that `explain` shows.
//!
//! Requires: gradients are in the graph, ops that replace L×C values are fused, maps are not yet.  Ensures: no value that
//! was an output changes its type; sources stay as they were, but a param that a graph without gradients only multiplies
//! by is stored in bf16.  It adds casts on paper, as `narrow` does.

use crate::cse::is_backward;
use crate::rewrite::Rewrite;
use rambac_ir::ops::{Op, Source, SourceKind};
use rambac_ir::{DType, Graph, Node, NodeId, Output, Value};
use std::collections::{HashMap, HashSet};

/// Operands and results of an op that may be bf16 while it computes in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Halves {
    /// Operands that are bf16 together, and the results that are with them.
    pub operands: &'static [usize],
    pub results: &'static [usize],
    /// Operands that are made bf16, each by itself.
    pub wants: &'static [usize],
    /// Operands that may be bf16, each by itself, if they are so anyway.
    pub takes: &'static [usize],
    /// Results that may be bf16, each by itself, if `operands` are.
    pub gives: &'static [usize],
    /// Results that may be written in bf16 beside f32, each by itself.
    pub copies: &'static [usize],
}

macro_rules! halves {
    ($($op:ident: $($field:ident $at:expr),*;)*) => {
        /// The one table of what may be bf16.  What it does not name is f32: weights of norms and convolutions; steps,
        /// decays and states of scans; weights and scores of chosen chunks; losses; gradients of all of them.
        pub fn halves(op: &Op) -> Halves {
            // A log-sum-exp has the type of the operands, and merges want it exact.
            let exact = match op {
                Op::Attention(a) => a.lse,
                Op::AttentionGrad(a) => a.lse,
                _ => false,
            };
            match op {
                _ if exact => Halves::default(),
                $(Op::$op(_) => Halves { $($field: &$at,)* ..Halves::default() },)*
                _ => Halves::default(),
            }
        }
    };
}

halves! {
    MatMul: operands [0, 1], gives [0];
    MatMulMap: operands [0, 1];
    RmsNorm: takes [0], gives [0];
    RmsNormGrad: wants [2], takes [0, 3], gives [0], copies [0];
    GatedRmsNorm: wants [0, 1], gives [0];
    GatedRmsNormGrad: wants [0, 1, 3], gives [0, 1];
    CausalConv1d: operands [0], results [0];
    CausalConv1dGrad: operands [0, 4], results [0];
    SelectiveScan: operands [0, 3, 4], results [0];
    SelectiveScanGrad: operands [0, 3, 4, 7], results [0, 3, 4];
    Rotary: operands [0], results [0];
    Embedding: takes [1];
    Attention: operands [0, 1, 2], results [0];
    AttentionGrad: operands [0, 1, 2, 3], results [0, 1, 2];
    Selection: operands [0, 1];
    SelectionGrad: operands [0, 1], results [0, 1];
    ChunkAttention: operands [0, 1, 2], results [0];
    ChunkAttentionGrad: operands [0, 1, 2, 6], results [0, 1, 2];
    LinearCrossEntropy: operands [0, 1];
    LinearCrossEntropyGrad: operands [0, 1], results [0];
}

impl Halves {
    /// Whether operand `i` is made bf16.
    pub fn makes(&self, i: usize) -> bool {
        self.operands.contains(&i) || self.wants.contains(&i)
    }
}

/// Name of the bf16 copy of a parameter that products of a training step read: a state, written by every update, and
/// never anything but the parameter rounded to nearest even.
pub fn shadow_name(param: &str) -> String {
    format!("{SHADOW}{param}")
}

/// What names of such copies begin with.
pub const SHADOW: &str = "shadow.";

/// Whether a node is a cast of a bf16 value to f32: nothing but a way to read it.
pub fn widens(g: &Graph, n: &Node) -> bool {
    matches!(&n.op, Op::Cast(c) if c.to == DType::F32) && g.ty(n.inputs[0]).dtype == DType::BF16
}

/// Whether a node is a cast of an f32 value to bf16: what rounds it.
pub fn narrows(g: &Graph, n: &Node) -> bool {
    matches!(&n.op, Op::Cast(c) if c.to == DType::BF16) && g.ty(n.inputs[0]).dtype == DType::F32
}

/// Ops that move elements, whatever their type: what is rounded before and after is the same.
fn moves(op: &Op) -> bool {
    matches!(op, Op::Reshape(_) | Op::Slice(_) | Op::Concat(_) | Op::Transpose(_) | Op::Pad(_))
}

/// What is known of a value before anything is rewritten.
#[derive(Clone, Copy, Default)]
struct Fact {
    /// Something reads it as bf16.
    need: bool,
    /// All that read it do, and something does.
    only: bool,
    /// Elementwise ops that read it, if nothing else does but what reads it as bf16.
    maps: usize,
    /// It exists as bf16 alone.
    stored: bool,
    /// Read in the forward, and in the backward.
    forward: bool,
    backward: bool,
}

struct Facts(HashMap<Value, Fact>);

impl Facts {
    fn of(&self, v: Value) -> Fact {
        self.0.get(&v).copied().unwrap_or_default()
    }

    fn new(g: &Graph, training: bool) -> Facts {
        let mut facts = Facts(HashMap::new());
        let single = |v: Value| g.ty(v).dtype == DType::F32;
        let mut others: HashMap<Value, bool> = g.outputs.iter().map(|o| (o.value, true)).collect();
        let mut singles: HashSet<Value> = others.keys().copied().collect();
        // What readers say, the last first: moves pass on what their own readers say.
        for (id, n) in g.iter().rev() {
            for r in 0..n.tys.len() {
                let v = id.result(r);
                let other = others.get(&v).copied().unwrap_or(false);
                let f = facts.0.entry(v).or_default();
                f.only = f.need && !other;
                f.maps = if singles.contains(&v) { 0 } else { f.maps };
            }
            let h = halves(&n.op);
            for (i, &v) in n.inputs.iter().enumerate().filter(|(_, v)| single(**v)) {
                let y = id.result(0);
                let moved = moves(&n.op).then(|| facts.of(y));
                let (need, other) = match moved {
                    Some(f) => (f.need, !f.only),
                    None => (h.makes(i), !h.makes(i)),
                };
                *others.entry(v).or_default() |= other;
                let map = n.op.def().is_elementwise() && n.inputs.len() > 1;
                if !map && !h.makes(i) {
                    singles.insert(v);
                }
                let f = facts.0.entry(v).or_default();
                f.need |= need;
                f.maps += usize::from(map);
                f.forward |= moved.map_or(!is_backward(n), |m| m.forward);
                f.backward |= moved.map_or(is_backward(n), |m| m.backward);
            }
        }
        for (id, n) in g.iter() {
            let h = halves(&n.op);
            for r in 0..n.tys.len() {
                let v = id.result(r);
                if !single(v) {
                    continue;
                }
                let f = facts.of(v);
                let stored = if moves(&n.op) {
                    n.inputs.iter().all(|&x| facts.of(x).stored)
                } else {
                    // A product that the backward reads too would be kept: then in half the memory.
                    let kept = matches!(n.op, Op::MatMul(_)) && !is_backward(n) && f.forward && f.backward;
                    // Without a backward one that anything wants rounded is as it was where it was kept.
                    let kept = kept || (matches!(n.op, Op::MatMul(_)) && !training && f.need);
                    // So would one that waits for several maps.
                    let waits = matches!(&n.op, Op::MatMul(m) if !m.trans_a) && is_backward(n) && f.maps > 1;
                    h.results.contains(&r) || (h.gives.contains(&r) && (f.only || kept || waits))
                };
                facts.0.entry(v).or_default().stored = stored && g.outputs.iter().all(|o| o.value != v);
            }
        }
        facts
    }
}

struct Pass<'g> {
    r: Rewrite<'g>,
    facts: Facts,
    /// The graph has gradients.
    training: bool,
    half: HashMap<Value, Value>,
    /// Casts back, one for each phase so that none is kept from one to the other.
    wide: HashMap<(Value, bool), Value>,
}

impl Pass<'_> {
    fn scoped(&mut self, n: &Node, f: impl FnOnce(&mut Self) -> Value) -> Value {
        if let Some(s) = &n.scope {
            self.r.b.enter(s);
        }
        let v = f(self);
        if n.scope.is_some() {
            self.r.b.leave();
        }
        v
    }

    /// The f32 that `user` reads for an old value: of one that is stored in bf16, what that holds.
    fn plain(&mut self, user: &Node, v: Value) -> Value {
        if self.half.contains_key(&v) && self.facts.of(v).stored { self.widened(user, v) } else { self.r.get(v) }
    }

    fn widened(&mut self, user: &Node, v: Value) -> Value {
        let key = (v, is_backward(user));
        if let Some(w) = self.wide.get(&key) {
            return *w;
        }
        let half = self.half[&v];
        let w = self.scoped(user, |p| p.r.b.cast(half, DType::F32));
        self.wide.insert(key, w);
        w
    }

    /// Copies a node onto these operands; its results are rounded where they are stored or wanted so.
    fn push(&mut self, id: NodeId, n: &Node, x: &[Value]) {
        let out = self.r.b.copy(n, x);
        self.r.set(id, out.clone());
        for (r, &y) in out.iter().enumerate() {
            let v = id.result(r);
            let f = self.facts.of(v);
            if self.r.old.ty(v).dtype == DType::F32 && (f.stored || f.need) {
                let h = self.scoped(n, |p| match &n.op {
                    Op::Constant(c) => p.r.b.constant(c.value, c.ty.with_dtype(DType::BF16)),
                    _ => p.r.b.cast(y, DType::BF16),
                });
                self.half.insert(v, h);
            }
        }
    }

    fn param(&mut self, id: NodeId, n: &Node, s: &Source) {
        let (v, old) = (id.result(0), self.r.old);
        let narrow = |s: &Source| Source { ty: s.ty.with_dtype(DType::BF16), ..s.clone() };
        let updated = old.outputs.iter().any(|o| *o.name == *s.name);
        if !self.training && self.facts.of(v).only && !updated {
            let half = self.r.b.copy(&Node { op: narrow(s).into(), ..n.clone() }, &[])[0];
            self.half.insert(v, half);
            self.r.set(id, vec![half]);
            return;
        }
        let out = self.r.b.copy(n, &[]);
        self.r.set(id, out.clone());
        let half = if self.training {
            let shadow = Source { kind: SourceKind::State, name: shadow_name(&s.name), ..narrow(s) };
            self.r.b.push(shadow, &[])
        } else {
            self.scoped(n, |p| p.r.b.cast(out[0], DType::BF16))
        };
        self.half.insert(v, half);
    }

    fn node(&mut self, id: NodeId, n: &Node) {
        let g = self.r.old;
        let single = n.tys.first().is_some_and(|t| t.dtype == DType::F32);
        if let Op::Source(s) = &n.op {
            if s.kind == SourceKind::Param && single && self.facts.of(id.result(0)).need {
                return self.param(id, n, s);
            }
            return self.r.copy(id);
        }
        if moves(&n.op) && single {
            let f = self.facts.of(id.result(0));
            // The elements of what is bf16 anyway; a part of what is not is rounded after it was taken, a whole before.
            let whole = matches!(n.op, Op::Reshape(_) | Op::Transpose(_));
            let param = |v: &Value| matches!(&g.node(v.node).op, Op::Source(s) if s.kind == SourceKind::Param);
            let some = n.inputs.iter().any(|v| self.facts.of(*v).stored || (param(v) && self.half.contains_key(v)));
            let all = n.inputs.iter().all(|v| self.half.contains_key(v));
            if f.stored || (f.need && (some || whole) && all) {
                let x: Vec<Value> = n.inputs.iter().map(|v| self.half[v]).collect();
                let half = self.r.b.copy(n, &x)[0];
                self.half.insert(id.result(0), half);
                if f.stored || f.only {
                    self.r.set(id, vec![half]);
                    return;
                }
                let x: Vec<Value> = n.inputs.iter().map(|&v| self.plain(n, v)).collect();
                let out = self.r.b.copy(n, &x);
                self.r.set(id, out);
                return;
            }
        }
        if widens(g, n) {
            // It is bf16 already.
            self.half.insert(id.result(0), self.r.get(n.inputs[0]));
            return self.r.copy(id);
        }
        let h = halves(&n.op);
        let mut x = vec![];
        for (i, &v) in n.inputs.iter().enumerate() {
            let half = h.makes(i) && self.half.contains_key(&v);
            x.push(if half { self.widened(n, v) } else { self.plain(n, v) });
        }
        self.push(id, n, &x);
    }
}

/// See the module's comment.
pub fn mixed(g: &Graph) -> Graph {
    let training = g.nodes.iter().any(is_backward);
    let (facts, half, wide) = (Facts::new(g, training), HashMap::new(), HashMap::new());
    let mut p = Pass { r: Rewrite::new(g), facts, training, half, wide };
    for (id, n) in g.iter() {
        p.node(id, n);
    }
    // Updates of parameters round for the next step.
    let mut shadows = vec![];
    for o in &g.outputs {
        let name = shadow_name(&o.name);
        if p.r.b.graph().source(&name).is_some() && g.source(&o.name).is_some() {
            let new = p.r.get(o.value);
            let scope = g.node(o.value.node).clone();
            shadows.push(Output { name: name.into(), value: p.scoped(&scope, |p| p.r.b.cast(new, DType::BF16)) });
        }
    }
    let mut out = p.r.finish();
    out.outputs.extend(shadows);
    crate::dce::dce(&out)
}

/// The parameters whose rounded copies a graph reads, see [`shadow_name`].
pub fn shadowed(g: &Graph) -> impl Iterator<Item = &str> {
    g.sources().filter(|(_, s)| s.kind == SourceKind::State).filter_map(|(_, s)| s.name.strip_prefix(SHADOW))
}
