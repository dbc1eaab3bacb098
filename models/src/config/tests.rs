//! Tests of reading, checking and writing configurations.

use super::*;
use proptest::prelude::*;

fn problems(json: &str) -> String {
    Config::from_json(json, "test.json").unwrap_err().to_string()
}

/// The required keys and `more`.
fn with(more: &str) -> String {
    format!(r#"{{"vocab_size": 256, "hidden_size": 64, "num_lower_layers": 2, {more}}}"#)
}

#[test]
fn a_published_ramba_config_is_the_preset() {
    // model_type "mamba2" and keys of other programs, as published.
    let json = r#"{"architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "expand": 2, "hidden_act": "silu",
        "hidden_size": 1024, "head_dim": 64, "num_heads": 32, "initializer_range": 0.02, "intermediate_size": 2048,
        "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "num_hidden_layers": 48, "residual_in_fp32": true, "rms_norm": true,
        "ssm_cfg": {}, "state_size": 128, "time_step_limit": [0.0, Infinity], "time_step_rank": 160, "use_bias": false,
        "use_conv_bias": true, "vocab_size": 50280, "tie_word_embeddings": true, "num_lower_layers": 24, "num_upper_layers": 24,
        "num_upper_groups": 1, "num_mamba_per_gca": 8, "n_groups": 1, "chunk_topk": 8, "retrieval_dim": 1024,
        "mamba_chunk_size": 256, "chunk_size": 64, "encoder_layers": 1, "num_attention_heads": 16, "num_kv_heads": 1,
        "lmk_token_id": 50279, "segment_size": 4096}"#;
    let parsed = Config::from_json(json, "x").unwrap();
    assert_eq!(parsed.warnings, [""; 0]);
    assert!(!parsed.tie_is_assumed);
    let preset = crate::presets::preset("370m").unwrap();
    assert_eq!(parsed.config, Config { mamba_chunk_size: 256, ..preset });
}

#[test]
fn a_transformers_config_is_plain_mamba2() {
    for limit in [r#"[0.0, Infinity]"#, r#"[0.0, {"__float__": "Infinity"}]"#, "null"] {
        let json = format!(
            r#"{{"model_type": "mamba2", "chunk_size": 256, "num_hidden_layers": 24, "hidden_size": 768, "vocab_size": 50280,
            "n_groups": 1, "num_heads": 24, "head_dim": 64, "time_step_limit": {limit}, "some_new_key": 1, "another": "Infinity"}}"#
        );
        let parsed = Config::from_json(&json, "c.json").unwrap();
        let c = &parsed.config;
        assert_eq!((c.num_lower_layers, c.mamba_chunk_size, c.state_size, c.is_plain()), (24, 256, 128, true));
        assert_eq!((c.time_step_limit, c.tie_word_embeddings), ((0.0, f64::INFINITY), false));
        assert!(parsed.tie_is_assumed);
        assert_eq!(parsed.warnings, ["c.json: keys without a use here are ignored: some_new_key, another"]);
        assert_eq!(c.layers(), [LayerKind::Mamba; 24]);
        assert!(c.to_json().contains("\"chunk_size\": 256"), "{}", c.to_json());
    }
}

#[test]
fn the_stack_is_in_order() {
    use LayerKind::{Attention as A, Chunking as C, Mamba as M, Retrieval as R};
    let c = Config {
        num_lower_layers: 1,
        num_upper_layers: 8,
        num_upper_groups: 2,
        num_mamba_per_gca: 2,
        ..Default::default()
    };
    assert_eq!(c.layers(), [M, C, R, A, M, M, A, M, M, R, A, M, M, A, M, M]);
}

#[test]
fn every_contradiction_is_named_at_once() {
    let all = problems(&with(
        r#""head_dim": 32, "n_groups": 3, "num_attention_heads": 5, "num_kv_heads": 2, "retrieval_dim": 31,
        "num_upper_layers": 3, "num_upper_groups": 2, "num_key_value_heads": 3"#,
    ));
    for part in [
        "test.json: 6 problems",
        "n_groups, expand, hidden_size, head_dim: num_heads = expand * hidden_size / head_dim = 4 must be a multiple of n_groups = 3",
        "hidden_size, num_attention_heads: hidden_size = 64 must be a multiple of num_attention_heads = 5",
        "num_attention_heads, num_kv_heads: ",
        "retrieval_dim, num_kv_heads: ",
        "num_upper_layers, num_upper_groups, num_mamba_per_gca: num_upper_layers = 3 must be a positive multiple",
        "num_attention_heads, num_key_value_heads: ",
    ] {
        assert!(all.contains(part), "{part}\nnot in {all}");
    }
    let types = problems(
        r#"{"vocab_size": "256", "hidden_size": -1, "num_hidden_layers": 2.5, "tie_word_embeddings": 1, "use_bias": true}"#,
    );
    for part in [
        "vocab_size: expected a whole number, found the string \"256\"",
        "hidden_size: expected a whole number, found -1",
        "num_hidden_layers: expected a whole number, found 2.5",
        "tie_word_embeddings: expected true or false, found 1",
        "use_bias: true is not supported, only false",
    ] {
        assert!(types.contains(part), "{part}\nnot in {types}");
    }
    let mixed = problems(&with(
        r#""head_dim": "x", "n_groups": 3, "chunk_topk": 0, "num_heads": 4, "num_kv_heads": 3, "retrieval_dim": 0"#,
    ));
    for part in [
        "4 problems",
        "head_dim: expected",
        "chunk_topk: expected",
        "retrieval_dim: expected",
        "num_attention_heads, num_kv_heads: ",
    ] {
        assert!(mixed.contains(part), "{part}\nnot in {mixed}");
    }
}

#[test]
fn single_mistakes() {
    for (more, part) in [
        (r#""num_heads": 5"#, "num_heads * head_dim = 5 * 32 must equal expand * hidden_size = 2 * 64 = 128"),
        (r#""intermediate_size": 99"#, "intermediate_size = 99 must equal"),
        (r#""head_dim": 48"#, "expand * hidden_size = 128 must be a multiple of head_dim = 48"),
        (r#""chunk_topk": 0"#, "chunk_topk: expected at least 1, found 0"),
        (r#""chunk_size": 0"#, "chunk_size: expected at least 1, found 0"),
        (r#""vocab_size": 99999999999"#, "vocab_size: expected at most"),
        (r#""vocab_size": 16777216, "hidden_size": 131072, "num_lower_layers": 4096"#, "parameters in all"),
        (r#""hidden_act": "gelu""#, "only \"silu\""),
        (r#""model_type": "llama""#, "\"llama\" is not supported"),
        (r#""time_step_limit": [1.0, 0.5]"#, "expected 0 <= low < high, found [1, 0.5]"),
        (r#""time_step_limit": [NaN, Infinity]"#, "time_step_limit"),
        (r#""time_step_min": 0.5"#, "time_step_min, time_step_max"),
        (r#""rms_eps": Infinity"#, "rms_eps: expected a finite number >= 0, found inf"),
        (r#""insert_lmk": true"#, "insert_lmk"),
        (r#""num_lower_layers": 0, "num_upper_groups": 0"#, "the model has no layers"),
        (r#""hidden_size": 16, "num_attention_heads": 2, "retrieval_dim": 2, "num_kv_heads": 1"#, "MLP no width"),
        (r#""num_attention_heads": 64, "num_kv_heads": 1"#, "even width per head, found 1"),
    ] {
        let json = with(more);
        // Later keys win, as in other readers.
        let message = problems(&json);
        assert!(message.contains(part), "{more}: {message}");
    }
    assert!(problems("[]").contains("expected an object of keys, found a list of 0"));
    assert!(problems("{").contains("not valid JSON"));
    assert!(problems("{}").contains("3 problems"));
    assert!(problems(r#"{"d_model": 768, "n_layer": 24}"#).contains("mamba_ssm"));
    let plain = r#"{"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "n_groups": 1, "chunk_size": 32, "mamba_chunk_size": 64}"#;
    assert!(problems(plain).contains("chunk_size, mamba_chunk_size"));
    assert!(Config::from_path("/nowhere").unwrap_err().to_string().contains("/nowhere"));
}

#[test]
fn plain_models_do_not_care_about_memory_keys() {
    let parsed = Config::from_json(
        &with(r#""num_upper_groups": 0, "num_mamba_per_gca": 0, "chunk_topk": 0, "insert_lmk": true"#),
        "x",
    )
    .unwrap();
    assert!(parsed.config.is_plain());
    assert_eq!(parsed.config.layers().len(), 2);
    let parsed = Config::from_json(&with(r#""num_upper_groups": 0, "num_upper_layers": 6"#), "x").unwrap();
    assert_eq!(parsed.warnings, ["x: num_upper_layers = 6 is ignored because num_upper_groups = 0"]);
    assert_eq!(parsed.config.layers().len(), 2);
}

#[test]
fn strings_keep_their_infinities() {
    let text = r#"{"a": "Infinity, \"NaN", "Infinity": -Infinity, "b": [NaN,Infinity], "cé": "NaN"}"#;
    let value: Value = serde_json::from_str(&quote_python_floats(text)).unwrap();
    assert_eq!(value["a"], "Infinity, \"NaN");
    assert_eq!(as_float(&value["Infinity"]), Some(f64::NEG_INFINITY));
    assert!(as_float(&value["b"][0]).unwrap().is_nan());
    assert_eq!(as_float(&value["b"][1]), Some(f64::INFINITY));
    assert_eq!(value["cé"], "NaN");
    assert!(serde_json::from_str::<Value>(&quote_python_floats("[Infinityx, xNaN, éNaN]")).is_err());
}

/// Valid configurations of every kind.
fn any_config() -> impl Strategy<Value = Config> {
    let memory = (
        0usize..3,
        1usize..3,
        1usize..3,
        0usize..3,
        1usize..5,
        prop::sample::select(vec![(4, 2, 4), (4, 1, 2), (2, 2, 1)]),
    );
    let scan = (1usize..5, 1usize..4, prop::sample::select(vec![8usize, 16, 32]), 1usize..3, 1usize..6, 1usize..4);
    let floats = (1e-9f64..1.0, 1e-9f64..1.0, 0.0f64..1.0, 1e-6f64..0.1, 0.1f64..1.0);
    let flags = prop::array::uniform5(any::<bool>());
    let limit = prop::sample::select(vec![(0.0, f64::INFINITY), (1e-3, f64::INFINITY), (0.0, 0.1)]);
    (memory, scan, floats, flags, limit, any::<bool>()).prop_map(|(m, s, f, b, limit, hf)| {
        let (groups, inner, per_gca, encoder, topk, (heads, kv, enc_kv)) = m;
        let mut c = Config {
            vocab_size: 10 + s.0,
            hidden_size: 32 * s.1,
            expand: 2,
            head_dim: s.2,
            state_size: 4 * s.3,
            n_groups: if s.3 == 1 { 2 } else { 1 },
            conv_kernel: s.4,
            mamba_chunk_size: 16 * s.5,
            num_lower_layers: s.0,
            layer_norm_epsilon: f.0,
            initializer_range: f.2,
            time_step_min: f.3,
            time_step_max: f.4,
            tie_word_embeddings: b[4],
            time_step_limit: limit,
            ..Config::default()
        };
        if groups == 0 && hf {
            return Config { num_upper_groups: 0, num_upper_layers: 0, model_type: ModelType::Mamba2, ..c };
        }
        c.rms_eps = f.1;
        [c.enable_softmax1, c.enable_softmax, c.enable_qk_norm, c.enable_lmk_norm] = [b[0], b[1], b[2], b[3]];
        Config {
            num_upper_groups: groups,
            num_upper_layers: groups * inner * per_gca,
            num_mamba_per_gca: per_gca,
            encoder_layers: encoder,
            chunk_topk: topk,
            num_attention_heads: heads,
            num_kv_heads: kv,
            num_key_value_heads: enc_kv,
            retrieval_dim: kv * 6,
            ..c
        }
    })
}

proptest! {
    #[test]
    fn config_json_round_trips(c in any_config()) {
        prop_assert_eq!(c.problems(), vec![]);
        let back = Config::from_json(&c.to_json(), "x").unwrap();
        prop_assert_eq!(&back.config, &c);
        prop_assert!(back.warnings.is_empty(), "{:?}", back.warnings);
        let listed: usize = c.parameters().iter().map(|p| p.len()).sum();
        prop_assert_eq!(listed as u64, c.n_parameters());
    }

    /// One byte of a good file changed: an error or a configuration that holds together.
    #[test]
    fn mutated_files_never_panic(c in any_config(), at in 0usize..2000, with: u8) {
        let mut bytes = c.to_json().into_bytes();
        let n = bytes.len();
        bytes[at % n] = with;
        if let Ok(p) = Config::from_json(&String::from_utf8_lossy(&bytes), "x") {
            prop_assert_eq!(p.config.problems(), vec![]);
            prop_assert!(!p.config.layers().is_empty());
        }
    }

    /// Any numbers under the known keys, absurd ones included.
    #[test]
    fn any_sizes_never_panic(values in prop::collection::vec(prop_oneof![0usize..70, any::<usize>(), (0u32..63).prop_map(|e| 1 << e)], 19)) {
        let mut c = Config::default();
        let mut o = Map::new();
        for (size, v) in c.sizes().iter().zip(&values) {
            o.insert(size.key.into(), json!(v));
            c.set(size.key, &json!(v), &mut vec![]);
        }
        let _ = (c.to_json(), c.in_proj_dim(), c.kv_dim());
        let _ = Config::from_json(&Value::Object(o).to_string(), "x").map_err(|e| e.to_string());
    }

    #[test]
    fn any_text_never_panics(s in "[-INaf\\[\\]{}\",:\\\\0-9 é]{0,60}|(Infinity|NaN|-|\"|\\\\|,|\\[){0,12}") {
        let quoted = quote_python_floats(&s);
        if serde_json::from_str::<Value>(&s).is_ok() {
            prop_assert_eq!(quoted, s.clone());
        }
        let _ = Config::from_json(&s, "x").map_err(|e| e.to_string());
    }
}
