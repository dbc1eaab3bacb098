//! Well-typed graphs grown at random, op by op, for property tests here and in other crates (feature `testing`).
//!
//! [`grown`] covers every op of the IR; [`grown_differentiable`] only those with a gradient, and ends in a scalar
//! output `loss`.  Dims come from {1, 2, 3, 7, 16, 17, 64}, some of them symbolic (`N`, `L`).  Values stay finite: the
//! generator bounds magnitudes and passes large operands through `tanh`; only `score` gives -inf.  Indices and counts
//! come from selections.  A graph shrinks by leaving steps out.

use crate::builder::Builder;
use crate::dim::{Bindings, Dim};
use crate::graph::{Graph, Value};
use crate::host::HostArray;
use crate::ops::*;
use crate::ty::{DType, Ty};
use proptest::prelude::*;
use std::collections::HashMap;
use std::fmt;

/// A graph with everything it needs to run.
#[derive(Clone)]
pub struct Grown {
    pub graph: Graph,
    pub dims: Bindings,
    pub sources: HashMap<String, HostArray>,
}

impl fmt::Debug for Grown {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}# at {}", crate::text::print(&self.graph), self.dims)
    }
}

/// Graphs of up to about `max_steps` random steps over every op.
pub fn grown(max_steps: usize) -> impl Strategy<Value = Grown> {
    steps(max_steps).prop_map(|(seed, steps)| grow(seed, &steps, false))
}

/// As [`grown`], with only ops that have a gradient and a scalar f32 output `loss` that depends on every leaf.
pub fn grown_differentiable(max_steps: usize) -> impl Strategy<Value = Grown> {
    steps(max_steps).prop_map(|(seed, steps)| grow(seed, &steps, true))
}

fn steps(max_steps: usize) -> impl Strategy<Value = (u64, Vec<(u16, u64)>)> {
    (any::<u64>(), proptest::collection::vec((any::<u16>(), any::<u64>()), 1..=max_steps.max(1)))
}

/// The graph that these steps give; the strategies' deterministic core.
pub fn grow(seed: u64, steps: &[(u16, u64)], differentiable: bool) -> Grown {
    let mut g = Grower::new(seed, differentiable);
    let all: Vec<&str> = Op::mnemonics().into_iter().filter(|m| !differentiable || has_gradient(m)).collect();
    for &(op, entropy) in steps {
        g.rng = Rng(entropy ^ seed);
        g.step(all[op as usize % all.len()]);
    }
    g.finish()
}

/// Whether ops of this mnemonic have a gradient rule.
pub fn has_gradient(mnemonic: &str) -> bool {
    !(mnemonic.ends_with("_grad")
        || ["map", "map_each", "matmul_map", "selection", "chunk_attention", "append"].contains(&mnemonic))
}

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }
    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
    /// With probability `1/n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    /// Uniform in `lo..hi`.
    pub fn uniform(&mut self, lo: f64, hi: f64) -> f64 {
        lo + (hi - lo) * (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Sizes that axes have.
const DIMS: [usize; 7] = [1, 2, 3, 7, 16, 17, 64];
/// Rules of weights: logits hold -inf.
const RULES: [Weighting; 4] = [Weighting::StickBreaking, Weighting::Softmax, Weighting::Sigmoid, Weighting::One];
/// No value has more elements.
const MAX_ELEMENTS: usize = 20_000;
/// No op does more work.
const MAX_FLOPS: f64 = 4e6;

/// A choice that was made and what it was made from.
#[derive(Clone)]
struct Chosen {
    /// Operands of the score.
    q: Value,
    landmarks: Value,
    /// Dense scores; `None` if fused.
    scores: Option<Value>,
    indices: Value,
    count: Value,
    /// Weights; with a fused selection, the scores of the slots too.
    weights: Option<Value>,
    slot_scores: Option<Value>,
    chunk: usize,
    scale: f64,
    rule: Weighting,
}

struct Grower {
    b: Builder,
    dims: Bindings,
    rng: Rng,
    differentiable: bool,
    /// Values to use on, with a bound of their magnitude; scores are not among them.
    pool: Vec<(Value, f64)>,
    chosen: Vec<Chosen>,
    /// Values of sources so far.
    sources: HashMap<String, HostArray>,
}

impl Grower {
    fn new(seed: u64, differentiable: bool) -> Self {
        let mut rng = Rng(seed);
        let dims = Bindings::new([("N", rng.pick(&[1, 2, 3])), ("L", rng.pick(&DIMS))]);
        let b = Builder::new("grown", &["N", "L"]);
        Self { b, dims, rng, differentiable, pool: vec![], chosen: vec![], sources: HashMap::new() }
    }

    // Types.

    fn size(&self, d: &Dim) -> usize {
        d.eval(&self.dims).expect("BUG: grown dims are bound and whole")
    }
    fn dim_below(&mut self, max: usize) -> Dim {
        let mut all: Vec<Dim> = DIMS.iter().filter(|&&d| d <= max.max(1)).map(|&d| Dim::int(d)).collect();
        all.extend(["N", "L"].map(Dim::sym).into_iter().filter(|d| self.size(d) <= max));
        self.rng.pick(&all)
    }
    fn int_below(&mut self, max: usize) -> usize {
        let all: Vec<usize> = DIMS.into_iter().filter(|&d| d <= max.max(1)).collect();
        self.rng.pick(&all)
    }
    fn shape(&mut self, rank: usize, max: usize) -> Vec<Dim> {
        let mut left = max;
        (0..rank)
            .map(|_| {
                let d = self.dim_below(left);
                left /= self.size(&d);
                d
            })
            .collect()
    }
    fn float_type(&mut self) -> DType {
        self.rng.pick(&[DType::F32, DType::F32, DType::F32, DType::BF16, DType::F16])
    }

    // Values.

    fn keep(&mut self, v: Value, bound: f64) -> Value {
        self.pool.push((v, bound));
        v
    }
    fn bound(&self, v: Value) -> f64 {
        self.pool.iter().find(|(p, _)| *p == v).map_or(1e9, |(_, b)| *b)
    }
    /// A new source with values in `lo..=hi`.
    fn source(&mut self, ty: Ty, lo: f64, hi: f64) -> Value {
        let kind = match self.rng.below(4) {
            0 => SourceKind::Input,
            1 => SourceKind::State,
            _ if ty.dtype.is_float() => SourceKind::Param,
            _ => SourceKind::Input,
        };
        self.source_of(kind, ty, lo, hi)
    }
    fn source_of(&mut self, kind: SourceKind, ty: Ty, lo: f64, hi: f64) -> Value {
        let name = format!("s{}", self.sources.len());
        let concrete = ty.bind(&self.dims).expect("BUG: grown dims are bound and whole");
        let values = (0..concrete.elements())
            .map(|_| {
                if ty.dtype.is_float() {
                    self.rng.uniform(lo, hi)
                } else {
                    (lo + self.rng.below((hi - lo) as usize + 1) as f64).floor()
                }
            })
            .collect();
        let mut values = HostArray::from_f64(&concrete, values);
        values.round_to_dtype();
        self.sources.insert(name.clone(), values);
        let v = self.b.source(kind, &name, ty);
        self.keep(v, lo.abs().max(hi.abs()))
    }
    /// A value of this float type, at most about `limit` in magnitude (1 or more).
    fn of(&mut self, dtype: DType, shape: &[&Dim], limit: f64) -> Value {
        let ty = Ty::new(dtype, shape.iter().map(|d| (*d).clone()));
        let like: Vec<Value> = self.pool.iter().map(|p| p.0).filter(|v| *self.b.ty(*v) == ty).collect();
        let v = if like.is_empty() || self.rng.one_in(4) { self.source(ty, -2.0, 2.0) } else { self.rng.pick(&like) };
        self.tame(v, limit)
    }
    fn like(&mut self, v: Value, limit: f64) -> Value {
        let ty = self.b.ty(v).clone();
        self.of(ty.dtype, &ty.shape.iter().collect::<Vec<_>>(), limit)
    }
    /// Any float value of at least this rank.
    fn any(&mut self, min_rank: usize, limit: f64) -> Value {
        // A maximum over nothing isn't finite, and nothing can be sliced off nothing.
        let empty = |t: &Ty| t.shape.iter().any(|d| self.size(d) == 0);
        let fit = |t: &Ty| t.dtype.is_float() && t.rank() >= min_rank && !empty(t);
        let all: Vec<Value> = self.pool.iter().map(|p| p.0).filter(|v| fit(self.b.ty(*v))).collect();
        let v = if all.is_empty() || self.rng.one_in(6) {
            let (rank, dtype) = (min_rank + self.rng.below(5 - min_rank), self.float_type());
            let shape = self.shape(rank, 400);
            self.source(Ty::new(dtype, shape), -2.0, 2.0)
        } else {
            self.rng.pick(&all)
        };
        self.tame(v, limit)
    }
    fn tame(&mut self, v: Value, limit: f64) -> Value {
        if self.bound(v) <= limit.max(2.0) {
            return v;
        }
        let t = self.b.unary(UnaryFn::Tanh, v);
        self.keep(t, 1.0)
    }
    /// `softplus` of a tame value: between 3e-4 and 9.
    fn positive(&mut self, v: Value, limit: f64) -> Value {
        let v = self.tame(v, limit);
        let p = self.b.softplus(v);
        self.keep(p, limit + 1.0)
    }

    /// Adds `op` unless its results or its work are too large; `bound` is that of its float results.
    fn push(&mut self, op: impl Into<Op>, x: &[Value], bound: f64) -> Option<Vec<Value>> {
        let op = op.into();
        let tys: Vec<&Ty> = x.iter().map(|v| self.b.ty(*v)).collect();
        let y =
            op.def().infer(&tys).unwrap_or_else(|e| panic!("BUG: grew an ill-typed {}: {e} ({tys:?})", op.mnemonic()));
        let bind = |t: &Ty| t.bind(&self.dims).expect("BUG: grown dims are bound and whole");
        let (x_c, y_c): (Vec<_>, Vec<_>) = (tys.iter().map(|t| bind(t)).collect(), y.iter().map(bind).collect());
        if y_c.iter().any(|t| t.elements() > MAX_ELEMENTS) || op.def().cost(&x_c, &y_c).flops > MAX_FLOPS {
            return None;
        }
        let out = self.b.push_all(op, x);
        self.pool.extend(out.iter().map(|&v| (v, bound)));
        Some(out)
    }

    // Steps.

    /// Adds an op of this mnemonic and what it needs; nothing if it would be too large.
    fn step(&mut self, mnemonic: &'static str) {
        if let Some(&f) = UnaryFn::ALL.iter().find(|f| f.name() == mnemonic) {
            return self.unary(f);
        }
        if let Some(&f) = BinaryFn::ALL.iter().find(|f| f.name() == mnemonic) {
            return self.binary(f);
        }
        match mnemonic {
            "input" | "param" | "state" => {
                let kind = match mnemonic {
                    "input" => SourceKind::Input,
                    "param" => SourceKind::Param,
                    _ => SourceKind::State,
                };
                let (rank, dtype) = (self.rng.below(5), self.float_type());
                let shape = self.shape(rank, 400);
                self.source_of(kind, Ty::new(dtype, shape), -2.0, 2.0);
            }
            "constant" => {
                let (rank, dtype) = (self.rng.below(4), self.rng.pick(&DType::ALL));
                let value = match dtype {
                    DType::I32 => self.rng.below(7) as f64 - 3.0,
                    DType::Bool => self.rng.below(2) as f64,
                    _ => self.rng.pick(&[0.0, 1.0, -0.5, 1e-5, 0.1, 3.0]),
                };
                let ty = Ty::new(dtype, self.shape(rank, 400));
                self.push(Constant { value, ty }, &[], 3.0);
            }
            "iota" => {
                let (rank, dtype) = (1 + self.rng.below(3), self.rng.pick(&[DType::I32, DType::F32, DType::BF16]));
                let ty = Ty::new(dtype, self.shape(rank, 400));
                let axis = self.rng.below(rank);
                self.push(Iota { axis, ty }, &[], 64.0);
            }
            "where" => {
                let x = self.any(0, 8.0);
                let (a, c, y) = (self.like(x, 8.0), self.like(x, 8.0), self.like(x, 8.0));
                let cond = self.b.binary(BinaryFn::Lt, a, c);
                self.push(Where {}, &[cond, x, y], 8.0);
            }
            "cast" => {
                let all: Vec<Value> = self.pool.iter().map(|p| p.0).collect();
                let x = if all.is_empty() { self.any(0, 8.0) } else { self.rng.pick(&all) };
                let x = if self.b.ty(x).dtype.is_float() { self.tame(x, 8.0) } else { x };
                let to = if self.differentiable { self.float_type() } else { self.rng.pick(&DType::ALL) };
                let bound = self.bound(x).max(1.0);
                self.push(Cast { to }, &[x], bound);
            }
            "map" => self.map(),
            "map_each" => self.map_each(),
            "sum_squares" => {
                let first = self.any(0, 8.0);
                let dtype = self.b.ty(first).dtype;
                let mut x = vec![first];
                for _ in 0..self.rng.below(3) {
                    let rank = self.rng.below(3);
                    let shape = self.shape(rank, 400);
                    x.push(self.of(dtype, &shape.iter().collect::<Vec<_>>(), 8.0));
                }
                self.push(SumSquares {}, &x, 64.0 * 1600.0);
            }
            "matmul_map" => self.matmul_map(),
            "broadcast" => self.broadcast(),
            "reshape" => {
                let x = self.any(0, 1e9);
                let (bound, ty) = (self.bound(x), self.b.ty(x).clone());
                let mut shape = ty.shape.clone();
                match shape.len() {
                    n if n >= 2 => {
                        let at = self.rng.below(n - 1);
                        let next = shape.remove(at + 1);
                        shape[at] = shape[at].checked_mul(&next).expect("BUG: grown dims are small");
                    }
                    n => shape.insert(self.rng.below(n + 1), Dim::int(1)),
                }
                self.push(Reshape { shape }, &[x], bound);
            }
            "transpose" => {
                let x = self.any(1, 1e9);
                let mut perm: Vec<usize> = (0..self.b.ty(x).rank()).collect();
                for i in (1..perm.len()).rev() {
                    perm.swap(i, self.rng.below(i + 1));
                }
                let bound = self.bound(x);
                self.push(Transpose { perm }, &[x], bound);
            }
            "slice" | "pad" | "concat" => self.along_axis(mnemonic),
            "reduce" => {
                let x = self.any(0, 8.0);
                let axes = (0..self.b.ty(x).rank()).filter(|_| self.rng.one_in(2)).collect();
                let (f, keep) = (self.rng.pick(ReduceFn::ALL), self.rng.one_in(2));
                self.push(Reduce { f, axes, keep }, &[x], 8.0 * 400.0);
            }
            "matmul" => self.matmul(),
            "gated_rms_norm" | "gated_rms_norm_grad" => {
                let x = self.any(1, 8.0);
                let ty = self.b.ty(x).clone();
                let (z, w) = (self.like(x, 8.0), self.of(ty.dtype, &[&ty.shape[ty.rank() - 1]], 4.0));
                let eps = self.rng.pick(&[1e-5, 1e-6]);
                if mnemonic == "gated_rms_norm" {
                    self.push(GatedRmsNorm { eps }, &[x, z, w], 4.0 * 8.0);
                } else {
                    let dy = self.like(x, 1.0);
                    self.push(GatedRmsNormGrad { eps }, &[x, z, w, dy], 1e6);
                }
            }
            "rms_norm" | "rms_norm_grad" => {
                let x = self.any(1, 8.0);
                let ty = self.b.ty(x).clone();
                let w = self.of(ty.dtype, &[&ty.shape[ty.rank() - 1]], 4.0);
                let eps = self.rng.pick(&[1e-5, 1e-6]);
                if mnemonic == "rms_norm" {
                    self.push(RmsNorm { eps }, &[x, w], 4.0 * 8.0);
                } else {
                    let mut all = vec![x, w, self.like(x, 1.0)];
                    if self.rng.one_in(2) {
                        all.push(self.like(x, 1.0));
                    }
                    self.push(RmsNormGrad { eps }, &all, 1e5);
                }
            }
            "rotary" => {
                let (rank, dtype) = (2 + self.rng.below(2), self.float_type());
                let mut shape = self.shape(rank, 200);
                shape.push(Dim::int(self.rng.pick(&[2, 16])));
                let x = self.of(dtype, &shape.iter().collect::<Vec<_>>(), 8.0);
                let inverse = self.rng.one_in(3);
                self.push(Rotary { base: 10000.0, inverse }, &[x], 16.0);
            }
            "embedding" | "embedding_grad" => {
                let (rank, dtype) = (1 + self.rng.below(2), self.float_type());
                let (rows, vocab, d) = (self.shape(rank, 60), self.int_below(17), self.dim_below(17));
                let ids = self.source(Ty::i32(rows.clone()), 0.0, vocab as f64 - 1.0);
                if mnemonic == "embedding" {
                    let table = self.of(dtype, &[&Dim::int(vocab), &d], 8.0);
                    self.push(Embedding {}, &[ids, table], 8.0);
                } else {
                    let dy = self.of(dtype, &rows.iter().chain([&d]).collect::<Vec<_>>(), 8.0);
                    self.push(EmbeddingGrad { vocab: Dim::int(vocab) }, &[ids, dy], 8.0 * 60.0);
                }
            }
            "cross_entropy" | "cross_entropy_grad" => {
                let (rank, dtype) = (1 + self.rng.below(2), self.float_type());
                let (rows, vocab) = (self.shape(rank, 60), self.int_below(17));
                let labels = self.source(Ty::i32(rows.clone()), 0.0, vocab as f64 - 1.0);
                // Half of them as models make them.
                let linear = if self.rng.one_in(2) {
                    let d = self.dim_below(17);
                    let h = self.of(dtype, &rows.iter().chain([&d]).collect::<Vec<_>>(), 1.0);
                    let w = self.of(dtype, &[&Dim::int(vocab), &d], 1.0);
                    self.push(MatMul { trans_a: false, trans_b: true }, &[h, w], 17.0)
                } else {
                    None
                };
                let logits = match linear {
                    Some(v) => v[0],
                    None => self.of(dtype, &rows.iter().chain([&Dim::int(vocab)]).collect::<Vec<_>>(), 8.0),
                };
                let ignore = self.rng.pick(&[-100, 0]);
                if mnemonic == "cross_entropy" {
                    self.push(CrossEntropy { ignore }, &[logits, labels], 24.0);
                } else {
                    let dy = self.of(dtype, &rows.iter().collect::<Vec<_>>(), 8.0);
                    self.push(CrossEntropyGrad { ignore }, &[logits, labels, dy], 16.0);
                }
            }
            "linear_cross_entropy" | "linear_cross_entropy_grad" => {
                let (rank, dtype) = (1 + self.rng.below(2), self.float_type());
                let (rows, vocab, d) = (self.shape(rank, 60), self.int_below(17), self.dim_below(17));
                let h = self.of(dtype, &rows.iter().chain([&d]).collect::<Vec<_>>(), 2.0);
                let w = self.of(dtype, &[&Dim::int(vocab), &d], 2.0);
                let labels = self.source(Ty::i32(rows.clone()), 0.0, vocab as f64 - 1.0);
                let ignore = self.rng.pick(&[-100, 0]);
                if mnemonic == "linear_cross_entropy" {
                    self.push(LinearCrossEntropy { ignore }, &[h, w, labels], 150.0);
                } else {
                    let dy = self.of(dtype, &rows.iter().collect::<Vec<_>>(), 8.0);
                    self.push(LinearCrossEntropyGrad { ignore }, &[h, w, labels, dy], 1e3);
                }
            }
            "causal_conv1d" | "causal_conv1d_grad" => {
                let dtype = self.float_type();
                let (n, l, c) = (Dim::sym("N"), self.dim_below(64), self.dim_below(17));
                let k = 1 + self.rng.below(4);
                let one = Dim::int(1);
                let tail = Dim::int(k - 1);
                let mut x = vec![
                    self.of(dtype, &[&n, &l, &c], 2.0),
                    self.of(dtype, &[&c, &one, &Dim::int(k)], 2.0),
                    self.of(dtype, &[&c], 2.0),
                    self.of(dtype, &[&n, &tail, &c], 2.0),
                ];
                let silu = !self.rng.one_in(3);
                if mnemonic == "causal_conv1d" {
                    self.push(CausalConv1d { silu }, &x, 20.0);
                } else {
                    x.extend([self.of(dtype, &[&n, &l, &c], 2.0), self.of(dtype, &[&n, &tail, &c], 2.0)]);
                    self.push(CausalConv1dGrad { silu }, &x, 4000.0);
                }
            }
            "selective_scan" | "selective_scan_grad" => self.scan(mnemonic == "selective_scan_grad"),
            "attention" | "attention_grad" => {
                let dtype = self.float_type();
                let (b, t, h, d) = (Dim::sym("N"), self.dim_below(17), self.int_below(3), self.dim_below(7));
                let hq = Dim::int(h * self.rng.pick(&[1, 2, 3]));
                let h = Dim::int(h);
                let q = self.of(dtype, &[&b, &t, &hq, &d], 2.0);
                let (k, v) = (self.of(dtype, &[&b, &t, &h, &d], 2.0), self.of(dtype, &[&b, &t, &h, &d], 2.0));
                let (scale, causal) = (self.rng.pick(&[1.0, 0.5, 0.125]), self.rng.one_in(2));
                let mut op = Attention { lse: self.rng.one_in(2), ..Attention::new(scale, causal) };
                if causal {
                    op.window = self.rng.pick(&[0, 0, 1, 3, 40]);
                    op.local = self.rng.pick(&[0, 0, 1, 2, 7]);
                }
                if mnemonic == "attention" {
                    self.push(op, &[q, k, v], 8.0);
                } else {
                    let mut x = vec![q, k, v, self.like(q, 2.0)];
                    if op.lse {
                        x.push(self.of(dtype, &[&b, &t, &hq], 2.0));
                    }
                    let Attention { window, local, unit, lse, .. } = op;
                    self.push(AttentionGrad { scale, causal, window, local, unit, lse }, &x, 4000.0);
                }
            }
            "summarise" => {
                let (chunk, n) = self.chunking();
                let rank = self.rng.below(3);
                let tail = self.shape(rank, 60);
                let t = n.checked_mul(&Dim::int(chunk)).expect("BUG: grown dims are small");
                let (dtype, batch) = (self.float_type(), Dim::sym("N"));
                let x = self.of(dtype, &[&batch, &t].into_iter().chain(&tail).collect::<Vec<_>>(), 8.0);
                let mode = self.rng.pick(Summary::ALL);
                self.push(Summarise { chunk, mode }, &[x], 8.0);
            }
            "append" => {
                let rank = self.rng.below(3);
                let (tail, dtype, n) = (self.shape(rank, 60), self.float_type(), Dim::sym("N"));
                // There is room for all rows.
                let (t, l) = (Dim::int(16 + self.int_below(17)), self.int_below(8));
                let l = Dim::int(l);
                let mut of = |rows: &Dim| self.of(dtype, &[&n, rows].into_iter().chain(&tail).collect::<Vec<_>>(), 8.0);
                let (memory, rows) = (of(&t), of(&l));
                let start = self.source(Ty::i32([n]), 0.0, 8.0);
                self.push(Append {}, &[memory, rows, start], 8.0);
            }
            "softmax" => {
                let x = self.any(1, 8.0);
                self.push(Softmax {}, &[x], 16.0);
            }
            "mask" => {
                let Some((_, _, s, chunk, _)) = self.score() else { return };
                let start = self.source(Ty::i32([Dim::sym("N")]), 0.0, 16.0);
                let Some(m) = self.push(Mask { chunk }, &[s, start], 0.0) else { return };
                let y = self.push(Softmax {}, &m, 1.0);
                self.unpool(&m);
                self.unpool(&y.unwrap_or_default()[1..]);
            }
            "merge" | "merge_grad" => {
                let dtype = self.float_type();
                let (n, l, h, d) = (Dim::sym("N"), self.dim_below(17), self.int_below(3), self.dim_below(7));
                let hq = Dim::int(h * self.rng.pick(&[1, 2, 3]));
                let mut x = vec![];
                for _ in 0..1 + self.rng.below(3) {
                    x.push(self.of(dtype, &[&n, &l, &hq, &d], 2.0));
                    let h = if self.rng.one_in(2) { Dim::int(h) } else { hq.clone() };
                    x.push(self.of(dtype, &[&n, &l, &h], 4.0));
                }
                if mnemonic == "merge" {
                    self.push(Merge {}, &x, 8.0);
                } else {
                    x.extend([self.of(dtype, &[&n, &l, &hq, &d], 2.0), self.of(dtype, &[&n, &l, &hq], 2.0)]);
                    self.push(MergeGrad {}, &x, 400.0);
                }
            }
            "score" => drop(self.score()),
            "score_grad" => {
                let Some((q, lm, s, _, scale)) = self.score() else { return };
                let ty = self.b.ty(s).clone();
                let ds = self.of(ty.dtype, &ty.shape.iter().collect::<Vec<_>>(), 2.0);
                self.push(ScoreGrad { scale }, &[q, lm, ds], 4000.0);
            }
            "select" => drop(self.select()),
            "weigh" => drop(self.weighed()),
            "weigh_grad" => {
                let Some(c) = self.dense() else { return };
                let dw = self.slots(&c);
                let s = c.scores.expect("BUG: dense has scores");
                let x = [s, c.indices, c.count, dw];
                self.push(WeighGrad { rule: c.rule }, &x, 4.0);
            }
            "selection" => drop(self.selection()),
            "selection_grad" => {
                let Some(c) = self.selection() else { return };
                let dw = self.slots(&c);
                let (w, s) = (c.weights.expect("BUG: fused"), c.slot_scores.expect("BUG: fused"));
                let x = [c.q, c.landmarks, c.indices, c.count, s, w, dw];
                self.push(SelectionGrad { scale: c.scale, rule: c.rule }, &x, 4000.0);
            }
            "attend" | "aggregate" | "attend_grad" | "aggregate_grad" => self.attend(mnemonic),
            "chunk_attention" | "chunk_attention_grad" => self.chunk_attention(mnemonic == "chunk_attention_grad"),
            other => panic!("BUG: the op {other} is new; teach ir/src/testing.rs to grow it"),
        }
    }

    fn unary(&mut self, f: UnaryFn) {
        use UnaryFn::*;
        let x = match f {
            Exp => self.any(0, 4.0),
            Log | Sqrt | Rsqrt | Recip => {
                let x = self.any(0, 8.0);
                self.positive(x, 8.0)
            }
            _ => self.any(0, 8.0),
        };
        self.push(Unary { f }, &[x], unary_bound(f, 8.0));
    }

    fn binary(&mut self, f: BinaryFn) {
        if !self.differentiable && f != BinaryFn::Div && self.rng.one_in(5) {
            let shape = self.shape(2, 400);
            let (a, c) = (self.source(Ty::i32(shape.clone()), -3.0, 3.0), self.source(Ty::i32(shape), -3.0, 3.0));
            self.push(Binary { f }, &[a, c], 9.0);
            return;
        }
        let a = self.any(0, 8.0);
        let mut c = self.like(a, 8.0);
        if f == BinaryFn::Div {
            c = self.positive(c, 4.0);
        }
        self.push(Binary { f }, &[a, c], if f == BinaryFn::Div { 8.0 / 0.018 } else { 64.0 });
    }

    /// A random fused region; every register keeps a bound.
    fn map(&mut self) {
        let first = self.any(0, 4.0);
        let shape = self.b.ty(first).shape.clone();
        let mut x = vec![first];
        self.broadcast_operands(&shape, &mut x);
        let (body, outs, dtypes) = self.region(vec![4.0; x.len()]);
        self.push(FusedMap { shape, body, outs, dtypes }, &x, 3000.0);
    }

    fn matmul_map(&mut self) {
        let r = 1 + self.rng.below(3);
        let (rows, n, k) = (self.shape(r, 12), self.dim_below(17), self.dim_below(17));
        let trans_b = self.rng.one_in(2);
        let a: Vec<&Dim> = rows.iter().chain([&k]).collect();
        let b = if trans_b { [&n, &k] } else { [&k, &n] };
        let mut x = vec![self.of(DType::F32, &a, 8.0), self.of(DType::F32, &b, 8.0)];
        let shape: Vec<Dim> = rows.iter().chain([&n]).cloned().collect();
        self.broadcast_operands(&shape, &mut x);
        let mut bounds = vec![4.0; x.len() - 1];
        bounds[0] = 64.0 * 17.0;
        let (body, outs, dtypes) = self.region(bounds);
        self.push(MatMulMap { trans_a: false, trans_b, body, outs, dtypes }, &x, 3000.0);
    }

    /// Operands that broadcast to `shape`.
    fn broadcast_operands(&mut self, shape: &[Dim], x: &mut Vec<Value>) {
        for _ in 0..self.rng.below(3) {
            // A broadcast operand: some leading axes gone, some axes 1.
            let skip = self.rng.below(shape.len() + 1);
            let small: Vec<Dim> =
                shape[skip..].iter().map(|d| if self.rng.one_in(3) { Dim::int(1) } else { d.clone() }).collect();
            let dtype = self.float_type();
            x.push(self.of(dtype, &small.iter().collect::<Vec<_>>(), 4.0));
        }
    }

    /// A body over operands of these bounds, the registers that leave it and their types.
    fn region(&mut self, mut bounds: Vec<f64>) -> (MapBody, Vec<usize>, Vec<DType>) {
        let mut body: MapBody = vec![];
        let mut emit = |bounds: &mut Vec<f64>, f: MapFn, args: Vec<usize>, bound: f64| {
            body.push(MapInst { f, args: args.into_iter().map(|a| a as u32).collect() });
            bounds.push(bound);
            bounds.len() - 1
        };
        for _ in 0..1 + self.rng.below(8) {
            let mut arg = |bounds: &mut Vec<f64>| {
                let r = self.rng.below(bounds.len());
                if bounds[r] <= 4.0 { r } else { emit(bounds, MapFn::Unary(UnaryFn::Tanh), vec![r], 1.0) }
            };
            let (a, c, e) = (arg(&mut bounds), arg(&mut bounds), arg(&mut bounds));
            match self.rng.below(5) {
                0 => {
                    let f = self.rng.pick(UnaryFn::ALL);
                    let partial = matches!(f, UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt | UnaryFn::Recip);
                    let a = if partial { emit(&mut bounds, MapFn::Unary(UnaryFn::Softplus), vec![a], 5.0) } else { a };
                    emit(&mut bounds, MapFn::Unary(f), vec![a], unary_bound(f, 5.0));
                }
                1 => {
                    let f = self.rng.pick(BinaryFn::ALL);
                    let div = f == BinaryFn::Div;
                    let c = if div { emit(&mut bounds, MapFn::Unary(UnaryFn::Softplus), vec![c], 5.0) } else { c };
                    emit(&mut bounds, MapFn::Binary(f), vec![a, c], if div { 4.0 / 0.018 } else { 25.0 });
                }
                2 => drop(emit(&mut bounds, MapFn::Where, vec![a, c, e], 4.0)),
                3 => {
                    let to = self.rng.pick(&[DType::F32, DType::BF16, DType::F16]);
                    emit(&mut bounds, MapFn::Cast(to), vec![a], 4.0);
                }
                _ => {
                    let v = self.rng.pick(&[0.0, 1.0, -0.5, 1e-5, 3.0]);
                    emit(&mut bounds, MapFn::Const(v), vec![], 3.0);
                }
            }
        }
        let outs: Vec<usize> = (0..1 + self.rng.below(3)).map(|_| self.rng.below(bounds.len())).collect();
        let dtypes = outs.iter().map(|_| self.rng.pick(&[DType::F32, DType::BF16, DType::F16, DType::Bool])).collect();
        (body, outs, dtypes)
    }

    fn map_each(&mut self) {
        let dtypes: Vec<DType> = (0..1 + self.rng.below(3)).map(|_| self.float_type()).collect();
        let mut x = vec![];
        for _ in 0..1 + self.rng.below(3) {
            let rank = self.rng.below(3);
            let shape = self.shape(rank, 400);
            let shape: Vec<&Dim> = shape.iter().collect();
            dtypes.iter().for_each(|d| x.push(self.of(*d, &shape, 4.0)));
        }
        let shared = self.rng.below(3);
        for _ in 0..shared {
            let dtype = self.float_type();
            x.push(self.of(dtype, &[], 4.0));
        }
        let (body, outs, out_types) = self.region(vec![4.0; dtypes.len() + shared]);
        self.push(MapEach { own: dtypes.len(), shared, body, outs, dtypes: out_types }, &x, 100.0);
    }

    fn broadcast(&mut self) {
        let x = self.any(0, 1e9);
        let bound = self.bound(x);
        let mut shape = self.b.ty(x).shape.clone();
        for d in &mut shape {
            if d.is_one() {
                *d = self.dim_below(17);
            }
        }
        for _ in 0..self.rng.below(3) {
            shape.insert(0, self.dim_below(7));
        }
        if shape.len() <= 5 {
            self.push(Broadcast { shape }, &[x], bound);
        }
    }

    fn along_axis(&mut self, mnemonic: &str) {
        let x = self.any(1, 1e9);
        let (ty, bound) = (self.b.ty(x).clone(), self.bound(x));
        let axes: Vec<usize> = (0..ty.rank()).filter(|&i| ty.shape[i].as_int().is_some()).collect();
        if axes.is_empty() {
            return;
        }
        let axis = self.rng.pick(&axes);
        let d = ty.shape[axis].as_int().expect("BUG: integer axes only");
        match mnemonic {
            "slice" => {
                let start = self.rng.below(d);
                let end = start + 1 + self.rng.below(d - start);
                self.push(Slice { axis, start, end }, &[x], bound);
            }
            "pad" => {
                let (before, after) = (self.rng.below(4), self.rng.below(4));
                self.push(Pad { axis, before, after }, &[x], bound);
            }
            _ => {
                let mut parts = vec![x];
                for _ in 0..self.rng.below(3) {
                    let mut shape = ty.shape.clone();
                    shape[axis] = Dim::int(self.int_below(17));
                    parts.push(self.of(ty.dtype, &shape.iter().collect::<Vec<_>>(), bound));
                }
                self.push(Concat { axis }, &parts, bound);
            }
        }
    }

    fn matmul(&mut self) {
        let (dtype, r) = (self.float_type(), self.rng.below(3));
        let batch = self.shape(r, 12);
        let (m, n, k) = (self.dim_below(17), self.dim_below(17), self.dim_below(17));
        let shared = !batch.is_empty() && self.rng.one_in(2);
        let (trans_a, trans_b) = (!shared && self.rng.one_in(2), self.rng.one_in(2));
        let pair = |a: &Dim, c: &Dim, t: bool| if t { [c.clone(), a.clone()] } else { [a.clone(), c.clone()] };
        let a_shape: Vec<Dim> = batch.iter().cloned().chain(pair(&m, &k, trans_a)).collect();
        let mut b_shape: Vec<Dim> = if shared { vec![] } else { batch };
        b_shape.extend(pair(&k, &n, trans_b));
        let a = self.of(dtype, &a_shape.iter().collect::<Vec<_>>(), 8.0);
        let c = self.of(dtype, &b_shape.iter().collect::<Vec<_>>(), 8.0);
        self.push(MatMul { trans_a, trans_b }, &[a, c], 64.0 * 17.0);
    }

    fn scan(&mut self, grad: bool) {
        let dtype = self.float_type();
        let (n, l, p, r) = (Dim::sym("N"), self.dim_below(64), self.dim_below(3), self.dim_below(3));
        let g = self.int_below(3);
        let m = Dim::int(g * self.rng.pick(&[1, 2, 3]));
        let g = Dim::int(g);
        let x = self.of(dtype, &[&n, &l, &m, &p], 1.0);
        let dt = self.of(dtype, &[&n, &l, &m], 2.0);
        let dt = self.positive(dt, 2.0);
        let a = self.of(dtype, &[&m], 2.0);
        let a = self.positive(a, 2.0);
        let a = self.b.neg(a);
        let a = self.keep(a, 3.0);
        let (b, c) = (self.of(dtype, &[&n, &l, &g, &r], 1.0), self.of(dtype, &[&n, &l, &g, &r], 1.0));
        let (d, h0) = (self.of(dtype, &[&m], 1.0), self.of(dtype, &[&n, &m, &p, &r], 1.0));
        let block = self.rng.pick(&[64, 16, 7]);
        let mut all = vec![x, dt, a, b, c, d, h0];
        if grad {
            all.extend([self.like(x, 1.0), self.like(h0, 1.0)]);
            self.push(SelectiveScanGrad { block }, &all, 1e6);
        } else {
            self.push(SelectiveScan { block }, &all, 5000.0);
        }
    }

    // Selection.

    /// A chunk size and a number of chunks.
    fn chunking(&mut self) -> (usize, Dim) {
        let l = self.size(&Dim::sym("L"));
        let divisors: Vec<usize> = DIMS.into_iter().filter(|d| l.is_multiple_of(*d)).collect();
        if self.rng.one_in(2) {
            let chunk = self.rng.pick(&divisors);
            (chunk, Dim::sym("L").checked_div(chunk as u64).expect("BUG: chunk is positive"))
        } else {
            (self.rng.pick(&[1, 2, 3, 7]), Dim::int(self.rng.pick(&[1, 2, 3, 7])))
        }
    }

    /// Operands of a score: q, landmarks, start, the chunk size and the scale.
    fn score_operands(&mut self) -> (Value, Value, Value, usize, f64) {
        let (chunk, c) = self.chunking();
        let dtype = self.float_type();
        let (n, l, h, r) = (Dim::sym("N"), self.dim_below(17), Dim::int(self.int_below(3)), self.dim_below(7));
        let q = self.of(dtype, &[&n, &l, &h, &r], 2.0);
        let lm = self.of(dtype, &[&n, &c, &h, &r], 2.0);
        let tokens = chunk * self.size(&c);
        let start = self.source(Ty::i32([n]), 0.0, tokens as f64);
        (q, lm, start, chunk, self.rng.pick(&[1.0, 0.5, 0.25]))
    }

    fn score(&mut self) -> Option<(Value, Value, Value, usize, f64)> {
        let (q, lm, start, chunk, scale) = self.score_operands();
        let s = self.push(Score { chunk, scale }, &[q, lm, start], 0.0)?[0];
        // Dense scores hold -inf: only ops of this part take them.
        self.unpool(&[s]);
        Some((q, lm, s, chunk, scale))
    }

    /// Takes values out of what any op may read.
    fn unpool(&mut self, values: &[Value]) {
        self.pool.retain(|(v, _)| !values.contains(v));
    }

    fn select(&mut self) -> Option<Chosen> {
        let (q, landmarks, s, chunk, scale) = self.score()?;
        let (k, order) = (self.rng.pick(&[1, 2, 3, 7]), self.rng.pick(Order::ALL));
        let rule = self.rng.pick(&RULES);
        let (sinks, recent) = self.rng.pick(&[(0, 0), (0, 0), (1, 0), (0, 1)]);
        let y = self.push(Select { k, order, sinks, recent }, &[s], 64.0)?;
        let c = Chosen {
            q,
            landmarks,
            scores: Some(s),
            indices: y[0],
            count: y[1],
            weights: None,
            slot_scores: None,
            chunk,
            scale,
            rule,
        };
        self.chosen.push(c.clone());
        Some(c)
    }

    /// A selection whose dense scores exist.
    fn dense(&mut self) -> Option<Chosen> {
        let all: Vec<Chosen> = self.chosen.iter().filter(|c| c.scores.is_some()).cloned().collect();
        if all.is_empty() || self.rng.one_in(3) { self.select() } else { Some(self.rng.pick(&all)) }
    }

    fn weighed(&mut self) -> Option<Chosen> {
        let mut c = self.dense()?;
        let s = c.scores.expect("BUG: dense has scores");
        let x = [s, c.indices, c.count];
        c.weights = Some(self.push(Weigh { rule: c.rule }, &x, 1.0)?[0]);
        self.chosen.push(c.clone());
        Some(c)
    }

    fn selection(&mut self) -> Option<Chosen> {
        let (q, landmarks, start, chunk, scale) = self.score_operands();
        let (k, order) = (self.rng.pick(&[1, 2, 3, 7]), self.rng.pick(Order::ALL));
        let rule = self.rng.pick(&RULES);
        let y = self.push(Selection { chunk, scale, k, order, rule }, &[q, landmarks, start], 64.0)?;
        let c = Chosen {
            q,
            landmarks,
            scores: None,
            indices: y[0],
            count: y[1],
            weights: Some(y[2]),
            slot_scores: Some(y[3]),
            chunk,
            scale,
            rule,
        };
        self.chosen.push(c.clone());
        Some(c)
    }

    /// A selection with weights, of either form.
    fn with_weights(&mut self) -> Option<Chosen> {
        let all: Vec<Chosen> = self.chosen.iter().filter(|c| c.weights.is_some()).cloned().collect();
        match self.rng.below(4) {
            0 | 1 if !all.is_empty() => Some(self.rng.pick(&all)),
            2 if !self.differentiable => self.selection(),
            _ => self.weighed(),
        }
    }

    /// A float value of a selection's slots.
    fn slots(&mut self, c: &Chosen) -> Value {
        let (dtype, shape) = (self.b.ty(c.q).dtype, self.b.ty(c.indices).shape.clone());
        self.of(dtype, &shape.iter().collect::<Vec<_>>(), 2.0)
    }

    /// Operands q, k, v, indices, count of an op that attends.
    fn attend_operands(&mut self, c: &Chosen) -> Vec<Value> {
        let dtype = self.b.ty(c.q).dtype;
        let idx = self.b.ty(c.indices).shape.clone();
        let n_chunks = self.b.ty(c.landmarks).shape[1].clone();
        let t = n_chunks.checked_mul(&Dim::int(c.chunk)).expect("BUG: grown dims are small");
        let h = idx[2].as_int().expect("BUG: grown heads are integers");
        let (hq, d) = (Dim::int(h * self.rng.pick(&[1, 2, 3])), self.dim_below(3));
        let q = self.of(dtype, &[&idx[0], &idx[1], &hq, &d], 2.0);
        let k = self.of(dtype, &[&idx[0], &t, &idx[2], &d], 2.0);
        let v = self.of(dtype, &[&idx[0], &t, &idx[2], &d], 2.0);
        vec![q, k, v, c.indices, c.count]
    }

    fn attend(&mut self, mnemonic: &str) {
        let Some(c) = self.with_weights() else { return };
        let mut x = self.attend_operands(&c);
        let (scale, off_by_one) = (self.rng.pick(&[1.0, 0.5]), self.rng.pick(&[0.0, 1.0]));
        if mnemonic == "attend_grad" {
            let (q, slots) = (self.b.ty(x[0]).clone(), self.b.ty(c.indices).shape[3].clone());
            x.push(self.of(q.dtype, &[&q.shape[0], &q.shape[1], &q.shape[2], &slots, &q.shape[3]], 2.0));
            self.push(AttendGrad { chunk: c.chunk, scale, off_by_one, joint: false }, &x, 4000.0);
            return;
        }
        if self.rng.one_in(3) {
            let op = Attend { chunk: c.chunk, scale, off_by_one, joint: true };
            let Some(y) = self.push(op, &x, 8.0) else { return };
            self.unpool(&y[1..]);
            if !self.differentiable && self.rng.one_in(2) {
                let lse = self.b.ty(y[1]).clone();
                x.extend([y[0], y[1], self.like(y[0], 2.0)]);
                x.push(self.of(lse.dtype, &lse.shape.iter().collect::<Vec<_>>(), 2.0));
                self.push(AttendGrad { chunk: c.chunk, scale, off_by_one, joint: true }, &x, 4000.0);
            }
            return;
        }
        let op = Attend { chunk: c.chunk, scale, off_by_one, joint: false };
        let Some(o) = self.push(op, &x, 2.0) else { return };
        let w = c.weights.expect("BUG: asked for weights");
        match mnemonic {
            "aggregate" => drop(self.push(Aggregate {}, &[o[0], w], 14.0)),
            "aggregate_grad" => {
                let dy = self.like(x[0], 2.0);
                self.push(AggregateGrad {}, &[o[0], w, dy], 4000.0);
            }
            _ => {}
        }
    }

    fn chunk_attention(&mut self, grad: bool) {
        let Some(c) = self.with_weights() else { return };
        let mut x = self.attend_operands(&c);
        x.push(c.weights.expect("BUG: asked for weights"));
        let (chunk, scale, off_by_one) = (c.chunk, self.rng.pick(&[1.0, 0.5]), self.rng.pick(&[0.0, 1.0]));
        if grad {
            x.push(self.like(x[0], 2.0));
            self.push(ChunkAttentionGrad { chunk, scale, off_by_one }, &x, 4000.0);
        } else {
            self.push(ChunkAttention { chunk, scale, off_by_one }, &x, 14.0);
        }
    }

    /// Names some values, adds outputs (and the loss) for what nothing uses.
    fn finish(mut self) -> Grown {
        let users = self.b.graph().users();
        let leaves: Vec<(Value, f64)> =
            self.pool.iter().filter(|(v, _)| users[v.node.index()].is_empty()).cloned().collect();
        for (i, (v, _)) in leaves.iter().enumerate() {
            self.b.output(&format!("y{i}"), *v);
            if i % 3 == 0 {
                self.b.name(*v, &format!("leaf{i}"));
            }
        }
        if self.differentiable {
            let mut loss = self.b.constant(0.0, Ty::f32([0usize; 0]));
            for (v, bound) in leaves {
                if !self.b.ty(v).dtype.is_float() {
                    continue;
                }
                let v = self.b.cast(v, DType::F32);
                let v = if bound > 8.0 { self.b.unary(UnaryFn::Tanh, v) } else { v };
                let sum = self.b.sum_all(v);
                loss = self.b.add(loss, sum);
            }
            self.b.output("loss", loss);
        }
        let graph = self.b.finish().unwrap_or_else(|e| panic!("BUG: grew an ill-typed graph: {e}"));
        Grown { graph, dims: self.dims, sources: self.sources }
    }
}

/// A bound of `f` on what the grower gives it, for operands of magnitude up to `x`.
fn unary_bound(f: UnaryFn, x: f64) -> f64 {
    use UnaryFn::*;
    match f {
        Exp => 150.0,
        Rsqrt => 60.0,
        Recip => 3000.0,
        Square => x * x,
        Sigmoid | Tanh | Sin | Cos => 1.0,
        _ => x + 1.0,
    }
}
