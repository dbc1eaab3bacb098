//! Variants in models: a Mamba-2 hybrid and a Transformer for each, by name and by text.

use super::*;
use rambac_codegen::Memory;
use rambac_models::data::{RecallMix, RecallTask, Task};
use rambac_models::stack::{self, Carry};
use rambac_models::{Attention, Config, InitRule, init_tensor};
use rambac_passes::train_step::AdamW;
use rambac_runtime::{MicroBatch, Trainer};

fn config(attention: Attention, transformer: bool) -> Config {
    Config {
        num_lower_layers: 1,
        num_upper_layers: 1,
        encoder_layers: 0,
        window_size: if transformer { 16 } else { Config::default().window_size },
        chunk_size: 8,
        transformer,
        attention: Some(attention),
        ..Config::default()
    }
}

fn named(name: &str) -> Attention {
    Attention::named(name).unwrap()
}

/// Losses of so many steps on recall.
fn train(c: &Config, steps: u64, rows: usize, len: usize, lr: f64) -> Vec<f32> {
    assert_eq!(c.problems(), []);
    let mut store = Store::default();
    for s in c.parameters_with(InitRule::FanIn) {
        store.insert(s.name.clone(), Tensor::f32(&s.shape, init_tensor(&s, 1)));
    }
    let loss = stack::loss(c, Carry::Zero, false).unwrap();
    let mut params: Vec<&str> =
        loss.sources().filter(|(_, s)| s.kind == SourceKind::Param).map(|(_, s)| s.name.as_str()).collect();
    let mut listed: Vec<String> = c.parameters().into_iter().map(|s| s.name).collect();
    params.sort_unstable();
    listed.sort_unstable();
    assert_eq!(params, listed, "the graph's params are those that are listed");
    let adamw = AdamW { lr, warmup: 5, steps, hold: steps, ..AdamW::default() };
    let mut t = Trainer::new(&loss, &adamw, |_| false, 1, &Memory::Keep, store, pool()).unwrap();
    let task = RecallTask::new(1, RecallMix { keys: 8, ..RecallMix::default() }).unwrap();
    let mut losses = vec![];
    for step in 0..steps {
        let b = task.batch(step, rows, len).unwrap();
        let shape = [rows, len];
        let inputs = vec![
            ("input_ids", Tensor::i32(&shape, b.input_ids)),
            ("labels", Tensor::i32(&shape, b.labels)),
            ("loss_weights", Tensor::f32(&shape, b.loss_weights)),
        ];
        let batch = [MicroBatch { dims: Bindings::new([("N", rows), ("L", len)]), inputs }];
        losses.push(t.step(step, &batch).unwrap().loss);
    }
    losses
}

#[test]
fn every_variant_has_both_stacks() {
    for v in rambac_models::variants::BUILT_IN {
        for transformer in [false, true] {
            let c = config(named(v.name), transformer);
            let losses = train(&c, 4, 2, 64, 1e-2);
            assert!(
                losses[3] < losses[0] && losses.iter().all(|l| l.is_finite()),
                "{} {transformer}: {losses:?}",
                v.name
            );
            let back = Config::from_json(&c.to_json(), "config.json").unwrap();
            assert_eq!((back.config, back.warnings), (c, vec![]), "{}", v.name);
        }
    }
}

/// What nobody has written before trains as the others do, and stays in config.json with its text.
#[test]
fn unseen_variants_learn() {
    for (name, text) in UNSEEN {
        let c = config(Attention::own(text).unwrap(), false);
        assert!(c.to_json().contains("graph "), "{name}");
        assert_eq!(Config::from_json(&c.to_json(), name).unwrap().config, c);
        let losses = train(&c, 40, 4, 64, 1e-2);
        let mean = |l: &[f32]| l.iter().sum::<f32>() / l.len() as f32;
        let (first, last) = (mean(&losses[..5]), mean(&losses[35..]));
        assert!(last < 0.9 * first, "{name}: {first} → {last}");
    }
}

/// One text serves all sizes: the stack sets what it knows.
#[test]
fn sizes_come_from_the_stack() {
    let c = Config {
        hidden_size: 96,
        num_attention_heads: 6,
        num_kv_heads: 3,
        num_key_value_heads: 6,
        chunk_topk: 5,
        ..config(named("nsa"), false)
    };
    let f = c.attention.as_ref().unwrap().fragment(&c).unwrap();
    let of = |n: &str| f.constant(n).unwrap();
    assert_eq!(
        (of("heads"), of("kv_heads"), of("dim"), of("width"), of("chunk"), of("k")),
        (6.0, 3.0, 16.0, 96.0, 8.0, 5.0)
    );
    assert_eq!(c.problems(), []);
    assert_eq!(c.n_parameters(), c.parameters().iter().map(|s| s.len() as u64).sum::<u64>());
}

#[test]
fn contradictions_are_told() {
    let problems = |c: Config| c.problems().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let none = Config { transformer: true, ..Config::default() };
    assert!(problems(none).contains("needs an attention variant"));
    // Fewer slots than NSA must choose.
    let few = Config { chunk_topk: 2, ..config(named("nsa"), false) };
    assert!(problems(few).contains("sinks = 1 and recent = 2 are more than k = 2"), "told");
    let plain = Config { num_upper_groups: 0, ..config(named("moba"), false) };
    assert!(problems(plain).contains("there is no layer for moba"));
    assert!(Attention::named("mobba").unwrap_err().contains("did you mean moba"));
}
