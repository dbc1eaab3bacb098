//! Every gradient rule against central finite differences in f64, and fused ops against what they are fused from.

use rambac_ir::attr::AttrValue;
use rambac_ir::interp::{self, Precision};
use rambac_ir::ops::*;
use rambac_ir::testing::{Rng, grow, has_gradient};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{Bindings, Builder, DType, Graph, HostArray, Ty, Value};
use std::collections::{BTreeSet, HashMap};

// Values.

/// Uniform in ±1.5 but at least 0.1 from 0 and from each other's neighbourhood only by chance: no kinks nearby.
fn random(rng: &mut Rng, shape: &[usize]) -> HostArray {
    let n = shape.iter().product();
    HostArray::f32(shape, (0..n).map(|_| rng.uniform(0.1, 1.5) * if rng.one_in(2) { -1.0 } else { 1.0 }))
}
fn positive(rng: &mut Rng, shape: &[usize]) -> HostArray {
    let n = shape.iter().product();
    HostArray::f32(shape, (0..n).map(|_| rng.uniform(0.2, 1.5)))
}
fn negative(rng: &mut Rng, shape: &[usize]) -> HostArray {
    let mut a = positive(rng, shape);
    if let rambac_ir::host::Data::Float(v) = &mut a.data {
        v.iter_mut().for_each(|x| *x = -*x);
    }
    a
}
fn ints(rng: &mut Rng, shape: &[usize], below: usize) -> HostArray {
    let n: usize = shape.iter().product();
    HostArray::i32(shape, (0..n).map(|_| rng.below(below) as i32).collect())
}

fn ty_of(a: &HostArray) -> Ty {
    Ty::new(a.dtype, a.shape.iter().copied())
}

fn eval(op: &Op, x: &[HostArray]) -> Vec<HostArray> {
    let tys: Vec<Ty> = x.iter().map(ty_of).collect();
    let y = op.def().infer(&tys.iter().collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{}: {e}", op.mnemonic()));
    let y: Vec<ConcreteTy> = y.iter().map(|t| t.bind(&Bindings::default()).unwrap()).collect();
    op.def().eval(&x.iter().collect::<Vec<_>>(), &y)
}

/// `Σ dy·y` over float results where `dy` isn't 0.
fn dot(y: &[HostArray], dy: &[Option<HostArray>]) -> f64 {
    let one = |(y, dy): (&HostArray, &Option<HostArray>)| match dy {
        Some(d) => y.f().iter().zip(d.f()).filter(|(_, d)| **d != 0.0).map(|(y, d)| y * d).sum(),
        None => 0.0,
    };
    y.iter().zip(dy).map(one).sum()
}

fn assert_close(what: &str, a: f64, b: f64, tolerance: f64) {
    let scale = 1.0 + a.abs().max(b.abs());
    // -inf is itself.
    assert!(a == b || (a - b).abs() <= tolerance * scale, "{what}: {a} vs {b} (difference {:e})", (a - b).abs());
}

fn assert_arrays(what: &str, a: &HostArray, b: &HostArray) {
    assert_eq!(a.ty(), b.ty(), "{what}");
    for (i, (x, y)) in a.to_f64().into_iter().zip(b.to_f64()).enumerate() {
        assert_close(&format!("{what}[{i}]"), x, y, 1e-12);
    }
}

/// Central difference of `f` at element `i` of operand `k`.
fn slope(x: &[HostArray], k: usize, i: usize, f: impl Fn(&[HostArray]) -> f64) -> f64 {
    let h = 1e-5;
    let moved = |by: f64| {
        let mut x = x.to_vec();
        if let rambac_ir::host::Data::Float(v) = &mut x[k].data {
            v[i] += by;
        }
        f(&x)
    };
    (moved(h) - moved(-h)) / (2.0 * h)
}

/// Compares the gradients that `op` emits with finite differences, once with gradients at all float results and once
/// with each alone (the others get none).
fn check_vjp(op: &Op, x: &[HostArray], rng: &mut Rng) {
    let y = eval(op, x);
    // A score of -inf doesn't move; no gradient may be given to it.
    let dy: Vec<Option<HostArray>> = y
        .iter()
        .map(|y| {
            y.dtype.is_float().then(|| {
                let v = y.f().iter().map(|v| if v.is_finite() { rng.uniform(-1.0, 1.0) } else { 0.0 }).collect();
                HostArray::float(y.dtype, &y.shape, v)
            })
        })
        .collect();
    check_vjp_at(op, x, &dy);
    let some = dy.iter().filter(|d| d.is_some()).count();
    for i in (0..dy.len()).filter(|&i| some > 1 && dy[i].is_some()) {
        let alone: Vec<_> = dy.iter().enumerate().map(|(j, d)| if i == j { d.clone() } else { None }).collect();
        check_vjp_at(op, x, &alone);
    }
}

fn check_vjp_at(op: &Op, x: &[HostArray], dy: &[Option<HostArray>]) {
    let mut b = Builder::new("vjp", &[]);
    let mut sources = HashMap::new();
    let mut source = |b: &mut Builder, name: String, a: &HostArray| {
        let v = b.input(&name, ty_of(a));
        sources.insert(name, a.clone());
        v
    };
    let xs: Vec<Value> = x.iter().enumerate().map(|(i, a)| source(&mut b, format!("x{i}"), a)).collect();
    let dys: Vec<Option<Value>> =
        dy.iter().enumerate().map(|(i, a)| a.as_ref().map(|a| source(&mut b, format!("dy{i}"), a))).collect();
    let ys = b.push_all(op.clone(), &xs);
    let ys = &ys[..dy.len()];
    let grads = op.def().vjp(&mut Vjp::new(&mut b, &xs, ys, &dys)).unwrap_or_else(|e| panic!("{}: {e}", op.mnemonic()));
    assert_eq!(grads.len(), x.len(), "{}: a gradient per operand", op.mnemonic());
    let g = b.finish().unwrap_or_else(|e| panic!("{}: {e}", op.mnemonic()));
    rambac_ir::verify::verify(&g).unwrap_or_else(|e| panic!("{}: {e:?}", op.mnemonic()));
    let wanted: Vec<Value> = grads.iter().flatten().copied().collect();
    let mut given = interp::run(&g, &Bindings::default(), &sources, &wanted, Precision::Exact).unwrap().into_iter();
    for (k, grad) in grads.iter().enumerate() {
        let given = grad.map(|_| given.next().unwrap());
        if !x[k].dtype.is_float() {
            assert!(given.is_none(), "{}: operand {k} is {} and can't have a gradient", op.mnemonic(), x[k].dtype);
            continue;
        }
        if let Some(a) = &given {
            assert_eq!(a.ty(), x[k].ty(), "{}: gradient at operand {k}", op.mnemonic());
        }
        // At most 40 elements of every operand, spread out.
        let step = x[k].len().div_ceil(40).max(1);
        for i in (0..x[k].len()).step_by(step) {
            let want = slope(x, k, i, |x| dot(&eval(op, x), dy));
            let have = given.as_ref().map_or(0.0, |a| a.get(i));
            assert_close(
                &format!("{op:?} of {:?}: d/dx{k}[{i}]", x.iter().map(ty_of).collect::<Vec<_>>()),
                have,
                want,
                2e-7,
            );
        }
    }
}

// Cases.

struct Cases {
    rng: Rng,
    covered: BTreeSet<&'static str>,
}

impl Cases {
    fn check(&mut self, op: impl Into<Op>, x: Vec<HostArray>) {
        let op = op.into();
        check_vjp(&op, &x, &mut self.rng);
        self.covered.insert(op.mnemonic());
    }
    fn random(&mut self, shape: &[usize]) -> HostArray {
        random(&mut self.rng, shape)
    }
    fn positive(&mut self, shape: &[usize]) -> HostArray {
        positive(&mut self.rng, shape)
    }
}

fn elementwise(c: &mut Cases) {
    // `detach` has none by definition; see `detached_values_have_no_gradient`.
    c.covered.insert("detach");
    for &f in UnaryFn::ALL.iter().filter(|f| **f != UnaryFn::Detach) {
        let domain = matches!(f, UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt);
        let x = if domain { c.positive(&[3, 7]) } else { c.random(&[3, 7]) };
        c.check(Unary { f }, vec![x]);
        let scalar = c.positive(&[]);
        c.check(Unary { f }, vec![scalar]);
    }
    for &f in BinaryFn::ALL {
        let x = vec![c.random(&[3, 7]), c.random(&[3, 7])];
        c.check(Binary { f }, x);
        if f != BinaryFn::Div {
            let x = vec![ints(&mut c.rng, &[5], 9), ints(&mut c.rng, &[5], 9)];
            c.check(Binary { f }, x);
        }
    }
    let cond = HostArray::bool(&[2, 3], vec![true, false, true, true, false, false]);
    let x = vec![cond.clone(), c.random(&[2, 3]), c.random(&[2, 3])];
    c.check(Where {}, x);
    let x = vec![cond, ints(&mut c.rng, &[2, 3], 5), ints(&mut c.rng, &[2, 3], 5)];
    c.check(Where {}, x);
    for to in DType::ALL {
        let x = c.random(&[17]);
        c.check(Cast { to }, vec![x]);
    }
    let x = ints(&mut c.rng, &[3], 4);
    c.check(Cast { to: DType::F32 }, vec![x]);
}

fn shapes(c: &mut Cases) {
    for (from, to) in
        [(vec![], vec![2, 3]), (vec![3], vec![2, 3]), (vec![2, 1, 3], vec![4, 2, 7, 3]), (vec![1], vec![1, 1])]
    {
        let x = c.random(&from);
        c.check(Broadcast { shape: to.into_iter().map(Into::into).collect() }, vec![x]);
    }
    let x = c.random(&[6, 7]);
    c.check(Reshape { shape: [2, 21].map(Into::into).to_vec() }, vec![x]);
    let x = c.random(&[2, 3, 7]);
    c.check(Transpose { perm: vec![2, 0, 1] }, vec![x]);
    let x = c.random(&[]);
    c.check(Transpose { perm: vec![] }, vec![x]);
    for (start, end) in [(0, 7), (2, 5), (6, 7), (3, 3)] {
        let x = c.random(&[2, 7, 3]);
        c.check(Slice { axis: 1, start, end }, vec![x]);
    }
    for (before, after) in [(0, 0), (2, 0), (1, 3)] {
        let x = c.random(&[2, 7]);
        c.check(Pad { axis: 1, before, after }, vec![x]);
    }
    let x = vec![c.random(&[2, 1, 3]), c.random(&[2, 7, 3]), c.random(&[2, 2, 3])];
    c.check(Concat { axis: 1 }, x);
    let x = c.random(&[3]);
    c.check(Concat { axis: 0 }, vec![x]);
    // Integers move without gradients.
    let x = ints(&mut c.rng, &[2, 3], 9);
    c.check(Broadcast { shape: [4, 2, 3].map(Into::into).to_vec() }, vec![x.clone()]);
    c.check(Slice { axis: 1, start: 1, end: 2 }, vec![x.clone()]);
    c.check(Pad { axis: 1, before: 1, after: 2 }, vec![x.clone()]);
    c.check(Concat { axis: 1 }, vec![x.clone(), x.clone()]);
    c.check(Reshape { shape: vec![6.into()] }, vec![x.clone()]);
    c.check(Transpose { perm: vec![1, 0] }, vec![x]);
}

fn reductions(c: &mut Cases) {
    for &f in ReduceFn::ALL {
        for (axes, keep) in [(vec![], false), (vec![1], false), (vec![0, 2], true), (vec![0, 1, 2], false)] {
            let x = c.random(&[2, 3, 7]);
            c.check(Reduce { f, axes, keep }, vec![x]);
        }
    }
    let many = vec![c.random(&[2, 3]), c.random(&[5]), c.random(&[1, 2, 2])];
    c.check(SumSquares {}, many);
    for (trans_a, trans_b) in [(false, false), (false, true), (true, false), (true, true)] {
        for (batch, m, k, n) in [(vec![], 3, 7, 2), (vec![2], 1, 3, 7), (vec![2, 3], 2, 1, 1)] {
            let pair = |a, b, t: bool| if t { [b, a] } else { [a, b] };
            let x = vec![
                c.random(&[&batch[..], &pair(m, k, trans_a)].concat()),
                c.random(&[&batch[..], &pair(k, n, trans_b)].concat()),
            ];
            c.check(MatMul { trans_a, trans_b }, x);
        }
        if !trans_a {
            // One matrix for all rows.
            let x = vec![c.random(&[2, 3, 5, 7]), c.random(&if trans_b { [2, 7] } else { [7, 2] })];
            c.check(MatMul { trans_a, trans_b }, x);
        }
    }
}

fn layers(c: &mut Cases) {
    for shape in [vec![7], vec![3, 1], vec![2, 3, 17]] {
        let x = vec![c.random(&shape), c.random(&shape[shape.len() - 1..])];
        c.check(RmsNorm { eps: 1e-5 }, x);
        let x = vec![c.random(&shape), c.random(&shape), c.random(&shape[shape.len() - 1..])];
        c.check(GatedRmsNorm { eps: 1e-5 }, x);
    }
    for inverse in [false, true] {
        let x = c.random(&[2, 5, 3, 6]);
        c.check(Rotary { base: 100.0, inverse }, vec![x]);
    }
    // Repeated ids add up; ids outside the table give nothing.
    let x = vec![HostArray::i32(&[2, 3], vec![0, 4, 0, -1, 5, 2]), c.random(&[5, 7])];
    c.check(Embedding {}, x);
    let x = vec![c.random(&[2, 3, 7]), HostArray::i32(&[2, 3], vec![0, 6, -100, 3, 3, -100])];
    c.check(CrossEntropy { ignore: -100 }, x);
    let x = vec![c.random(&[3, 1]), HostArray::i32(&[3], vec![0, 0, 0])];
    c.check(CrossEntropy { ignore: -100 }, x);
    let x = vec![c.random(&[2, 3, 5]), c.random(&[7, 5]), HostArray::i32(&[2, 3], vec![0, 6, -100, 3, 3, -100])];
    c.check(LinearCrossEntropy { ignore: -100 }, x);
    let x = vec![c.random(&[3, 1]), c.random(&[1, 1]), HostArray::i32(&[3], vec![0, 0, 0])];
    c.check(LinearCrossEntropy { ignore: 7 }, x);
    for (n, l, ch, k) in [(2, 7, 3, 4), (1, 1, 2, 4), (2, 2, 1, 4), (2, 3, 2, 1)] {
        for silu in [true, false] {
            let x = vec![c.random(&[n, l, ch]), c.random(&[ch, 1, k]), c.random(&[ch]), c.random(&[n, k - 1, ch])];
            c.check(CausalConv1d { silu }, x);
        }
    }
    for (n, l, m, p, g, r) in [(2, 7, 3, 2, 1, 3), (1, 1, 1, 1, 1, 1), (1, 17, 4, 1, 2, 2), (2, 3, 2, 3, 2, 1)] {
        let x = vec![
            c.random(&[n, l, m, p]),
            c.positive(&[n, l, m]),
            negative(&mut c.rng, &[m]),
            c.random(&[n, l, g, r]),
            c.random(&[n, l, g, r]),
            c.random(&[m]),
            c.random(&[n, m, p, r]),
        ];
        c.check(SelectiveScan { block: 64 }, x);
    }
    for (b, t, hq, hk, d) in [(2, 5, 4, 2, 3), (1, 1, 1, 1, 1), (1, 3, 16, 1, 2), (2, 7, 2, 2, 1)] {
        for causal in [false, true] {
            let x = vec![c.random(&[b, t, hq, d]), c.random(&[b, t, hk, d]), c.random(&[b, t, hk, d])];
            c.check(Attention::new(0.7, causal), x.clone());
            c.check(Attention { lse: true, ..Attention::new(0.7, causal) }, x.clone());
            for (window, local) in [(1, 0), (3, 0), (0, 2), (2, 3)].into_iter().filter(|_| causal) {
                c.check(Attention { window, local, lse: t % 2 == 1, ..Attention::new(0.7, true) }, x.clone());
            }
        }
        for unit in [1, 2, 7] {
            let x = vec![c.random(&[b, t, hq, d]), c.random(&[b, t / unit, hk, d]), c.random(&[b, t / unit, hk, d])];
            c.check(Attention { unit, lse: true, ..Attention::new(0.7, false) }, x);
        }
    }
    for shape in [vec![1], vec![3, 4], vec![2, 3, 1, 5]] {
        let x = c.random(&shape);
        c.check(Softmax {}, vec![x]);
    }
    let x = HostArray::f32(
        &[2, 3],
        [f64::NEG_INFINITY, 0.5, -1.0, f64::NEG_INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY],
    );
    c.check(Softmax {}, vec![x]);
    for (n, l, hq, h, d, parts) in [(2, 3, 4, [4, 2, 1], 3, 3), (1, 1, 1, [1, 1, 1], 1, 1), (1, 2, 6, [3, 6, 6], 2, 2)]
    {
        let x = (0..parts).flat_map(|i| [c.random(&[n, l, hq, d]), c.random(&[n, l, h[i]])]).collect();
        c.check(Merge {}, x);
    }
}

/// What `detach` gives is `x`, and nothing flows back.
#[test]
fn detached_values_have_no_gradient() {
    let mut rng = Rng(5);
    let (x, dy) = (random(&mut rng, &[3, 7]), random(&mut rng, &[3, 7]));
    assert_eq!(eval(&Unary { f: UnaryFn::Detach }.into(), std::slice::from_ref(&x))[0], x);
    let mut b = Builder::new("g", &[]);
    let (xv, dyv) = (b.input("x", ty_of(&x)), b.input("dy", ty_of(&dy)));
    let op = Unary { f: UnaryFn::Detach };
    let y = b.push_all(op.clone(), &[xv]);
    let d = op.vjp(&mut Vjp::new(&mut b, &[xv], &y, &[Some(dyv)])).unwrap()[0].unwrap();
    let sources = HashMap::from([("x".to_string(), x.clone()), ("dy".to_string(), dy)]);
    let g = b.finish().unwrap();
    let got = interp::run(&g, &Bindings::default(), &sources, &[d], Precision::Exact).unwrap();
    assert_eq!(got[0], HostArray::filled(&x.ty(), 0.0));
}

/// Sizes of a selecting layer: batch, tokens, kv heads, query heads per kv head, chunks, chunk size, k, first position.
type Sizes = (usize, usize, usize, usize, usize, usize, usize, usize);
const SELECTIONS: [Sizes; 7] = [
    (2, 7, 2, 2, 3, 2, 2, 0),  // all stages: none, some, all chunks visible
    (1, 1, 1, 1, 1, 1, 1, 0),  // nothing visible at all
    (1, 1, 1, 1, 1, 1, 1, 1),  // one token that sees the only chunk
    (2, 3, 1, 16, 3, 3, 2, 9), // sixteen query heads per kv head, everything visible
    (1, 5, 3, 1, 2, 2, 7, 1),  // k larger than the number of chunks
    (1, 4, 1, 2, 7, 1, 3, 1),  // fewer visible chunks than k at first
    (2, 17, 1, 3, 17, 1, 3, 0),
];

struct Layer {
    q: HostArray,
    landmarks: HostArray,
    start: HostArray,
    queries: HostArray,
    keys: HostArray,
    values: HostArray,
    chunk: usize,
    k: usize,
}

fn layer(rng: &mut Rng, (n, l, h, g, c, chunk, k, start): Sizes) -> Layer {
    Layer {
        q: random(rng, &[n, l, h, 3]),
        landmarks: random(rng, &[n, c, h, 3]),
        // Rows of a batch may stand at different places.
        start: HostArray::i32(&[n], (0..n).map(|i| (start + i * chunk) as i32).collect()),
        queries: random(rng, &[n, l, h * g, 2]),
        keys: random(rng, &[n, c * chunk, h, 2]),
        values: random(rng, &[n, c * chunk, h, 2]),
        chunk,
        k,
    }
}

fn selecting(c: &mut Cases) {
    for (chunk, shape) in [(1, vec![2, 3]), (3, vec![1, 6, 2]), (7, vec![2, 7, 2, 3])] {
        let x = c.random(&shape);
        for &mode in Summary::ALL {
            c.check(Summarise { chunk, mode }, vec![x.clone()]);
        }
    }
    for sizes in SELECTIONS {
        let a = layer(&mut c.rng, sizes);
        let (chunk, k) = (a.chunk, a.k);
        let score = Score { chunk, scale: 0.8 };
        c.check(score.clone(), vec![a.q.clone(), a.landmarks.clone(), a.start.clone()]);
        // Several query heads share the landmarks of one head.
        let many = random(&mut c.rng, &[a.q.shape[0], a.q.shape[1], 3 * a.q.shape[2], 3]);
        c.check(score.clone(), vec![many, a.landmarks.clone(), a.start.clone()]);
        let dense = c.random(&[a.q.shape[0], a.q.shape[1], a.q.shape[2], a.landmarks.shape[1]]);
        c.check(Mask { chunk }, vec![dense, a.start.clone()]);
        let s = eval(&score.into(), &[a.q, a.landmarks, a.start]).remove(0);
        for &order in Order::ALL {
            let select = Select::new(k, order);
            c.check(select.clone(), vec![s.clone()]);
            let chosen = eval(&select.into(), std::slice::from_ref(&s));
            for &rule in Weighting::ALL {
                c.check(Weigh { rule }, vec![s.clone(), chosen[0].clone(), chosen[1].clone()]);
            }
            for off_by_one in [0.0, 1.0] {
                let x = [&a.queries, &a.keys, &a.values, &chosen[0], &chosen[1]].map(Clone::clone).to_vec();
                for joint in [false, true] {
                    c.check(Attend { chunk, scale: 0.6, off_by_one, joint }, x.clone());
                }
            }
        }
        let (n, l, h, g, ..) = sizes;
        let x = vec![c.random(&[n, l, h * g, k, 2]), c.random(&[n, l, h, k])];
        c.check(Aggregate {}, x);
        let x = vec![c.random(&[n, l, h * g, 2]), c.random(&[n, l, h * g, 2]), c.random(&[n, l, h, 2])];
        c.check(Aggregate {}, x);
    }
}

fn sources(c: &mut Cases) {
    let ty = Ty::f32([2usize, 3]);
    let mut all: Vec<Op> =
        vec![Constant { value: 0.5, ty: ty.clone() }.into(), Iota { axis: 1, ty: ty.clone() }.into()];
    for kind in [SourceKind::Input, SourceKind::Param, SourceKind::State] {
        all.push(Source { kind, name: "x".into(), ty: ty.clone() }.into());
    }
    for op in all {
        let mut b = Builder::new("g", &[]);
        let y = b.push_all(op.clone(), &[]);
        assert_eq!(op.def().vjp(&mut Vjp::new(&mut b, &[], &y, &[None])), Ok(vec![]));
        c.covered.insert(op.mnemonic());
    }
}

#[test]
fn gradients_match_finite_differences() {
    let mut c = Cases { rng: Rng(7), covered: BTreeSet::new() };
    for part in [elementwise, shapes, reductions, layers, selecting, sources] {
        part(&mut c);
    }
    let missing: Vec<_> = Op::mnemonics().into_iter().filter(|m| has_gradient(m) && !c.covered.contains(m)).collect();
    assert!(missing.is_empty(), "no gradient test for {missing:?}: add a case to this file");
}

/// The ops that the test above leaves out say themselves that they have no gradient.
#[test]
fn the_others_refuse() {
    let mut rng = Rng(3);
    let mut left: BTreeSet<&str> = Op::mnemonics().into_iter().filter(|m| !has_gradient(m)).collect();
    for seed in 0..40 {
        let steps: Vec<(u16, u64)> = (0..Op::mnemonics().len()).map(|op| (op as u16, rng.bits())).collect();
        let g = grow(seed, &steps, false).graph;
        for (id, n) in g.iter().filter(|(_, n)| !has_gradient(n.op.mnemonic())) {
            let mut b = Builder::extend(g.clone());
            let y: Vec<Value> = (0..n.tys.len()).map(|r| id.result(r)).collect();
            let dy = vec![None; y.len()];
            assert_eq!(n.op.def().vjp(&mut Vjp::new(&mut b, &n.inputs, &y, &dy)), Err(OpError::NoGradient));
            left.remove(n.op.mnemonic());
        }
    }
    assert!(left.is_empty(), "never grown: {left:?}");
}

// Fused ops.

#[test]
fn selection_is_score_select_weigh() {
    let mut rng = Rng(11);
    for sizes in SELECTIONS {
        for (&order, &rule) in Order::ALL.iter().flat_map(|o| Weighting::ALL.iter().map(move |w| (o, w))) {
            let a = layer(&mut rng, sizes);
            let (chunk, k, scale) = (a.chunk, a.k, 0.8);
            let x = [a.q.clone(), a.landmarks.clone(), a.start];
            let fused = eval(&Selection { chunk, scale, k, order, rule }.into(), &x);
            let s = eval(&Score { chunk, scale }.into(), &x).remove(0);
            let chosen = eval(&Select::new(k, order).into(), std::slice::from_ref(&s));
            let w = eval(&Weigh { rule }.into(), &[s.clone(), chosen[0].clone(), chosen[1].clone()]).remove(0);
            let what = format!("{sizes:?} {} {}", order.to_attr(), rule.to_attr());
            assert_eq!((&fused[0], &fused[1]), (&chosen[0], &chosen[1]), "{what}");
            assert_arrays(&what, &fused[2], &w);

            // Backward.
            let dw = random(&mut rng, &w.shape);
            let ds = eval(&WeighGrad { rule }.into(), &[s, chosen[0].clone(), chosen[1].clone(), dw.clone()]).remove(0);
            let composed = eval(&ScoreGrad { scale }.into(), &[a.q.clone(), a.landmarks.clone(), ds]);
            let [i, n, w, s] = [0, 1, 2, 3].map(|i| fused[i].clone());
            let grads = eval(&SelectionGrad { scale, rule }.into(), &[a.q, a.landmarks, i, n, s, w, dw]);
            grads.iter().zip(&composed).for_each(|(a, b)| assert_arrays(&what, a, b));
        }
    }
}

#[test]
fn chunk_attention_is_aggregate_attend() {
    let mut rng = Rng(13);
    for sizes in SELECTIONS {
        for off_by_one in [0.0, 1.0] {
            let a = layer(&mut rng, sizes);
            let (chunk, scale) = (a.chunk, 0.6);
            let rule = Weighting::StickBreaking;
            let select = Selection { chunk, scale: 0.8, k: a.k, order: Order::Recent, rule };
            let chosen = eval(&select.into(), &[a.q, a.landmarks, a.start]);
            let mut x = vec![a.queries, a.keys, a.values, chosen[0].clone(), chosen[1].clone()];
            let o = eval(&Attend { chunk, scale, off_by_one, joint: false }.into(), &x).remove(0);
            let w = chosen[2].clone();
            let y = eval(&Aggregate {}.into(), &[o.clone(), w.clone()]).remove(0);
            let dy = random(&mut rng, &y.shape);
            let d = eval(&AggregateGrad {}.into(), &[o, w.clone(), dy.clone()]);
            let grad = AttendGrad { chunk, scale, off_by_one, joint: false };
            let mut composed = eval(&grad.into(), &[&x[..], &d[..1]].concat());
            composed.push(d[1].clone());

            x.push(w);
            let what = format!("{sizes:?} off by {off_by_one}");
            assert_arrays(&what, &eval(&ChunkAttention { chunk, scale, off_by_one }.into(), &x)[0], &y);
            x.push(dy);
            let grads = eval(&ChunkAttentionGrad { chunk, scale, off_by_one }.into(), &x);
            // Unfilled slots have no weight; what the composition says of them is only zeros.
            assert_eq!(grads.len(), composed.len());
            grads.iter().zip(&composed).for_each(|(a, b)| assert_arrays(&what, a, b));
        }
    }
}

#[test]
fn linear_cross_entropy_is_matmul_cross_entropy() {
    let mut rng = Rng(19);
    for (n, l, d, v, ignore) in [(2, 3, 5, 7, -100), (1, 1, 1, 1, 3), (1, 4, 2, 3, 1)] {
        let (h, w) = (random(&mut rng, &[n, l, d]), random(&mut rng, &[v, d]));
        let (labels, dy) = (ints(&mut rng, &[n, l], v), random(&mut rng, &[n, l]));
        let logits = eval(&MatMul { trans_a: false, trans_b: true }.into(), &[h.clone(), w.clone()]).remove(0);
        let loss = eval(&CrossEntropy { ignore }.into(), &[logits.clone(), labels.clone()]).remove(0);
        let dz = eval(&CrossEntropyGrad { ignore }.into(), &[logits, labels.clone(), dy.clone()]).remove(0);
        let dh = eval(&MatMul { trans_a: false, trans_b: false }.into(), &[dz.clone(), w.clone()]).remove(0);
        let flat = [dz.reshaped(&[n * l, v]), h.reshaped(&[n * l, d])];
        let dw = eval(&MatMul { trans_a: true, trans_b: false }.into(), &flat).remove(0);
        let fused = eval(&LinearCrossEntropy { ignore }.into(), &[h.clone(), w.clone(), labels.clone()]);
        assert_arrays("losses", &fused[0], &loss);
        let fused = eval(&LinearCrossEntropyGrad { ignore }.into(), &[h, w, labels, dy]);
        for (what, a, b) in [("dh", &fused[0], &dh), ("dw", &fused[1], &dw), ("losses", &fused[2], &loss)] {
            assert_arrays(what, a, b);
        }
    }
}

// A whole layer.

/// Gradients of scalar `loss` at `wrt`, by a plain reverse loop over the nodes.
fn backward(g: Graph, loss: Value, wrt: &[Value]) -> (Graph, Vec<Value>) {
    let nodes = g.nodes.clone();
    let mut b = Builder::extend(g);
    let mut d: HashMap<Value, Value> = HashMap::new();
    let one = b.scalar_like(1.0, loss);
    d.insert(loss, one);
    for (i, n) in nodes.iter().enumerate().rev() {
        let y: Vec<Value> = (0..n.tys.len()).map(|r| rambac_ir::NodeId(i as u32).result(r)).collect();
        let dy: Vec<Option<Value>> = y.iter().map(|y| d.get(y).copied()).collect();
        if dy.iter().all(Option::is_none) {
            continue;
        }
        let dx = n.op.def().vjp(&mut Vjp::new(&mut b, &n.inputs, &y, &dy)).unwrap();
        for (x, dx) in n.inputs.iter().zip(dx) {
            if let Some(dx) = dx {
                let sum = if let Some(&old) = d.get(x) { b.add(old, dx) } else { dx };
                d.insert(*x, sum);
            }
        }
    }
    let out = wrt.iter().map(|v| d[v]).collect();
    (b.finish().unwrap(), out)
}

#[test]
fn a_whole_layer_has_its_gradient() {
    let mut rng = Rng(17);
    for (sizes, &rule) in SELECTIONS.into_iter().zip(Weighting::ALL.iter().filter(|w| **w != Weighting::One).cycle()) {
        let a = layer(&mut rng, sizes);
        let mut b = Builder::new("layer", &[]);
        let arrays = [a.q, a.landmarks, a.queries, a.keys, a.values, a.start];
        let names = ["q", "landmarks", "queries", "keys", "values", "start"];
        let v: Vec<Value> = names.iter().zip(&arrays).map(|(n, a)| b.input(n, ty_of(a))).collect();
        let s = b.push(Score { chunk: a.chunk, scale: 0.8 }, &[v[0], v[1], v[5]]);
        let i = b.push_all(Select::new(a.k, Order::Recent), &[s]);
        let w = b.push(Weigh { rule }, &[s, i[0], i[1]]);
        let o = b.push(
            Attend { chunk: a.chunk, scale: 0.6, off_by_one: 1.0, joint: false },
            &[v[2], v[3], v[4], i[0], i[1]],
        );
        let y = b.push(Aggregate {}, &[o, w]);
        let y = b.square(y);
        let loss = b.sum_all(y);
        let (g, grads) = backward(b.finish().unwrap(), loss, &v[..5]);
        rambac_ir::verify::verify(&g).unwrap_or_else(|e| panic!("{e:?}"));
        let run = |x: &[HostArray], wanted: &[Value]| {
            let sources = names.iter().map(|n| n.to_string()).zip(x.iter().cloned()).collect();
            interp::run(&g, &Bindings::default(), &sources, wanted, Precision::Exact).unwrap()
        };
        let given = run(&arrays, &grads);
        for k in 0..5 {
            let step = arrays[k].len().div_ceil(12);
            for e in (0..arrays[k].len()).step_by(step) {
                let want = slope(&arrays, k, e, |x| run(x, &[loss])[0].get(0));
                assert_close(&format!("{sizes:?}: d/d{}[{e}]", names[k]), given[k].get(e), want, 1e-6);
            }
        }
    }
}
