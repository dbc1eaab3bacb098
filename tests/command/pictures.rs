//! What runs write about themselves, and the pictures made of it.

use crate::support::{rambac, refuses, succeeds};
use std::fs;
use tempfile::TempDir;

/// A run, a second one, an evaluation of it, and their curves as SVG and PNG.
#[test]
fn plots_runs() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let train = ["train", "tiny", "--len", "128", "--batch", "1", "--steps", "4", "--json", "--out"];
    succeeds(&[&train[..], &[&at("one"), "--seed", "1"]].concat());
    succeeds(&[&train[..], &[&at("two"), "--seed", "2"]].concat());
    let events: Vec<_> = fs::read_dir(dir.path().join("one/tensorboard")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(events.len(), 1, "{events:?}");
    let bytes = fs::read(&events[0]).unwrap();
    for tag in ["brain.Event:2", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s"] {
        assert!(bytes.windows(tag.len()).any(|w| w == tag.as_bytes()), "no {tag} among the events");
    }
    succeeds(&["eval", "passkey", &at("one"), "--len", "128", "--cases", "1", "--json"]);
    let kept = fs::read_to_string(dir.path().join("one/eval.jsonl")).unwrap();
    assert!(kept.contains("\"step\":4") && kept.contains("\"len\":128"), "{kept}");

    let svg = at("curves.svg");
    succeeds(&["plot", &at("one"), &at("two/latest"), "--out", &svg, "--smooth", "1"]);
    let text = fs::read_to_string(&svg).unwrap();
    for part in ["<svg", ">one<", ">two<", "gradient norm", "accuracy", "learning rate", "tokens/s"] {
        assert!(text.replace('\n', "").contains(part), "no {part:?} in the picture");
    }
    let png = at("curves.png");
    succeeds(&["plot", &at("one"), "--only", "loss,lr", "--axis", "step", "--log", "--out", &png]);
    assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"));

    refuses(&["plot", &at("none")], &["there is no metrics.jsonl here", "training run"]);
    refuses(&["plot", &at("one"), "--out", &at("x.jpg")], &[".svg or .png"]);
    refuses(&["plot", &at("one"), "--only", "beauty"], &["--only beauty", "grad_norm"]);
    refuses(
        &["train", "tiny", "--len", "128", "--steps", "1", "--tui", "--out", &at("three")],
        &["standard output is none"],
    );
    assert_eq!(rambac(&["train", "tiny", "--tui", "--json"]).code, Some(2));
}

/// Graphs of every preset as pictures, and what is no graph.
#[test]
fn draws_graphs() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (svg, png, dot) = (at("g.svg"), at("g.png"), at("g.dot"));
    for preset in ["tiny", "small", "mamba2-130m", "370m", "3b"] {
        succeeds(&["view", preset, "--export", &svg]);
        assert!(fs::read_to_string(&svg).unwrap().contains("layers.0"), "{preset}");
    }
    succeeds(&["view", "nsa", "--export", &svg]);
    refuses(&["view", "nsa", "--train", "--export", &svg], &["nsa", "\"loss\"", "leave --train out"]);
    succeeds(&["view", "tiny", "--attention", "moba", "--train", "--open", "--export", &svg]);
    assert!(fs::read_to_string(&svg).unwrap().contains("tiny with moba, a training step"));
    refuses(&["view", "nsa", "--attention", "moba", "--export", &svg], &["--attention", "nsa"]);
    succeeds(&[
        "view",
        "tiny",
        "--train",
        "--pass",
        "fuse_attention",
        "--before",
        "--colour",
        "time",
        "--export",
        &png,
    ]);
    assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"));
    succeeds(&["view", "tiny", "--open", "--dims", "L=512", "--export", &dot]);
    assert!(fs::read_to_string(&dot).unwrap().contains("selective_scan"));
    succeeds(&["view", "tiny", "--memory", "--export", &svg]);
    let compiled = at("tiny.rambac");
    succeeds(&["compile", "tiny", "-o", &compiled]);
    succeeds(&["view", &compiled, "--part", "upper", "--export", &svg]);

    refuses(&["view", &compiled, "--part", "cellar", "--export", &svg], &["--part cellar", "upper"]);
    refuses(&["view", "tiny", "--export", &at("g.jpg")], &[".svg, .png or .dot"]);
    refuses(&["view", "tiny", "--pass", "magic", "--export", &svg], &["--pass magic", "fuse_map"]);
    refuses(&["view", "tiny", "--len", "17", "--export", &svg], &["not divisible"]);
    refuses(&["view", "tinny", "--export", &svg], &["did you mean"]);
    for (name, contents) in
        [("a.ir", "graph x( {"), ("b.rambac", "not a safetensors file"), ("c.json", "{"), ("d.ir", "")]
    {
        fs::write(at(name), contents).unwrap();
        refuses(&["view", &at(name), "--export", &svg], &[name]);
    }
    let whole = fs::read(&compiled).unwrap();
    fs::write(at("cut.rambac"), &whole[..whole.len() / 2]).unwrap();
    refuses(&["view", &at("cut.rambac"), "--export", &svg], &["cut.rambac"]);
}
