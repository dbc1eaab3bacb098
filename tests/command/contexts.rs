//! Long contexts: the chunk store in a file, sequences taken up again, flash inference, what eval tells of a case.

use crate::support::{command, fixture, refuses, succeeds};
use rambac_ir::testing::Rng;
use serde_json::Value;
use std::fs;
use std::process::Stdio;
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

/// What is damaged is refused before anything is written, what is in use is left alone, and what was not saved leaves nothing.
#[test]
fn stores_that_cannot_be_gone_on_with() {
    let (dir, model) = (TempDir::new().unwrap(), fixture("ramba_tiny"));
    let (path, prompt) = (at(&dir, "chunks"), "Once upon a time there was a chunk. ".repeat(8));
    succeeds(&["generate", &model, "--prompt", &prompt, "--tokens", "2", "--store", &path]);
    let state = format!("{path}.state");
    let go_on = ["generate", &model, "--prompt", "x", "--tokens", "1", "--resume-store", &path];
    let whole = [&path, &state].map(|p| fs::read(p).unwrap());
    let mut rng = Rng(7);
    for (file, bytes) in [&path, &state].into_iter().zip(&whole) {
        for _ in 0..6 {
            // Behind the headers, whose damage has messages of its own.
            let mut damaged = bytes.clone();
            let at = bytes.len() - 1 - rng.below(300);
            damaged[at] ^= 1 << rng.below(8);
            fs::write(file, &damaged).unwrap();
            refuses(&go_on, &[file, "damaged", "Nothing was changed"]);
            assert_eq!(fs::read(file).unwrap(), damaged);
        }
        fs::write(file, bytes).unwrap();
    }
    refuses(&[&go_on[..], &["--store-dtype", "f32"]].concat(), &["holds bf16, not f32", "--store-dtype bf16"]);
    refuses(&[&go_on[..], &["--weights", "bf16"]].concat(), &["the --weights"]);
    refuses(&["generate", &model, "--prompt", "x", "--resume-store", &at(&dir, "none")], &["none: cannot open it"]);
    let held = fs::File::open(&path).unwrap();
    held.lock().unwrap();
    refuses(&go_on, &[&path, "another process"]);
    drop(held);
    succeeds(&go_on);

    let lost = at(&dir, "lost");
    refuses(
        &["generate", &model, "--prompt", "x", "--tokens", "1", "--store", &lost, "--device", "reference"],
        &["inference"],
    );
    assert!(!fs::exists(&lost).unwrap());
    // Of a state that belongs to a store of that name that was removed.
    fs::copy(&state, format!("{lost}.state")).unwrap();
    let other = prompt.to_uppercase();
    succeeds(&["generate", &model, "--prompt", &other, "--tokens", "9", "--store", &lost]);
    fs::copy(&state, format!("{lost}.state")).unwrap();
    refuses(&["generate", &model, "--prompt", "x", "--resume-store", &lost], &["damaged"]);
}

/// Ctrl-C while it writes: the store stands where the text ends.  A reader who leaves does not matter either.
#[cfg(unix)]
#[test]
fn a_text_that_is_cut_short_is_kept() {
    use std::io::Read;
    let (dir, model) = (TempDir::new().unwrap(), fixture("ramba_tiny"));
    for (name, interrupt) in [("stopped", true), ("unread", false)] {
        let path = at(&dir, name);
        let args = ["generate", &model, "--prompt", "Once upon a time", "--tokens", "100000000", "--store", &path];
        let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 20]).unwrap();
        if interrupt {
            // SAFETY: a signal to a child that was not waited for.
            unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
            std::io::copy(&mut out, &mut std::io::sink()).unwrap();
        }
        drop(out);
        let done = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(err.contains("tokens stand in") && !err.contains("panicked"), "{err}");
        assert_eq!(done.status.code(), Some(if interrupt { 130 } else { 1 }), "{err}");
        succeeds(&["generate", &model, "--prompt", "x", "--tokens", "1", "--resume-store", &path]);
    }
}

/// The file of an evaluation has no name, so that a kill leaves nothing.
#[cfg(unix)]
#[test]
fn an_evaluation_that_is_killed_leaves_nothing() {
    use std::io::Read;
    let (dir, model) = (TempDir::new().unwrap(), fixture("ramba_tiny"));
    let path = at(&dir, "chunks");
    let args = ["eval", "passkey", &model, "--len", "500", "--cases", "100000", "--store", &path, "--diagnose"];
    let mut child = command(&args).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 400]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!fs::exists(&path).unwrap());
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
            // A chunk that was not among the four best has no weight.
            assert!((1..=4).contains(&rank.as_u64().unwrap()) || weight.as_f64().unwrap() == 0.0, "{case}");
        }
    }
}
