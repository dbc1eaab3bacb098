//! A text fed to a session in any segments gives the logits of the whole text at once.

use proptest::prelude::*;
use rambac_codegen::lower;
use rambac_ir::Bindings;
use rambac_models::{Config, InitRule, init_tensor, stack};
use rambac_passes::{Options, optimise};
use rambac_runtime::{Executor, Session, SessionGraphs, Store, Tensor};
use std::sync::Arc;

fn pool() -> Arc<rayon::ThreadPool> {
    Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap())
}

fn params(c: &Config) -> Store {
    let mut store = Store::default();
    for s in c.parameters_with(InitRule::FanIn) {
        store.insert(s.name.clone(), Tensor::f32(&s.shape, init_tensor(&s, 7)));
    }
    store
}

fn session(c: &Config) -> Session {
    let g = SessionGraphs {
        lower: stack::lower(c).unwrap(),
        chunks: stack::chunks(c).unwrap(),
        upper: stack::upper(c).unwrap(),
        head: stack::head(c).unwrap(),
        chunk_size: c.chunk_size,
        hidden_size: c.hidden_size,
        kv: [c.num_kv_heads, c.attention_head_dim()],
        landmark: [c.num_kv_heads, c.retrieval_head_dim()],
    };
    Session::new(&g, params(c), pool()).unwrap()
}

/// Logits of the whole text.  A forward wants whole chunks: the text is padded at its end, which its beginning never sees.
fn whole(c: &Config, ids: &[i32]) -> Vec<f32> {
    let l = ids.len().next_multiple_of(if c.is_plain() { 1 } else { c.chunk_size });
    let mut padded = ids.to_vec();
    padded.resize(l, 0);
    let mut e = Executor::new(lower(&optimise(&stack::forward(c, false).unwrap(), &Options::default())), pool());
    let input = Tensor::i32(&[1, l], padded);
    let out = e.run(&Bindings::new([("N", 1), ("L", l)]), &[("input_ids", input.view())], &mut params(c)).unwrap();
    out[0].1.as_f32().unwrap()[..ids.len() * c.vocab_size].to_vec()
}

fn in_segments(s: &mut Session, ids: &[i32], lengths: &[usize]) -> Vec<f32> {
    let (mut logits, mut at) = (vec![], 0);
    for &len in lengths.iter().cycle() {
        if at == ids.len() {
            break;
        }
        let end = (at + len).min(ids.len());
        let hidden = s.feed(&ids[at..end]).unwrap().hidden;
        logits.extend(s.logits(&hidden).unwrap());
        at = end;
    }
    assert_eq!(s.position(), ids.len());
    logits
}

fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

prop_compose! {
    /// A small model with any switches.
    fn config()(
        (groups, per_group) in (0usize..3, 1usize..3),
        (lower, conv, state) in (1usize..3, 1usize..5, prop::sample::select(vec![4usize, 8, 16])),
        (head_dim, n_groups, block) in (
            prop::sample::select(vec![8usize, 16, 32]), 1usize..3, prop::sample::select(vec![1usize, 4, 16, 64]),
        ),
        (chunk, topk, encoder) in (prop::sample::select(vec![1usize, 3, 4, 8, 16]), 1usize..6, 0usize..2),
        (kv, encoder_kv) in (prop::sample::select(vec![1usize, 2, 4]), prop::sample::select(vec![1usize, 2, 4])),
        flags in prop::array::uniform5(any::<bool>()),
    ) -> Config {
        let [enable_softmax1, enable_softmax, enable_qk_norm, enable_lmk_norm, tie_word_embeddings] = flags;
        let c = Config {
            vocab_size: 32,
            hidden_size: 32,
            head_dim,
            state_size: state,
            n_groups,
            conv_kernel: conv,
            mamba_chunk_size: block,
            num_lower_layers: lower,
            num_upper_layers: groups.max(1) * per_group,
            num_upper_groups: groups,
            encoder_layers: encoder,
            chunk_size: chunk,
            chunk_topk: topk,
            num_attention_heads: 4,
            num_kv_heads: kv,
            num_key_value_heads: encoder_kv,
            retrieval_dim: 16,
            enable_softmax1,
            enable_softmax,
            enable_qk_norm,
            enable_lmk_norm,
            tie_word_embeddings,
            ..Config::default()
        };
        assert_eq!(c.problems(), []);
        c
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_segmentation_gives_the_whole(
        c in config(),
        ids in prop::collection::vec(0i32..32, 1..90),
        lengths in prop::collection::vec(prop_oneof![Just(1usize), 1usize..40], 1..8),
    ) {
        let want = whole(&c, &ids);
        let mut s = session(&c);
        let have = in_segments(&mut s, &ids, &lengths);
        let e = relative_error(&have, &want);
        prop_assert!(e <= 1e-5, "{lengths:?}: {e:.2e}");

        // A session that forgot is a new one, to the bit.
        s.reset();
        prop_assert_eq!(&have, &in_segments(&mut s, &ids, &lengths));
        // Token by token.
        s.reset();
        let e = relative_error(&in_segments(&mut s, &ids, &[1]), &want);
        prop_assert!(e <= 1e-5, "token by token: {e:.2e}");
    }
}

#[test]
fn an_unfinished_chunk_waits() {
    let c = Config { vocab_size: 32, ..Config::default() };
    assert_eq!(c.chunk_size, 16);
    let ids: Vec<i32> = (0..16 * 5 + 11).map(|i| i * 7 % 32).collect();
    let mut s = session(&c);
    let want = whole(&c, &ids);
    for lengths in [&[91][..], &[11, 80], &[16], &[5, 1, 1], &[17, 15], &[1]] {
        s.reset();
        let e = relative_error(&in_segments(&mut s, &ids, lengths), &want);
        assert!(e <= 1e-5, "{lengths:?}: {e:.2e}");
        assert_eq!(s.memory().chunks, 5);
    }
}
