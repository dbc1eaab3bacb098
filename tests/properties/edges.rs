//! Selection and attention at their edges, forward and backward, on the CPU against the reference: fewer visible chunks
//! than slots, more slots than chunks, no visible chunk, equal scores, one and sixteen query heads per kv head, sequences
//! of one token, queries that start in the middle of a longer memory.

use crate::support::{difference, reference, run_cpu, with_gradients};
use rambac_ir::ops::*;
use rambac_ir::testing::{Grown, Rng};
use rambac_ir::{Bindings, Builder, HostArray, Ty, Value};
use rambac_passes::{Options, optimise};
use std::collections::HashMap;

#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    /// Query tokens and their position.
    l: usize,
    start: usize,
    chunks: usize,
    chunk: usize,
    k: usize,
    heads: usize,
    /// Query heads per kv head.
    groups: usize,
    /// All landmarks are equal.
    ties: bool,
    order: Order,
    rule: Weighting,
    off_by_one: f64,
}

const PLAIN: Case = Case {
    n: 2,
    l: 12,
    start: 0,
    chunks: 3,
    chunk: 4,
    k: 2,
    heads: 2,
    groups: 2,
    ties: false,
    order: Order::Recent,
    rule: Weighting::StickBreaking,
    off_by_one: 0.0,
};

fn grown(c: &Case) -> Grown {
    let mut b = Builder::new("edge", &[]);
    let mut rng = Rng(3);
    let mut sources = HashMap::new();
    let mut source = |b: &mut Builder, name: &str, shape: &[usize]| -> Value {
        let n = shape.iter().product();
        let a = HostArray::f32(shape, (0..n).map(|_| rng.uniform(-1.5, 1.5) as f32 as f64));
        sources.insert(name.to_string(), a);
        b.param(name, Ty::f32(shape.iter().copied()))
    };
    let (d, r) = (8, 5);
    let rq = source(&mut b, "rq", &[c.n, c.l, c.heads, r]);
    let lm = if c.ties {
        let one = source(&mut b, "lm", &[c.n, 1, c.heads, r]);
        b.broadcast(one, [c.n, c.chunks, c.heads, r].map(Into::into).to_vec())
    } else {
        source(&mut b, "lm", &[c.n, c.chunks, c.heads, r])
    };
    let q = source(&mut b, "q", &[c.n, c.l, c.heads * c.groups, d]);
    let k = source(&mut b, "k", &[c.n, c.chunks * c.chunk, c.heads, d]);
    let v = source(&mut b, "v", &[c.n, c.chunks * c.chunk, c.heads, d]);
    let dy = source(&mut b, "dy", &[c.n, c.l, c.heads * c.groups, d]);
    let start = b.constant(c.start as f64, Ty::i32([c.n]));
    let s = b.push(Score { chunk: c.chunk, scale: 0.4 }, &[rq, lm, start]);
    let i = b.push_all(Select::new(c.k, c.order), &[s]);
    let w = b.push(Weigh { rule: c.rule }, &[s, i[0], i[1]]);
    let attend = Attend { chunk: c.chunk, scale: 0.3, off_by_one: c.off_by_one, joint: false };
    let o = b.push(attend, &[q, k, v, i[0], i[1]]);
    let y = b.push(Aggregate {}, &[o, w]);
    let p = b.mul(y, dy);
    let loss = b.sum_all(p);
    for (name, v) in [("indices", i[0]), ("count", i[1]), ("weights", w), ("y", y), ("loss", loss)] {
        b.output(name, v);
    }
    Grown { graph: b.finish().unwrap(), dims: Bindings::default(), sources }
}

/// Indices must be equal, everything else nearly; fused and unfused.
fn check(c: Case) {
    let g = grown(&c);
    let graph = with_gradients(&g.graph);
    let want = reference(&graph, &g);
    let fused = optimise(&graph, &Options::default());
    let dense = |n: &Op| matches!(n, Op::Score(_) | Op::Attend(_) | Op::ScoreGrad(_) | Op::AttendGrad(_));
    assert!(!fused.nodes.iter().any(|n| dense(&n.op)), "{c:?} did not fuse");
    for (form, graph) in [("as written", &graph), ("fused", &fused)] {
        let got: HashMap<_, _> = run_cpu(graph, &g).unwrap().0.into_iter().collect();
        for (name, a) in &want {
            let d = difference(&got[name].to_host(), a);
            // The loss is a sum of terms of both signs.
            let float = if name == "loss" { 1e-5 } else { 2e-6 };
            let limit = if a.dtype.is_float() { float } else { 0.0 };
            // A gradient that is zero but for rounding has no relative error.
            let zero = a.to_f64().iter().all(|x| x.abs() < 1e-12)
                && got[name].as_f32().is_some_and(|v| v.iter().all(|x| x.abs() < 1e-5));
            assert!(d <= limit || zero, "{c:?}, {form}: {name} differs by {d:e}");
        }
    }
}

#[test]
fn fewer_visible_chunks_than_slots() {
    check(Case { k: 3, ..PLAIN });
    check(Case { k: 3, order: Order::Score, rule: Weighting::Softmax, ..PLAIN });
}

#[test]
fn more_slots_than_chunks() {
    check(Case { k: 7, ..PLAIN });
    check(Case { k: 8, rule: Weighting::Softmax, off_by_one: 1.0, ..PLAIN });
    check(Case { k: 5, chunks: 1, l: 6, ..PLAIN });
}

#[test]
fn no_visible_chunk() {
    // Not one token sees a chunk: the layer adds nothing, and zeros flow back.
    for rule in Weighting::ALL.iter().filter(|r| **r != Weighting::Logit) {
        let c = Case { l: 4, chunks: 1, rule: *rule, ..PLAIN };
        check(c);
        let g = grown(&c);
        let (out, _) = run_cpu(&optimise(&with_gradients(&g.graph), &Options::default()), &g).unwrap();
        for (name, t) in out.iter().filter(|(n, _)| n != "grad.dy") {
            let zero = t.to_host().to_f64().iter().all(|x| *x == 0.0);
            assert!(zero, "{name} is not zero though no chunk is visible");
        }
    }
}

#[test]
fn equal_scores_take_the_smaller_chunk() {
    for order in Order::ALL {
        for k in [1, 2, 3, 7] {
            let c = Case { ties: true, k, chunks: 6, l: 25, order: *order, ..PLAIN };
            check(c);
            let g = grown(&c);
            let (out, _) = run_cpu(&optimise(&g.graph, &Options::default()), &g).unwrap();
            let indices = &out.iter().find(|(n, _)| n == "indices").unwrap().1;
            let last = &indices.as_i32().unwrap()[(c.l - 1) * c.heads * k..][..k];
            let mut chosen: Vec<i32> = last[..k.min(6)].to_vec();
            chosen.sort();
            assert_eq!(chosen, (0..k.min(6) as i32).collect::<Vec<_>>(), "{order:?}, k = {k}");
        }
    }
}

#[test]
fn query_heads_per_kv_head() {
    for groups in [1, 2, 3, 16] {
        check(Case { groups, ..PLAIN });
        check(Case { groups, heads: 1, k: 3, off_by_one: 1.0, ..PLAIN });
    }
}

#[test]
fn one_token() {
    check(Case { l: 1, start: 0, ..PLAIN });
    check(Case { l: 1, start: 12, ..PLAIN });
    check(Case { l: 1, n: 1, heads: 1, groups: 1, chunks: 1, chunk: 1, k: 1, start: 1, ..PLAIN });
}

#[test]
fn a_segment_of_a_longer_text() {
    for start in [1, 3, 4, 5, 11] {
        check(Case { start, chunks: 4, chunk: 4, l: 5, k: 2, ..PLAIN });
    }
}

#[test]
fn odd_chunk_sizes() {
    for (chunk, chunks) in [(1, 9), (3, 5), (7, 2), (17, 3)] {
        check(Case { chunk, chunks, l: chunk * chunks, k: 3, ..PLAIN });
    }
}

#[test]
fn every_rule_and_order() {
    for rule in Weighting::ALL.iter().filter(|r| **r != Weighting::Logit) {
        for order in Order::ALL {
            check(Case { rule: *rule, order: *order, chunks: 5, l: 20, k: 3, ..PLAIN });
        }
    }
}
