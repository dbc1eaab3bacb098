//! Training and inference of the tiny preset: the same bits on any number of threads, the same gradients with and
//! without recomputation, the same hidden states for any split of a text.

use crate::support::{pool, session_graphs, threads};
use rambac_codegen::{FitError, Memory, lower};
use rambac_ir::Bindings;
use rambac_models::data::{PasskeyMix, PasskeyTask, Task};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule, init_tensor, preset};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, optimise};
use rambac_runtime::chunk_store::Precision;
use rambac_runtime::{Executor, MicroBatch, Session, SessionOptions, Store, Tensor, TrainError, Trainer};
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

/// Parameters that decay: updates with and without are steps of their own.
fn decays(name: &str) -> bool {
    name.ends_with("proj.weight")
}

/// The store after three steps.
fn three_steps(pool: Arc<rayon::ThreadPool>, parts: usize, carry: Carry, memory: &Memory) -> Store {
    let c = preset("tiny").unwrap();
    let loss = stack::loss(&c, carry, false).unwrap();
    let opt = AdamW { warmup: 1, ..AdamW::default() };
    let mut t = Trainer::new(&loss, &opt, decays, parts, memory, weights(&c), pool).unwrap();
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
    for (parts, carry, memory) in [(1, Carry::Zero, Memory::Keep), (2, Carry::States, Memory::Recompute)] {
        let one = three_steps(threads(1), parts, carry, &memory);
        for n in [2, 3] {
            assert_same_bits(&format!("{n} threads"), &one, &three_steps(threads(n), parts, carry, &memory));
        }
    }
}

/// Dims of the largest step of [`three_steps`].
fn largest() -> Vec<Bindings> {
    vec![Bindings::new([("N", 2), ("L", 224)])]
}

/// Peaks of a step that keeps everything, and of one that recomputes everything.
fn extremes(parts: usize, carry: Carry) -> (usize, usize) {
    let c = preset("tiny").unwrap();
    let loss = stack::loss(&c, carry, false).unwrap();
    let peak = |memory| {
        let opt = AdamW::default();
        let mut t = Trainer::new(&loss, &opt, decays, parts, &memory, Store::default(), pool()).unwrap();
        t.plan(&largest()[0]).unwrap().peak()
    };
    (peak(Memory::Keep), peak(Memory::Recompute))
}

/// Any limit that can be met is, and the weights after three steps have the same bits as without one.
#[test]
fn limits_are_met_and_change_no_bit() {
    for (parts, carry) in [(1, Carry::Zero), (2, Carry::States)] {
        let (most, least) = extremes(parts, carry);
        assert!(least < most, "{least} {most}");
        let kept = three_steps(pool(), parts, carry, &Memory::Keep);
        assert_same_bits("everything recomputed", &kept, &three_steps(pool(), parts, carry, &Memory::Recompute));
        for sixths in [0, 1, 3, 5] {
            let limit = least + (most - least) * sixths / 6;
            let memory = Memory::Within { limit, dims: largest() };
            assert_same_bits(&format!("within {limit}"), &kept, &three_steps(pool(), parts, carry, &memory));
            let loss = stack::loss(&preset("tiny").unwrap(), carry, false).unwrap();
            let opt = AdamW::default();
            let mut t = Trainer::new(&loss, &opt, decays, parts, &memory, Store::default(), pool()).unwrap();
            let peak = t.plan(&largest()[0]).unwrap().peak();
            assert!(peak <= limit, "{peak} bytes planned within {limit}");
        }
        let loss = stack::loss(&preset("tiny").unwrap(), carry, false).unwrap();
        let opt = AdamW::default();
        let within = |limit| {
            let memory = Memory::Within { limit, dims: largest() };
            match Trainer::new(&loss, &opt, decays, parts, &memory, Store::default(), pool()) {
                Ok(_) => None,
                Err(TrainError::Fit(FitError::TooSmall { least, .. })) => Some(least),
                Err(e) => panic!("{e}"),
            }
        };
        // Keeping the inputs of some layers alone takes less than recomputing within each.
        let said = within(1).expect("a byte is too little");
        assert!(said <= least, "{said} {least}");
        assert_eq!((within(said), within(said - 1)), (None, Some(said)));
        let memory = Memory::Within { limit: said, dims: largest() };
        assert_same_bits("the least", &kept, &three_steps(pool(), parts, carry, &memory));
    }
}

/// No kernel takes scratch that it does not tell the plan, whatever this process has run by now.
#[test]
fn the_plan_counts_scratch() {
    three_steps(pool(), 1, Carry::Zero, &Memory::Keep);
    assert_eq!(rambac_cpu::par::heap_peak(), 0);
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

#[test]
fn a_step_that_fails_changes_no_parameter() {
    let c = preset("tiny").unwrap();
    let loss = stack::loss(&c, Carry::Zero, false).unwrap();
    for parts in [1, 2] {
        for clip in [0.0, 1.0] {
            let opt = AdamW { warmup: 1, clip, ..AdamW::default() };
            let mut t = Trainer::new(&loss, &opt, decays, parts, &Memory::Keep, weights(&c), threads(2)).unwrap();
            let batches =
                |step: u64| (0..parts as u64).map(|i| batch(step + i, 2, 192, false)).collect::<Vec<MicroBatch>>();
            t.step(0, &batches(0)).unwrap();
            let is_kept = |n: &&str| !n.starts_with("accum.") && *n != rambac_passes::train_step::STEP;
            let kept = |s: &Store| -> Vec<(String, Vec<u32>)> {
                let bits = |n: &str| s.get(n).and_then(Tensor::as_f32).unwrap().iter().map(|v| v.to_bits()).collect();
                s.names().filter(is_kept).map(|n| (n.to_string(), bits(n))).collect()
            };
            let before = kept(&t.store);
            let mut broken = batches(9);
            broken[0].inputs[2].1 = Tensor::f32(&[2, 192], vec![f32::NAN; 2 * 192]);
            let e = t.step(1, &broken).unwrap_err();
            assert!(matches!(e, TrainError::NotFinite { step: 1, .. }), "{e}");
            assert!(before == kept(&t.store), "parts {parts}, clip {clip}");
        }
    }
}
