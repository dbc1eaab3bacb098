//! Long contexts: the chunk store in a file, sequences taken up again, flash inference, what eval tells of a case.

use crate::support::{fixture, refuses, succeeds};
use serde_json::Value;
use std::fs;
use tempfile::TempDir;

fn at(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_string()
}

/// A text written in two runs over a store is the text written in one.
#[test]
fn a_sequence_is_taken_up_again() {
    let (dir, model) = (TempDir::new().unwrap(), fixture("ramba_tiny"));
    let prompt = "Once upon a time there was a chunk that nobody had chosen. ".repeat(4);
    let generate = |prompt: &str, tokens: &str, more: &[&str]| {
        succeeds(&[&["generate", &model, "--prompt", prompt, "--tokens", tokens][..], more].concat())
    };
    let (one, two) = (at(&dir, "one"), at(&dir, "two"));
    let whole = generate(&prompt, "20", &["--store", &one]).out;
    let first = generate(&prompt, "8", &["--store", &two]);
    assert!(first.err.contains("--resume-store"), "{}", first.err);
    // The eight tokens are in the store; a ninth is asked for by the next one of the whole.
    let more = generate(&prompt, "8", &["--resume-store", &two]).err;
    assert!(more.contains(&format!("{} tokens stand in", 2 * (prompt.len() + 8))), "{more}");
    assert!(whole.len() > 8);

    refuses(&["generate", &model, "--prompt", "x", "--store", &one], &["is there already", "--resume-store"]);
    refuses(&["generate", &fixture("ramba_deep"), "--prompt", "x", "--resume-store", &one], &["other weights", &one]);
    let bytes = fs::read(&one).unwrap();
    fs::write(&one, &bytes[..bytes.len() / 2]).unwrap();
    refuses(&["generate", &model, "--prompt", "x", "--resume-store", &one], &["torn", &one, "Nothing was changed"]);
    fs::remove_file(format!("{one}.state")).unwrap();
    refuses(&["generate", &model, "--prompt", "x", "--resume-store", &one], &["one.state"]);
    let two_prompts = ["generate", &model, "--prompt", "x", "--prompt", "y", "--store", &at(&dir, "three")];
    refuses(&two_prompts, &["one sequence, not 2"]);
    refuses(
        &["generate", &model, "--prompt", "x", "--store", "/nowhere/at/all"],
        &["/nowhere/at/all", "check the path"],
    );
}

#[test]
fn several_prompts_are_written_on_together() {
    let model = fixture("ramba_tiny");
    let alone = |p: &str| succeeds(&["generate", &model, "--prompt", p, "--tokens", "5", "--store-dtype", "f32"]).out;
    let args = ["generate", &model, "--prompt", "one", "--prompt", "and two", "--tokens", "5", "--store-dtype", "f32"];
    let both = succeeds(&args).out;
    assert_eq!(both, format!("--- 1\n{}--- 2\n{}", alone("one"), alone("and two")));
}

/// The tier changes nothing but where chunks are; flash and the diagnosis say what they are.
#[test]
fn eval_over_a_file() {
    let (dir, model) = (TempDir::new().unwrap(), fixture("ramba_tiny"));
    let file = at(&dir, "chunks");
    let run = |more: &[&str]| -> Vec<Value> {
        let args =
            ["eval", "passkey", &model, "--len", "3000", "--cases", "2", "--segment", "512", "--json", "--diagnose"];
        let out = succeeds(&[&args[..], more].concat()).out;
        let mut all: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        for v in &mut all {
            let v = v.as_object_mut().unwrap();
            ["seconds", "tokens_per_s", "resident_bytes"].iter().for_each(|k| drop(v.remove(*k)));
        }
        all
    };
    let ram = run(&[]);
    assert_eq!(ram.len(), 3);
    assert_eq!(run(&["--store", &file]), ram);
    assert!(!fs::exists(&file).unwrap(), "eval left its chunks behind");
    let flash = run(&["--flash"]);
    assert_eq!((&flash[2]["flash"], &ram[2]["flash"]), (&true.into(), &false.into()));
    for case in &ram[..2] {
        assert_eq!(case["ranks"].as_array().unwrap().len(), 7);
        let (ranks, weights) = (case["ranks"].as_array().unwrap(), case["weights"].as_array().unwrap());
        for (rank, weight) in ranks.iter().zip(weights) {
            // A chunk that was not among the best has no weight.
            assert!(rank.as_u64().unwrap() < 4 || weight.as_f64().unwrap() == 0.0, "{case}");
        }
    }
}
