//! Bad input: every case is refused with status 1, names what is wrong, and says what to do.

use crate::support::{command, copy, fixture, rambac, refuses, succeeds};
use rambac_ir::testing::Rng;
use rambac_runtime::checkpoint::{TensorFile, TensorRef, write_safetensors};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// A folder with a model that works, to be damaged.
fn model(dir: &TempDir, name: &str) -> PathBuf {
    let to = dir.path().join(name);
    copy(Path::new(&fixture("ramba_tiny")), &to);
    to
}

fn eval(model: &Path) -> Vec<String> {
    ["eval", "passkey", text(model), "--len", "256", "--cases", "1"].map(String::from).to_vec()
}

fn refuses_eval(model: &Path, parts: &[&str]) -> String {
    let args = eval(model);
    refuses(&args.iter().map(String::as_str).collect::<Vec<_>>(), parts)
}

#[test]
fn truncated_weights() {
    let dir = TempDir::new().unwrap();
    let m = model(&dir, "cut");
    let whole = fs::read(m.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let n = whole.len();
    let mut lengths = vec![0, 1, 7, 8, 9, header / 2, header - 1, header, header + 1, n / 2, n - 4097, n - 4, n - 1];
    let mut rng = Rng(1);
    lengths.extend((0..12).map(|_| rng.below(n)));
    for len in lengths {
        fs::write(m.join("model.safetensors"), &whole[..len]).unwrap();
        refuses_eval(&m, &["model.safetensors"]);
    }
    // And longer than it should be.
    fs::write(m.join("model.safetensors"), [&whole[..], &[0; 5]].concat()).unwrap();
    refuses_eval(&m, &["model.safetensors"]);
    fs::write(m.join("model.safetensors"), &whole).unwrap();
    let args = eval(&m);
    succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// A header that lies: bytes of it changed at random must be refused or harmless.
#[test]
fn damaged_headers() {
    let dir = TempDir::new().unwrap();
    let m = model(&dir, "damaged");
    let path = m.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut rng = Rng(2);
    for i in 0..40 {
        let mut damaged = whole.clone();
        let at = if i < 8 { i } else { 8 + rng.below(header - 8) };
        damaged[at] = rng.pick(b"\0\x7f\xff09[]{}\",:-e");
        fs::write(&path, damaged).unwrap();
        let r = rambac(&["inspect", text(&m)]);
        assert!(matches!(r.code, Some(0 | 1)), "byte {at}: {:?} {}", r.code, r.err);
        let args = eval(&m);
        let r = rambac(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(r.code == Some(0) || r.code == Some(1) && r.err.contains("damaged"), "byte {at}: {}", r.err);
    }
}

/// Name, shape and values.
type Named = (String, Vec<usize>, Vec<f32>);

/// Weights with a tensor renamed, reshaped, missing or added.
#[test]
fn weights_of_another_model() {
    let dir = TempDir::new().unwrap();
    let original = TensorFile::open(Path::new(&fixture("ramba_tiny")).join("model.safetensors")).unwrap();
    let all: Vec<Named> = original
        .names()
        .map(|n| {
            let (shape, data) = original.get_f32(n).unwrap();
            (n.to_string(), shape, data)
        })
        .collect();
    let write = |name: &str, change: &dyn Fn(&mut Vec<Named>)| {
        let m = model(&dir, name);
        let mut tensors = all.clone();
        change(&mut tensors);
        let refs: Vec<TensorRef> = tensors.iter().map(|(n, s, d)| TensorRef::f32(n.as_str(), s, d)).collect();
        write_safetensors(&m.join("model.safetensors"), &refs, &[]).unwrap();
        m
    };
    let at = |all: &[Named], end: &str| all.iter().position(|t| t.0.ends_with(end)).unwrap();
    let a_log = all[at(&all, "A_log")].0.clone();

    let renamed = write("renamed", &|t| {
        let i = at(t, "A_log");
        t[i].0 = t[i].0.replace("A_log", "A_logs");
    });
    let message = refuses_eval(&renamed, &[&a_log, &format!("{a_log}s"), "do not fit the model"]);
    insta::assert_snapshot!("weights_renamed", message.replace(text(dir.path()), "DIR"));

    let reshaped = write("reshaped", &|t| {
        let i = at(t, "out_proj.weight");
        t[i].1.reverse();
    });
    let message = refuses_eval(&reshaped, &["out_proj.weight", "[64, 128]", "[128, 64]"]);
    insta::assert_snapshot!("weights_reshaped", message.replace(text(dir.path()), "DIR"));

    let missing = write("missing", &|t| drop(t.remove(at(t, "A_log"))));
    refuses_eval(&missing, &[&a_log]);
    let added = write("added", &|t| t.push(("backbone.layers.99.norm.weight".into(), vec![1], vec![1.0])));
    refuses_eval(&added, &["backbone.layers.99.norm.weight"]);
    let nothing = write("nothing", &|t| t.clear());
    refuses_eval(&nothing, &["backbone.embeddings.weight"]);
}

#[test]
fn no_weights_at_all() {
    let dir = TempDir::new().unwrap();
    let m = model(&dir, "bare");
    fs::remove_file(m.join("model.safetensors")).unwrap();
    refuses_eval(&m, &["no weights"]);
    // A pickle is not opened.
    fs::write(m.join("pytorch_model.bin"), b"\x80\x02}q\0.").unwrap();
    refuses_eval(&m, &["pytorch_model.bin", "save_file"]);
    refuses(&["eval", "passkey", text(dir.path())], &["neither a config.json nor a whole checkpoint"]);
    refuses(&["eval", "passkey", "tiny"], &["tiny has no weights", "rambac train"]);
}

#[test]
fn configs_that_contradict_themselves() {
    let dir = TempDir::new().unwrap();
    let good: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(fixture("ramba_tiny/config.json")).unwrap()).unwrap();
    let path = dir.path().join("config.json");
    let cases: &[(&str, serde_json::Value)] = &[
        ("hidden_size", 0.into()),
        ("hidden_size", (-64).into()),
        ("hidden_size", "64".into()),
        ("hidden_size", 1e300.into()),
        ("hidden_size", 65.into()),
        ("head_dim", 33.into()),
        ("n_groups", 3.into()),
        ("num_attention_heads", 3.into()),
        ("num_kv_heads", 3.into()),
        ("num_key_value_heads", 3.into()),
        ("retrieval_dim", 33.into()),
        ("num_upper_layers", 0.into()),
        ("num_upper_groups", 3.into()),
        ("num_mamba_per_gca", 5.into()),
        ("chunk_size", 0.into()),
        ("chunk_topk", 0.into()),
        ("vocab_size", u64::MAX.into()),
        ("rms_eps", (-1.0).into()),
        ("tie_word_embeddings", "yes".into()),
        ("model_type", "llama".into()),
        ("hidden_act", "gelu".into()),
    ];
    let mut messages = vec![];
    for (key, value) in cases {
        let mut c = good.clone();
        c[*key] = value.clone();
        fs::write(&path, c.to_string()).unwrap();
        let m = refuses(&["explain", text(&path)], &[text(&path), key]);
        messages.push(format!("{key} = {value}: {}", m.replace(text(&path), "config.json")));
    }
    insta::assert_snapshot!("configs", messages.join("\n"));
    for broken in ["", "{", "[]", "null", "{\"hidden_size\": }", "\u{feff}{}x", "{\"a\": 1e999}"] {
        fs::write(&path, broken).unwrap();
        refuses(&["explain", text(&path)], &[text(&path)]);
    }
    fs::write(&path, [0xff, 0xfe, 0]).unwrap();
    refuses(&["explain", text(&path)], &[text(&path)]);
}

#[test]
fn unknown_models() {
    let m = refuses(&["train", "tinny", "--out", "x"], &["tinny", "did you mean", "tiny"]);
    insta::assert_snapshot!("unknown_preset", m);
    refuses(&["explain", "370"], &["370m"]);
    refuses(&["explain", "no/such/folder"], &["no/such/folder"]);
    refuses(&["explain", "model.ir"], &["model.ir"]);
    refuses(&["check", "no/such/folder"], &["no/such/folder"]);
}

#[test]
fn lengths_that_do_not_divide() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let m = refuses(
        &["train", "tiny", "--len", "250", "--out", text(&out)],
        &["250", "chunk_size 16", "--len 240 and --len 256"],
    );
    insta::assert_snapshot!("length", m);
    refuses(&["train", "tiny", "--len", "16", "--out", text(&out)], &["16", "too short"]);
    refuses(&["train", "tiny", "--len", "18446744073709551600", "--out", text(&out)], &["18446744073709551600 tokens"]);
    for zero in ["--batch", "--steps", "--accumulate"] {
        refuses(&["train", "tiny", zero, "0", "--out", text(&out)], &["at least 1"]);
    }
    for (flag, wrong) in
        [("--lr", "-1"), ("--lr", "nan"), ("--clip", "-1"), ("--state-passing", "3"), ("--lr-floor", "7")]
    {
        refuses(&["train", "tiny", flag, wrong, "--out", text(&out)], &[flag, "in the range"]);
    }
    refuses(&["train", "tiny", "--len", "256"], &["--out"]);
    refuses(&["train"], &["MODEL"]);
}

#[test]
fn folders_that_cannot_be_written() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "I am no folder").unwrap();
    let under = file.join("run");
    let m = refuses(&["train", "tiny", "--len", "256", "--out", text(&under)], &["file/run"]);
    insta::assert_snapshot!("unwritable", m.replace(text(dir.path()), "DIR"));
    refuses(&["train", "tiny", "--len", "256", "--out", text(&file)], &["file"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "I am no folder");
    refuses(&["train", "--resume", text(dir.path())], &["no whole checkpoint"]);
    refuses(&["train", "--resume", text(&dir.path().join("nowhere"))], &["nowhere"]);
}

/// A word-level tokenizer of `n` words.
fn tokenizer(n: usize) -> String {
    let vocab: Vec<String> = (0..n).map(|i| format!("\"w{i}\": {i}")).collect();
    format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {{"type": "Whitespace"}}, "post_processor": null, "decoder": null,
        "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "w0"}}}}"#,
        vocab.join(", ")
    )
}

#[test]
fn texts_and_tokenizers() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (corpus, out, tok) = (at("corpus.txt"), at("run"), at("tokenizer.json"));
    fs::write(&corpus, "w1 w2 w3 ".repeat(2000)).unwrap();
    let with = |extra: &[&str], parts: &[&str]| {
        let mut args = vec!["train", "tiny", "--len", "64", "--steps", "1", "--out", text(&out)];
        args.extend(extra);
        refuses(&args, parts)
    };
    fs::write(&tok, tokenizer(300)).unwrap();
    let m = with(&["--data", text(&corpus), "--tokenizer", text(&tok)], &["tokenizer.json", "299", "256"]);
    insta::assert_snapshot!("tokenizer_too_large", m.replace(text(dir.path()), "DIR"));
    fs::write(&tok, "{}").unwrap();
    with(&["--data", text(&corpus), "--tokenizer", text(&tok)], &["tokenizer.json"]);
    with(&["--data", text(&corpus), "--tokenizer", text(&at("none.json"))], &["none.json"]);

    fs::write(at("empty.txt"), "").unwrap();
    let m = with(&["--data", text(&at("empty.txt"))], &["empty.txt"]);
    insta::assert_snapshot!("empty_corpus", m.replace(text(dir.path()), "DIR"));
    fs::write(at("short.txt"), "too short").unwrap();
    with(&["--data", text(&at("short.txt"))], &["short.txt", "64"]);
    with(&["--data", text(&at("none.txt"))], &["none.txt"]);
    with(&["--data", text(dir.path())], &[text(dir.path())]);
    fs::write(&tok, tokenizer(20)).unwrap();
    fs::write(at("latin1.txt"), b"caf\xe9 ".repeat(1000)).unwrap();
    with(&["--data", text(&at("latin1.txt")), "--tokenizer", text(&tok)], &["latin1.txt", "UTF-8"]);
    assert!(!out.join("latest").exists(), "a run that was refused left a checkpoint");
}

#[test]
fn broken_fixtures() {
    let dir = TempDir::new().unwrap();
    refuses(&["check", text(dir.path())], &["no fixtures"]);
    let whole = fs::read(fixture("causal_conv1d_silu.safetensors")).unwrap();
    let path = dir.path().join("conv.safetensors");
    for len in [0, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        refuses(&["check", text(dir.path())], &["conv.safetensors"]);
    }
    // A value that is wrong is a failure, not an error.
    let mut wrong = whole.clone();
    let n = wrong.len();
    wrong[n - 400..].fill(0x3f);
    fs::write(&path, wrong).unwrap();
    let r = rambac(&["check", text(dir.path())]);
    assert_eq!(r.code, Some(1), "{} {}", r.out, r.err);
    assert!(r.out.contains("FAIL"), "{}", r.out);
}

const LAYER: &str = r#"graph layer(N, L) {
  %x = input "x" : f32[N, L, 16]
  %start = input "start" : i32[N]
  %norm = param "norm" : f32[16]
  %wq = param "wq" : f32[16, 16]
  %h = rms_norm %x, %norm {eps = 1e-5}
  %q0 = matmul %h, %wq {trans_b = true}
  %q = reshape %q0 {shape = [N, L, 2, 8]}
  %e = summarise %q {chunk = 8}
  %s = score %q, %e, %start {chunk = 8, scale = 0.25} : f32[N, L, 2, L/8]
  %i, %n = select %s {k = 2}
  %w = weigh %s, %i, %n {rule = stick_breaking}
  %o = attend %q, %q, %q, %i, %n {chunk = 8, scale = 0.5}
  %y = aggregate %o, %w
  %a = silu %y
  %r = reduce %a {f = sum, axes = [2, 3]}
  return "r" = %r
}
"#;

/// Every line of a valid file: left out, doubled, cut, moved, and with its words and numbers changed.
#[test]
fn mutated_graphs() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("layer.ir");
    let explain = ["explain", text(&path), "--dims", "N=2,L=64"];
    fs::write(&path, LAYER).unwrap();
    succeeds(&explain);
    let lines: Vec<&str> = LAYER.lines().collect();
    let mut rng = Rng(4);
    let mut refused = 0;
    for i in 0..lines.len() {
        let l = lines[i];
        let cut = &l[..l.len() / 2];
        let mut all: Vec<Vec<String>> =
            vec![vec![], vec![l.into(), l.into()], vec![cut.into()], vec![format!("{l} }}")]];
        for (from, to) in
            [("16", "17"), ("8", "0"), ("8", "99999999999999999999"), ("L", "M"), ("f32", "i32"), ("%", "")]
        {
            if l.contains(from) {
                all.push(vec![l.replace(from, to)]);
            }
        }
        let mut bytes = l.as_bytes().to_vec();
        for _ in 0..2 {
            let at = rng.below(bytes.len());
            bytes[at] = rng.pick(b"{}[]%\",=:@ \t09azN\\");
        }
        all.push(vec![String::from_utf8(bytes).unwrap()]);
        for new in all {
            let mut mutated: Vec<String> = lines.iter().map(|l| l.to_string()).collect();
            mutated.splice(i..=i, new);
            let source = mutated.join("\n") + "\n";
            fs::write(&path, &source).unwrap();
            let r = rambac(&explain);
            assert!(matches!(r.code, Some(0 | 1)), "{:?} {}\n{source}", r.code, r.err);
            if r.code == Some(1) {
                refused += 1;
                assert!(r.err.contains("layer.ir") || r.err.contains("dim"), "{}\n{source}", r.err);
            }
        }
    }
    assert!(refused > 80, "only {refused} mutations were refused");
    fs::write(&path, LAYER.replace("chunk = 8, scale = 0.5", "chunk = 16, scale = 0.5").replace("silu", "sillu"))
        .unwrap();
    insta::assert_snapshot!("graph", refuses(&explain, &["sillu", "silu"]).replace(text(dir.path()), "DIR"));
    fs::write(&path, LAYER).unwrap();
    refuses(&["explain", text(&path), "--dims", "N=2,L=60"], &["60", "8"]);
    refuses(&["train", text(&path), "--out", "x"], &["layer.ir", "needs a model"]);
}

/// Nothing that a flag asks for is left out in silence, and no size is taken that cannot be.
#[test]
fn flags_that_would_change_nothing() {
    for what in ["decode", "prefill", "forward", "select"] {
        refuses(&["bench", what, "--preset", "tiny", "--memory-limit", "1M"], &["--memory-limit", "bench train"]);
        refuses(&["bench", what, "--preset", "tiny", "--recompute"], &["--recompute", "bench train"]);
    }
    for what in ["decode", "prefill"] {
        refuses(&["bench", what, "--preset", "tiny", "--batch", "1000000000"], &["needs", "a smaller --batch"]);
        refuses(&["bench", what, "--preset", "tiny", "--len", "4G"], &["cannot be counted"]);
    }
}

#[test]
fn sizes_that_cannot_be() {
    let dir = TempDir::new().unwrap();
    let (m, out) = (model(&dir, "whole"), dir.path().join("run"));
    // A segment is as long as the text at most.
    succeeds(&["eval", "passkey", text(&m), "--len", "200", "--cases", "1", "--segment", "99999999999"]);
    refuses(&["eval", "passkey", text(&m), "--len", "4G"], &["cannot be counted"]);
    // Before the first length takes its time.
    let r = rambac(&["eval", "passkey", text(&m), "--len", "256,10"]);
    assert_eq!((r.code, r.out.as_str()), (Some(1), ""), "{}", r.err);
    for batch in ["1000000000", "100000"] {
        refuses(&["train", "tiny", "--batch", batch, "--out", text(&out)], &["needs", "this machine has", "--batch"]);
    }
    refuses(&["train", "tiny", "--data", "/dev/zero", "--out", text(&out)], &["/dev/zero", "must be a file"]);
    assert!(!out.exists(), "a run that was refused left a folder");
    let usage = |args: &[&str], part: &str| {
        let o = command(args).output().unwrap();
        let err = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(2) && err.contains(part), "{args:?}: {err}");
    };
    usage(&["eval", "passkey", text(&m), "--cases", "0"], "0 is not in");
    usage(&["train", "tiny", "--seed", "-1", "--out", "x"], "'-1' for '--seed");
    usage(&["train", "tiny", "--len", "1e3", "--out", "x"], "a size such as 4096, 64K or 1M");
    let o = std::process::Command::new(env!("CARGO_BIN_EXE_rambac")).args(["doctor", "--threads", "100000"]).output();
    let o = o.unwrap();
    assert!(o.status.code() == Some(2) && String::from_utf8_lossy(&o.stderr).contains("100000 is not in"));
    refuses(
        &["generate", text(&m), "--prompt", "x", "--temperature", "-1"],
        &["--temperature -1", "0 (greedy) or more"],
    );
    succeeds(&["explain", "tiny", "--len", "4K"]);
}

/// A model of bytes goes on from any bytes.
#[test]
fn prompts_from_files() {
    let dir = TempDir::new().unwrap();
    let (m, file) = (model(&dir, "whole"), dir.path().join("prompt"));
    fs::write(&file, b"caf\xe9 \xff\x00 and so on").unwrap();
    let written = succeeds(&["generate", text(&m), "--prompt-file", text(&file), "--tokens", "3"]).out;
    let args = ["generate", text(&m), "--prompt-file", "-", "--tokens", "3"];
    let piped = command(&args).stdin(fs::File::open(&file).unwrap()).output().unwrap();
    assert!(piped.status.success() && String::from_utf8_lossy(&piped.stdout) == written);
    refuses(&["generate", text(&m), "--prompt-file", text(dir.path())], &["cannot read this prompt"]);
    let graph = dir.path().join("binary.ir");
    fs::write(&graph, b"graph \xff").unwrap();
    refuses(&["explain", text(&graph)], &["binary.ir", "no text"]);
}

#[test]
fn usage() {
    for args in [
        &["fly"][..],
        &[],
        &["train", "tiny", "--no-such-flag"],
        &["train", "tiny", "--len", "many"],
        &["eval", "chess", "tiny"],
        &["eval", "passkey", "tiny", "--len", "0"],
        &["check"],
        &["train", "tiny", "--resume", "x"],
        &["train", "tiny", "--len", "0", "--out", "x"],
        &["train", "--resume", "x", "--lr", "1"],
        &["train", "tiny", "--curriculum", "--steps", "3", "--out", "x"],
    ] {
        let r = rambac(args);
        assert_eq!(r.code, Some(2), "{args:?}: {}", r.err);
        assert!(r.err.contains("--help") || r.err.contains("Usage"), "{args:?}: {}", r.err);
    }
}

#[test]
fn unknown_instruction_set() {
    let run = |name: &str, verb: &[&str]| command(verb).env("RAMBAC_SIMD", name).output().unwrap();
    for (name, part) in [("sse9", "names no instruction set; it may be portable"), ("AVX2", "names no instruction set")]
    {
        for verb in [&["doctor"][..], &["bench", "forward", "--preset", "tiny", "--len", "64"]] {
            let r = run(name, verb);
            let err = String::from_utf8_lossy(&r.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(r.status.code(), Some(1), "{err}");
            assert!(err.contains(&format!("RAMBAC_SIMD={name}")) && err.contains(part), "{err}");
            assert!(!err.contains("panicked") && !err.contains("BUG"), "{err}");
        }
    }
    let r = run("portable", &["doctor"]);
    let out = String::from_utf8_lossy(&r.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(r.status.success() && out.contains("kernels run on portable, as RAMBAC_SIMD says"), "{out}");
}
