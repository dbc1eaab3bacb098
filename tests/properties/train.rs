//! Training and inference of the tiny preset: the same bits on any number of threads, the same gradients with and
//! without recomputation, the same hidden states for any split of a text.

use crate::support::{pool, session_graphs, threads};
use rambac_codegen::lower;
use rambac_ir::Bindings;
use rambac_models::data::{PasskeyMix, PasskeyTask, Task};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule, init_tensor, preset};
use rambac_passes::train_step::{AdamW, gradient_graph};
use rambac_passes::{Options, optimise};
use rambac_runtime::chunk_store::Precision;
use rambac_runtime::{Executor, MicroBatch, Session, SessionOptions, Store, Tensor, Trainer};
use std::sync::Arc;

fn weights(c: &Config) -> Store {
    let mut store = Store::default();
    for s in c.parameters_with(InitRule::FanIn) {
        store.insert(s.name.clone(), Tensor::f32(&s.shape, init_tensor(&s, 5)));
    }
    store
}

fn batch(step: u64, n: usize, len: usize, carry: bool) -> MicroBatch {
    let b = PasskeyTask::new(3, PasskeyMix::default()).unwrap().batch(step, n, len).unwrap();
    let shape = [n, len];
    let mut inputs = vec![
        ("input_ids", Tensor::i32(&shape, b.input_ids)),
        ("labels", Tensor::i32(&shape, b.labels)),
        ("loss_weights", Tensor::f32(&shape, b.loss_weights)),
    ];
    if carry {
        inputs.push(("carry", Tensor::f32(&[n], (0..n).map(|i| (i % 2) as f32).collect())));
    }
    MicroBatch { dims: Bindings::new([("N", n), ("L", len)]), inputs }
}

/// The store after three steps.
fn three_steps(pool: Arc<rayon::ThreadPool>, parts: usize, carry: Carry, recompute: bool) -> Store {
    let c = preset("tiny").unwrap();
    let loss = stack::loss(&c, carry, false).unwrap();
    let opt = AdamW { warmup: 1, ..AdamW::default() };
    let options = Options { recompute, ..Options::default() };
    let mut t = Trainer::new(&loss, &opt, |n| n.ends_with("proj.weight"), parts, &options, weights(&c), pool).unwrap();
    for step in 0..3 {
        let batches: Vec<MicroBatch> = (0..parts as u64)
            .map(|i| batch(step * parts as u64 + i, 2, 192 + 16 * step as usize, carry == Carry::States))
            .collect();
        let report = t.step(step, &batches).unwrap();
        assert!(report.loss.is_finite() && report.grad_norm > 0.0, "{report:?}");
    }
    t.store
}

fn assert_same_bits(what: &str, a: &Store, b: &Store) {
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>(), "{what}");
    for (name, t) in &a.0 {
        assert!(crate::support::same_bits(t, b.get(name).unwrap()), "{what}: {name} has other bits");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for (parts, carry, recompute) in [(1, Carry::Zero, false), (2, Carry::States, true)] {
        let one = three_steps(threads(1), parts, carry, recompute);
        for n in [2, 3] {
            assert_same_bits(&format!("{n} threads"), &one, &three_steps(threads(n), parts, carry, recompute));
        }
    }
}

#[test]
fn recomputation_keeps_every_gradient() {
    let c = preset("tiny").unwrap();
    let g = gradient_graph(&stack::loss(&c, Carry::Zero, false).unwrap()).unwrap();
    let m = batch(0, 2, 256, false);
    let views: Vec<_> = m.inputs.iter().map(|(n, t)| (*n, t.view())).collect();
    let run = |recompute| {
        let mut e = Executor::new(lower(&optimise(&g, &Options { recompute, ..Options::default() })), pool());
        e.run(&m.dims, &views, &mut weights(&c)).unwrap()
    };
    let (kept, again) = (run(false), run(true));
    assert_eq!(kept.len(), again.len());
    for ((name, a), (_, b)) in kept.iter().zip(&again) {
        let (a, b) = (a.as_f32().unwrap(), b.as_f32().unwrap());
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let d = norm(&mut a.iter().zip(b).map(|(x, y)| f64::from(x - y)));
        let n = norm(&mut a.iter().map(|x| f64::from(*x)));
        assert!(d <= 1e-6 * n, "{name}: off by {:e}", d / n);
    }
}

fn session(c: &Config) -> Session {
    let options = SessionOptions { precision: Precision::F32, ..SessionOptions::default() };
    Session::new(&session_graphs(c), weights(c), pool(), &options).unwrap()
}

/// Logits of a text fed in these segments, the last one repeated to the end.
fn logits(s: &mut Session, ids: &[i32], segments: &[usize]) -> Vec<f32> {
    s.reset().unwrap();
    let (mut at, mut i, mut hidden) = (0, 0, vec![]);
    while at < ids.len() {
        let n = segments[i.min(segments.len() - 1)].min(ids.len() - at);
        hidden.extend(s.feed(0, &ids[at..at + n]).unwrap().hidden);
        (at, i) = (at + n, i + 1);
    }
    assert_eq!(s.position(0), ids.len());
    s.logits(&hidden).unwrap()
}

fn assert_close(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0f32, f32::max) / scale;
    assert!(worst <= 2e-5, "{what}: off by {worst:e}");
}

#[test]
fn any_split_of_a_text_is_the_whole() {
    let mut no_encoder = preset("tiny").unwrap();
    no_encoder.encoder_layers = 0;
    let plain = Config { num_upper_groups: 0, num_upper_layers: 0, ..preset("tiny").unwrap() };
    for c in [preset("tiny").unwrap(), no_encoder, plain] {
        let b = batch(9, 1, 208, false);
        let Some(ids) = b.inputs[0].1.as_i32() else { panic!("ids are integers") };
        let g = optimise(&stack::forward(&c, false).unwrap(), &Options::default());
        let mut e = Executor::new(lower(&g), pool());
        let whole = e.run(&b.dims, &[("input_ids", b.inputs[0].1.view())], &mut weights(&c)).unwrap();
        let whole = whole[0].1.as_f32().unwrap();
        let mut s = session(&c);
        for segments in [&[208][..], &[1], &[16], &[15, 1, 17], &[100, 1, 1, 30, 1], &[160, 1]] {
            let got = logits(&mut s, ids, segments);
            assert_close(&format!("{} groups, segments {segments:?}", c.num_upper_groups), &got, whole);
        }
    }
}
