//! A text fed to a session in any segments gives the logits of the whole text at once.

use crate::support::{pool, session_graphs, session_graphs_for};
use proptest::prelude::*;
use rambac_codegen::lower;
use rambac_ir::Bindings;
use rambac_models::{Attention, Config, InitRule, init_tensor, stack, variants};
use rambac_passes::{Options, optimise};
use rambac_runtime::chunk_store::Precision;
use rambac_runtime::{Executor, Session, SessionOptions, Store, Tensor, Tier};
use std::path::Path;

fn params(c: &Config) -> Store {
    let mut store = Store::default();
    for s in c.parameters_with(InitRule::FanIn) {
        store.insert(s.name.clone(), Tensor::f32(&s.shape, init_tensor(&s, 7)));
    }
    store
}

fn open(c: &Config, options: &SessionOptions) -> Session {
    Session::new(&session_graphs(c), params(c), pool(), options).unwrap()
}

fn exact() -> SessionOptions {
    SessionOptions { precision: Precision::F32, ..SessionOptions::default() }
}

fn session(c: &Config) -> Session {
    open(c, &exact())
}

/// Logits of the whole text.  A forward wants whole chunks: the text is padded at its end, which its beginning never sees.
fn whole(c: &Config, ids: &[i32]) -> Vec<f32> {
    let unit = stack::segment_unit(c).unwrap();
    let l = ids.len().next_multiple_of(if c.is_plain() { 1 } else { c.chunk_size }).next_multiple_of(unit);
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
        let hidden = s.feed(0, &ids[at..end]).unwrap().hidden;
        logits.extend(s.logits(&hidden).unwrap());
        at = end;
    }
    assert_eq!(s.position(0), ids.len());
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
        s.reset().unwrap();
        prop_assert_eq!(&have, &in_segments(&mut s, &ids, &lengths));
        // Token by token.
        s.reset().unwrap();
        let e = relative_error(&in_segments(&mut s, &ids, &[1]), &want);
        prop_assert!(e <= 1e-5, "token by token: {e:.2e}");
    }

    /// Chunks in a file are those in memory, to the bit, also when the sequence stops and is taken up again.
    #[test]
    fn a_file_is_memory(
        c in config(),
        ids in prop::collection::vec(0i32..32, 2..90),
        lengths in prop::collection::vec(1usize..40, 1..4),
        f32s: bool,
    ) {
        prop_assume!(!c.is_plain());
        let precision = if f32s { Precision::F32 } else { Precision::Bf16 };
        let ram = SessionOptions { precision, ..SessionOptions::default() };
        let want = in_segments(&mut open(&c, &ram), &ids, &lengths);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chunks");
        let file = |tier: fn(std::path::PathBuf) -> Tier| SessionOptions { precision, tier: tier(path.clone()), ..SessionOptions::default() };
        let mut s = open(&c, &file(Tier::File));
        prop_assert_eq!(&in_segments(&mut s, &ids, &lengths), &want);
        s.reset().unwrap();
        let (half, mut logits) = (ids.len() / 2, vec![]);
        for (part, tier) in [(&ids[..half], None), (&ids[half..], Some(Tier::Resume as fn(_) -> _))] {
            if let Some(tier) = tier {
                s.save().unwrap();
                drop(s);
                s = open(&c, &file(tier));
            }
            let hidden = s.feed(0, part).unwrap().hidden;
            logits.extend(s.logits(&hidden).unwrap());
        }
        let mut one = open(&c, &ram);
        let hidden = [one.feed(0, &ids[..half]).unwrap().hidden, one.feed(0, &ids[half..]).unwrap().hidden];
        let whole: Vec<f32> = hidden.iter().flat_map(|h| one.logits(h).unwrap()).collect();
        prop_assert_eq!(&logits, &whole);
    }

    /// Sequences of different lengths decoded together are what each is alone.
    #[test]
    fn sequences_do_not_meet(
        c in config(),
        prompts in prop::collection::vec(prop::collection::vec(0i32..32, 1..50), 2..4),
        steps in prop::collection::vec(0i32..32, 1..20),
    ) {
        let mut together = open(&c, &SessionOptions { sequences: prompts.len(), ..exact() });
        let mut alone: Vec<Session> = prompts.iter().map(|_| session(&c)).collect();
        for (i, p) in prompts.iter().enumerate() {
            let a = together.feed(i, p).unwrap().hidden;
            let b = alone[i].feed(0, p).unwrap().hidden;
            prop_assert!(relative_error(&a, &b) <= 1e-5);
        }
        for (t, &id) in steps.iter().enumerate() {
            let ids: Vec<i32> = (0..prompts.len() as i32).map(|i| (id + i) % 32).collect();
            let rows = together.step(&ids).unwrap().hidden;
            for (i, row) in rows.chunks_exact(c.hidden_size).enumerate() {
                let e = relative_error(row, &alone[i].feed(0, &ids[i..=i]).unwrap().hidden);
                prop_assert!(e <= 1e-5, "token {t} of sequence {i}: {e:.2e}");
            }
        }
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
        s.reset().unwrap();
        let e = relative_error(&in_segments(&mut s, &ids, lengths), &want);
        assert!(e <= 1e-5, "{lengths:?}: {e:.2e}");
        assert_eq!(s.chunks(0).unwrap().chunks(), 5);
    }
}

/// Skimming makes the memory of reading; only the upper half's scan states differ.
#[test]
fn skimming_stores_the_same_chunks() {
    let c = Config { vocab_size: 32, encoder_layers: 0, ..Config::default() };
    let ids: Vec<i32> = (0..200).map(|i| i * 7 % 32).collect();
    let (mut read, mut skim) = (session(&c), session(&c));
    read.feed(0, &ids).unwrap();
    skim.skim(0, &ids).unwrap();
    let query = read.feed(0, &[3]).unwrap().retrieved.query;
    let other = skim.feed(0, &[3]).unwrap().retrieved.query;
    assert_eq!(read.chunks(0).unwrap().chunks(), skim.chunks(0).unwrap().chunks());
    for chunk in 0..12 {
        assert_eq!(read.rank(0, &query, chunk), skim.rank(0, &query, chunk));
    }
    // The first retrieval stands before any attention, so even its query is the same.
    assert_eq!(query, other);
}

/// The retrieval's own choice is what `rank` says it should be.
#[test]
fn chosen_chunks_have_the_best_ranks() {
    let c = Config { vocab_size: 32, ..Config::default() };
    let ids: Vec<i32> = (0..16 * 40).map(|i| (i * i * i / 7 + i / 5) % 32).collect();
    let mut s = session(&c);
    s.feed(0, &ids).unwrap();
    let r = s.feed(0, &[1]).unwrap().retrieved;
    let k = r.indices.len() / r.count.len();
    for (head, chosen) in r.indices.chunks_exact(k).enumerate() {
        let mut ranks: Vec<usize> = chosen.iter().map(|&i| s.rank(0, &r.query, i as usize)[head]).collect();
        ranks.sort_unstable();
        assert_eq!(ranks, (0..k).collect::<Vec<_>>());
    }
}

fn refused(c: &Config, tier: Tier) -> String {
    match Session::new(&session_graphs(c), params(c), pool(), &SessionOptions { tier, ..exact() }) {
        Ok(_) => panic!("it was taken"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_cannot_be_resumed_is_refused() {
    let c = Config { vocab_size: 32, ..Config::default() };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chunks");
    let at = |p: &Path| p.to_path_buf();
    let mut s = open(&c, &SessionOptions { tier: Tier::File(at(&path)), ..exact() });
    s.feed(0, &[1; 100]).unwrap();
    // Nothing was saved yet.
    assert!(refused(&c, Tier::Resume(at(&path))).contains("chunks.state"));
    s.save().unwrap();
    drop(s);
    assert!(refused(&c, Tier::File(at(&path))).contains("--resume-store"));
    let tied = Config { chunk_topk: 2, ..c.clone() };
    open(&tied, &SessionOptions { tier: Tier::Resume(at(&path)), ..exact() });
    let wider = Config { head_dim: 16, ..c.clone() };
    assert!(refused(&wider, Tier::Resume(at(&path))).contains("other weights"));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(6000).unwrap();
    assert!(refused(&c, Tier::Resume(at(&path))).contains("torn"));
    let plain = Config { num_upper_groups: 0, num_upper_layers: 0, vocab_size: 32, ..Config::default() };
    assert!(refused(&plain, Tier::File(dir.path().join("x"))).contains("no chunks that could be stored"));
}

/// A small model with an attention variant, a hybrid or a Transformer.
fn with_variant(a: Attention, transformer: bool) -> Config {
    let c = Config {
        vocab_size: 32,
        num_lower_layers: 1,
        num_upper_layers: 1,
        encoder_layers: 0,
        window_size: if transformer { 9 } else { Config::default().window_size },
        chunk_size: 4,
        chunk_topk: 3,
        transformer,
        attention: Some(a),
        ..Config::default()
    };
    assert_eq!(c.problems(), []);
    c
}

fn variant_session(c: &Config, tokens: usize, sequences: usize) -> Session {
    Session::new(&session_graphs_for(c, tokens), params(c), pool(), &SessionOptions { sequences, ..exact() }).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Every variant, in either stack: whatever the segments, the whole text's logits.
    #[test]
    fn variants_read_segments(
        which in 0usize..variants::BUILT_IN.len() + 2,
        transformer: bool,
        ids in prop::collection::vec(0i32..32, 1..70),
        lengths in prop::collection::vec(prop_oneof![Just(1usize), 1usize..30], 1..6),
        more in 0usize..40,
    ) {
        let unseen = [include_str!("../fixtures/variants/top_p.ir"), include_str!("../fixtures/variants/two_level.ir")];
        let a = match variants::BUILT_IN.get(which) {
            Some(v) => Attention::named(v.name).unwrap(),
            None => Attention::own(unseen[which - variants::BUILT_IN.len()]).unwrap(),
        };
        let name = a.name.clone();
        let c = with_variant(a, transformer);
        let want = whole(&c, &ids);
        let mut s = variant_session(&c, ids.len() + more, 1);
        let have = in_segments(&mut s, &ids, &lengths);
        let e = relative_error(&have, &want);
        prop_assert!(e <= 2e-5, "{name} in segments of {lengths:?}: {e:.2e}");
        // A session that forgot is a new one, to the bit.
        s.reset().unwrap();
        prop_assert_eq!(&have, &in_segments(&mut s, &ids, &lengths));
        s.reset().unwrap();
        let e = relative_error(&in_segments(&mut s, &ids, &[1]), &want);
        prop_assert!(e <= 2e-5, "{name} token by token: {e:.2e}");
    }
}

/// Sequences of different lengths go on together, and none goes beyond what there is room for.
#[test]
fn variants_of_several_sequences() {
    for name in ["moba", "hsa", "window"] {
        let c = with_variant(Attention::named(name).unwrap(), false);
        let prompts: [Vec<i32>; 2] = [(0..19).map(|i| i * 7 % 32).collect(), (0..6).map(|i| i * 5 % 32).collect()];
        let mut together = variant_session(&c, 32, 2);
        let mut texts = prompts.clone();
        for (i, p) in prompts.iter().enumerate() {
            together.feed(i, p).unwrap();
        }
        for step in 0..8 {
            let ids = [step, 31 - step];
            let rows = together.step(&ids).unwrap().hidden;
            let logits = together.logits(&rows).unwrap();
            for (i, text) in texts.iter_mut().enumerate() {
                text.push(ids[i]);
                let all = whole(&c, text);
                let e = relative_error(&logits[i * 32..][..32], &all[all.len() - 32..]);
                assert!(e <= 2e-5, "{name}, sequence {i}, token {step}: {e:.2e}");
            }
        }
        let e = together.feed(0, &[1; 6]).unwrap_err().to_string();
        assert!(e.contains("there is room for 32 tokens"), "{name}: {e}");
    }
}

/// What needs other rows than its own to give a row is refused by its name.
#[test]
fn variants_that_mix_rows_are_refused() {
    let head = "graph mine(N, L) {\n  const heads = 4, kv_heads = 2, dim = 16, chunk = 4, scale = 0.25\n  \
                %q = input \"q\" : f32[N, L, heads, dim]\n  %k = input \"k\" : f32[N, L, kv_heads, dim]\n  \
                %v = input \"v\" : f32[N, L, kv_heads, dim]\n";
    let rest = "  %y = attention %p, %k, %v {scale = scale, causal = true}\n  return \"o\" = %y\n}\n";
    for (body, why) in [
        (
            "  %m = reduce %q {f = max, axes = [1], keep = true}\n  %b = broadcast %m {shape = [N, L, heads, dim]}\n  %p = add %q, %b\n",
            "%m = reduce goes over the tokens",
        ),
        (
            "  %a = summarise %q {chunk = chunk}\n  %b = reshape %a {shape = [N, L/chunk, 1, heads, dim]}\n  \
             %c = broadcast %b {shape = [N, L/chunk, chunk, heads, dim]}\n  %d = reshape %c {shape = [N, L, heads, dim]}\n  %p = add %q, %d\n",
            "%a = summarise mixes tokens of which a segment has only some",
        ),
    ] {
        let c = with_variant(Attention::own(&format!("{head}{body}{rest}")).unwrap(), false);
        let e = stack::segments(&c, 32).unwrap_err();
        assert!(e.contains(why), "{e}");
    }
}
