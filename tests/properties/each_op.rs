//! A device against the reference, one op at a time: every value of a program is read back, and each must be what its
//! op's definition gives for the operands that the device itself computed.
//!
//! Errors thus do not add up and a choice that rounding flips does not spoil what follows, so the tolerance can be
//! tight: a small multiple, growing with the square root of the reduction length, of what rounding the operands to f32
//! once more would change.  A program that keeps no intermediate values must then give the very same bits: that proves
//! buffers, views and in-place results.

use crate::support::{difference, same_bits, values, with_all_outputs};
use proptest::prelude::*;
use rambac_ir::ops::*;
use rambac_ir::testing::{Grown, Rng};
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{DType, Graph, HostArray, Value, text};
use rambac_runtime::{Store, Tensor};
use std::collections::HashMap;

/// The plain outputs of a graph and the store afterwards.
pub type Ran = (Vec<(String, Tensor)>, Store);

/// A device: how it runs a graph as it stands, and by what factor its f32 may be less exact than the CPU's.
pub struct Run<'a> {
    pub run: &'a dyn Fn(&Graph, &Grown) -> Result<Ran, String>,
    pub slack: f64,
}

const EPS: f64 = f32::EPSILON as f64;

fn norm(a: impl Iterator<Item = f64>) -> f64 {
    a.map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &HostArray, b: &HostArray, skip: &[bool]) -> f64 {
    let equal = |i: usize| a.get(i) == b.get(i) || skip.get(i).is_some_and(|s| *s);
    norm((0..a.len()).map(|i| if equal(i) { 0.0 } else { a.get(i) - b.get(i) }))
}

/// Elements of a map's results that hang on a comparison of nearly equal values, or on whether a value is zero: their
/// last bit decides, and both answers are right.
fn undecided(m: &FusedMap, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<Vec<bool>> {
    const NEAR: f64 = 1e-5;
    let eval = |op: BinaryFn, c: f64| {
        // The left side of every comparison is moved by a few ulp, or a little.
        let mut to: Vec<u32> = (0..x.len() as u32).collect();
        let mut body: MapBody = vec![];
        for i in &m.body {
            let mut args: Vec<u32> = i.args.iter().map(|a| to[*a as usize]).collect();
            let mut f = i.f;
            if let MapFn::Binary(
                BinaryFn::Lt | BinaryFn::Le | BinaryFn::Gt | BinaryFn::Ge | BinaryFn::Eq | BinaryFn::Ne,
            ) = f
            {
                body.push(MapInst { f: MapFn::Const(c), args: vec![] });
                let c = (x.len() + body.len() - 1) as u32;
                body.push(MapInst { f: MapFn::Binary(op), args: vec![args[0], c] });
                args[0] = c + 1;
                f = MapFn::Binary(BinaryFn::Le);
            }
            body.push(MapInst { f, args });
            to.push((x.len() + body.len() - 1) as u32);
        }
        let outs = m.outs.iter().map(|o| to[*o] as usize).collect();
        let dtypes = vec![DType::F32; m.dtypes.len()];
        let y: Vec<ConcreteTy> = y.iter().map(|t| ConcreteTy { dtype: DType::F32, shape: t.shape.clone() }).collect();
        FusedMap { shape: m.shape.clone(), body, outs, dtypes }.eval(x, &y)
    };
    let moved =
        [(BinaryFn::Add, -NEAR), (BinaryFn::Add, NEAR), (BinaryFn::Mul, 1.0 - NEAR), (BinaryFn::Mul, 1.0 + NEAR)];
    let moved = moved.map(|(op, c)| eval(op, c));
    let zero = |t: &ConcreteTy, v: f64| t.dtype == DType::Bool && v != 0.0 && v.abs() < 1e-4;
    let undecided = |r: usize, i: usize| {
        let v = moved.each_ref().map(|y| y[r].get(i));
        v.iter().any(|x| (x - v[0]).abs() > 1e-3) || zero(&y[r], v[0])
    };
    (0..y.len()).map(|r| (0..y[r].elements()).map(|i| undecided(r, i)).collect()).collect()
}

/// Terms that one element of the result sums: from the op's own count of work, and the longest axis of an operand.
fn reduction_length(op: &Op, x: &[&HostArray], y: &[ConcreteTy]) -> f64 {
    let x: Vec<ConcreteTy> = x.iter().map(|a| a.ty()).collect();
    let elements = y.iter().map(ConcreteTy::elements).filter(|n| *n > 0).min().unwrap_or(1);
    let longest = x.iter().flat_map(|t| &t.shape).max().copied().unwrap_or(1);
    op.def().cost(&x, y).flops / elements as f64 + longest as f64
}

/// How far each result may be from `want`.
fn tolerances(op: &Op, x: &[&HostArray], y: &[ConcreteTy], want: &[HostArray]) -> Vec<f64> {
    let mut moved = vec![0.0f64; y.len()];
    let mut rng = Rng(11);
    for _ in 0..4 {
        let nudged: Vec<HostArray> = x
            .iter()
            .map(|a| {
                let mut a = (*a).clone();
                if let rambac_ir::host::Data::Float(v) = &mut a.data {
                    v.iter_mut().for_each(|x| *x *= 1.0 + rng.uniform(-EPS, EPS));
                }
                a
            })
            .collect();
        let out = op.def().eval(&nudged.iter().collect::<Vec<_>>(), y);
        for ((m, a), b) in moved.iter_mut().zip(&out).zip(want) {
            *m = m.max(distance(a, b, &[]));
        }
    }
    let factor = 8.0 + 4.0 * reduction_length(op, x, y).sqrt();
    let unit = magnitude(op, x);
    let size = |a: &HostArray| norm((0..a.len()).map(|i| a.get(i)).filter(|v| v.is_finite()));
    let floor = |a: &HostArray| size(a).max(unit * (a.len() as f64).sqrt());
    moved.iter().zip(want).map(|(m, a)| factor * (m + EPS * floor(a))).collect()
}

/// The magnitude of terms that may cancel inside the op, so that its result can be small and still carry their rounding.
fn magnitude(op: &Op, x: &[&HostArray]) -> f64 {
    let largest =
        |a: &HostArray| a.to_f64().into_iter().filter(|v| v.is_finite()).fold(0.0, |m: f64, v| m.max(v.abs()));
    match op {
        // A log-sum-exp less a logit may come to almost nothing.
        Op::FusedMap(_) | Op::MapEach(_) | Op::MatMulMap(_) | Op::CrossEntropy(_) | Op::LinearCrossEntropy(_) => 1.0,
        // Two terms of size |w·dy| / rms(x).
        Op::RmsNormGrad(g) => {
            let width = x[1].len();
            let rms = |row: &[f64]| (row.iter().map(|v| v * v).sum::<f64>() / width as f64 + g.eps).sqrt();
            let least = x[0].f().chunks(width.max(1)).map(rms).fold(f64::INFINITY, f64::min);
            largest(x[1]) * largest(x[2]) / least
        }
        // p·(dp - Σ p·dp) and the like: as large as the upstream gradient times the operands.
        op if op.mnemonic().ends_with("_grad") => {
            let floats = x.iter().filter(|a| a.dtype.is_float());
            floats.map(|a| largest(a).max(1.0)).product::<f64>().min(1e4)
        }
        _ => 1e-6,
    }
}

fn check_op(run: &Run, op: &Op, x: &[&HostArray], got: &[HostArray]) -> Result<(), TestCaseError> {
    let tys: Vec<ConcreteTy> = got.iter().map(HostArray::ty).collect();
    if let Op::Selection(s) = op {
        return check_selection(s, x, got);
    }
    let want = op.def().eval(x, &tys);
    let limits = tolerances(op, x, &tys, &want);
    let skip = match op {
        Op::FusedMap(m) => undecided(m, x, &tys),
        Op::MapEach(m) => {
            let (tensors, shared) = m.split(x);
            let each = |(own, y): (&[&HostArray], &[ConcreteTy])| {
                undecided(&m.map(vec![]), &own.iter().chain(shared).copied().collect::<Vec<_>>(), y)
            };
            tensors.zip(tys.chunks(m.outs.len())).flat_map(each).collect()
        }
        Op::MatMulMap(m) => {
            let ty = ConcreteTy { dtype: DType::F32, shape: tys[0].shape.clone() };
            let product = m.product().eval(&x[..2], &[ty]);
            let operands: Vec<&HostArray> = product.iter().chain(x[2..].iter().copied()).collect();
            undecided(&m.map(vec![]), &operands, &tys)
        }
        _ => vec![vec![]; got.len()],
    };
    for (r, (a, b)) in got.iter().zip(&want).enumerate() {
        let d = distance(a, b, &skip[r]);
        let ok = if a.dtype.is_float() { d <= run.slack * limits[r] } else { d == 0.0 };
        prop_assert!(
            ok,
            "result {r}: off by {d:e}, limit {:e}\n got {:?}\nwant {:?}",
            run.slack * limits[r],
            head(a),
            head(b)
        );
    }
    Ok(())
}

fn head(a: &HostArray) -> Vec<f64> {
    a.to_f64().into_iter().take(12).collect()
}

/// Near-equal scores may be taken in either order, so the choice is checked for being one of the best.
fn check_selection(s: &Selection, x: &[&HostArray], got: &[HostArray]) -> Result<(), TestCaseError> {
    let (q, lm) = (x[0], x[1]);
    let (l, h, r, c) = (q.shape[1], q.shape[2], q.shape[3], lm.shape[1]);
    let [idx, count, weights, picked] = got else { return Err(TestCaseError::fail("selection has four results")) };
    for row in 0..count.len() {
        let (b, t, head) = (row / (l * h), row / h % l, row % h);
        let mut slack = EPS;
        let scores: Vec<f64> = (0..c)
            .filter(|&k| x[2].i()[b] as i64 + t as i64 >= ((k + 1) * s.chunk) as i64)
            .map(|k| {
                let terms = (0..r).map(|j| q.f()[row * r + j] * lm.f()[((b * c + k) * h + head) * r + j] * s.scale);
                slack += EPS * (r as f64 + 4.0) * terms.clone().map(f64::abs).sum::<f64>();
                terms.sum()
            })
            .collect();
        let n = count.i()[row] as usize;
        prop_assert_eq!(n, scores.len().min(s.k), "row {} fills the wrong number of slots", row);
        let slots = &idx.i()[row * s.k..][..s.k];
        prop_assert!(slots[n..].iter().all(|i| *i == 0), "an unfilled slot holds an index");
        let chosen: Vec<f64> =
            slots[..n].iter().map(|&i| scores.get(i as usize).copied().unwrap_or(f64::NAN)).collect();
        let worst = chosen.iter().copied().fold(f64::INFINITY, f64::min);
        for (i, v) in scores.iter().enumerate().filter(|(i, _)| !slots[..n].contains(&(*i as i32))) {
            prop_assert!(*v <= worst + slack, "chunk {i} scores {v}, better than the chosen {worst}");
        }
        for i in 1..n {
            let ordered = match s.order {
                Order::Recent => slots[i] < slots[i - 1],
                Order::Score => chosen[i] <= chosen[i - 1] + slack && slots[i] != slots[i - 1],
            };
            prop_assert!(ordered, "slots {i} of row {row} are out of order: {slots:?}, scores {chosen:?}");
        }
        let w = s.rule.weights(&chosen);
        for i in 0..s.k {
            let (want_s, want_w) = if i < n { (chosen[i], w[i]) } else { (0.0, s.rule.unfilled()) };
            let (score, w) = (picked.get(row * s.k + i), weights.get(row * s.k + i));
            prop_assert!((score - want_s).abs() <= slack, "score {score} of slot {i}, wanted {want_s}");
            let near = w == want_w || (w - want_w).abs() <= 8.0 * EPS + 4.0 * slack;
            prop_assert!(near, "weight {w} of slot {i}, wanted {want_w}");
        }
    }
    Ok(())
}

/// Every node of `g` on the device, then `g` without its intermediate values as outputs.
pub fn check_graph(run: &Run, g: &Graph, like: &Grown) -> Result<(), TestCaseError> {
    let all = with_all_outputs(g);
    let fail = |e: String| TestCaseError::fail(format!("{e}\n{}", text::print(g)));
    let (out, store) = (run.run)(&all, like).map_err(fail)?;
    // An update is not among the outputs; its value is.
    let by_name: HashMap<&str, &Tensor> = out.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let value = |v: &Value| by_name[format!("v{}_{}", v.node.0, v.result).as_str()];
    let host: HashMap<Value, HostArray> = values(g).into_iter().map(|v| (v, value(&v).to_host())).collect();
    for (id, n) in g.iter() {
        let got: Vec<HostArray> = (0..n.tys.len()).map(|r| host[&id.result(r)].clone()).collect();
        if let Op::Source(s) = &n.op {
            prop_assert_eq!(&got[0], &like.sources[&s.name], "source {} changed", s.name);
            continue;
        }
        let x: Vec<&HostArray> = n.inputs.iter().map(|v| &host[v]).collect();
        check_op(run, &n.op, &x, &got).map_err(|e| {
            TestCaseError::fail(format!("{} = {:?}: {e}\n{}", g.label(id.result(0)), n.op, text::print(g)))
        })?;
    }

    let (plain, plain_store) = (run.run)(g, like).map_err(fail)?;
    // On a GPU a product of few rows may make its norm itself, by sums in another order.
    let joins = run.slack > 1.0 && g.nodes.iter().any(|n| matches!(n.op, Op::RmsNorm(_) | Op::GatedRmsNorm(_)));
    let same_bits = |a: &Tensor, b: &Tensor| match joins {
        true if a.ty().dtype.is_float() => difference(&a.to_host(), &b.to_host()) <= 1e-4,
        // What hangs on a comparison may fall otherwise.
        true => a.ty() == b.ty(),
        false => same_bits(a, b),
    };
    for (name, t) in &plain {
        let o = g.output(name).unwrap();
        prop_assert!(same_bits(t, value(&o)), "output {name} depends on what else is an output\n{}", text::print(g));
    }
    for o in g.outputs.iter().filter(|o| g.is_update(o)) {
        for s in [&store, &plain_store] {
            let t = s.get(&o.name).unwrap();
            prop_assert!(same_bits(t, value(&o.value)), "{} was not updated as told\n{}", o.name, text::print(g));
        }
    }
    for (_, s) in g.sources().filter(|(_, s)| s.kind != SourceKind::Input && g.output(&s.name).is_none()) {
        let before = Tensor::from_host(&like.sources[&s.name]);
        prop_assert!(same_bits(plain_store.get(&s.name).unwrap(), &before), "{} was overwritten", s.name);
    }
    Ok(())
}
