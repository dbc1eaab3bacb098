//! Compiling into one file, running it, looking inside; the cache of kernels.

use crate::support::{command, fixture, refuses, succeeds};
use serde_json::Value;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const LAYER: &str = "graph layer(N) {
  %x = input \"x\" : f32[N, 24]
  %w = param \"w\" : f32[8, 24]
  %y = matmul %x, %w {trans_b = true}
  %z = square %y
  %loss = reduce %z {f = sum, axes = [0, 1]}
  return \"loss\" = %loss, \"y\" = %y
}
";

fn at(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

fn json(out: &str) -> Vec<Value> {
    out.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}"))).collect()
}

#[test]
fn an_executable_writes_on_as_its_model_does() {
    let dir = TempDir::new().unwrap();
    let (model, file) = (fixture("ramba_tiny"), at(&dir, "tiny.rambac"));
    let made = json(&succeeds(&["compile", &model, "-o", &file, "--json"]).out);
    assert_eq!(
        (made[0]["mode"].as_str(), made[0]["bytes"].as_u64()),
        (Some("infer"), Some(fs::metadata(&file).unwrap().len()))
    );
    let text = "The quick brown fox jumps over the lazy dog, again and again and again.";
    let wanted = succeeds(&["generate", &model, "--prompt", text, "--tokens", "12"]).out;
    assert_eq!(succeeds(&["run", &file, "--prompt", text, "--tokens", "12"]).out, wanted);
    let some = ["run", file.as_str(), "--prompt", text, "--prompt", "Once", "--tokens", "5", "--segment", "7"];
    let wanted = succeeds(&["generate", &model, "--prompt", text, "--prompt", "Once", "--tokens", "5"]).out;
    assert_eq!(succeeds(&some).out, wanted);
    let ids = succeeds(&["run", &file, "--ids", "84,104,101", "--tokens", "4"]).out;
    assert_eq!(ids.split_whitespace().filter(|w| w.parse::<u32>().is_ok()).count(), 4, "{ids}");

    let inside = succeeds(&["inspect", &file]).out;
    for part in ["inference of", "upper_flash", "backbone.embeddings.weight", "every byte is what was written"] {
        assert!(inside.contains(part), "no {part:?} in {inside}");
    }
    let lines = json(&succeeds(&["inspect", &file, "--json"]).out);
    assert_eq!(lines.iter().filter(|l| l["kind"] == "part").count(), 5);

    refuses(&["run", &file], &["--prompt TEXT"]);
    refuses(&["run", &file, "--ids", "1,99999999"], &["99999999", "not in the vocabulary"]);
    refuses(&["run", &file, "--prompt", "a", "--device", "simulator"], &["compiled for the cpu alone"]);
    refuses(&["run", &file, "--prompt", "a", "--device", "reference"], &["not by the ops' definitions"]);
    refuses(&["generate", &model, "--prompt", "a", "--device-memory", "1G"], &["--device cuda:0"]);
    for verb in [&["generate", model.as_str()][..], &["run", file.as_str()]] {
        let args = [verb, &["--prompt", "a", "--profile", "t.json"]].concat();
        refuses(&args, &["traces of inference are of devices", "--device cuda:0"]);
    }
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();
    refuses(&["run", &file, "--prompt", "a"], &["tiny.rambac", "are not what was written", "copy it again"]);
    refuses(&["inspect", &file], &["are not what was written"]);
    fs::write(&file, &bytes[..last]).unwrap();
    refuses(&["run", &file, "--prompt", "a"], &["truncated"]);
}

/// Another attention in a model's stack: trained, compiled for training and for inference, run.
#[test]
fn executables_of_attention_variants() {
    let dir = TempDir::new().unwrap();
    let (run, file, step) = (at(&dir, "run"), at(&dir, "infer.rambac"), at(&dir, "step.rambac"));
    succeeds(&["train", "tiny", "--attention", "moba", "--len", "128", "--batch", "1", "--steps", "2", "--out", &run]);
    let made = succeeds(&["compile", &run, "-o", &file, "--context", "128"]).out;
    assert!(made.contains("inference of") && made.contains("room for 128 tokens"), "{made}");
    let text = "The quick brown fox jumps over the lazy dog.";
    let wanted = succeeds(&["generate", &run, "--prompt", text, "--tokens", "9"]).out;
    assert_eq!(succeeds(&["run", &file, "--prompt", text, "--tokens", "9", "--segment", "10"]).out, wanted);
    let wanted = succeeds(&["generate", &run, "--prompt", text, "--prompt", "Once", "--tokens", "5"]).out;
    assert_eq!(succeeds(&["run", &file, "--prompt", text, "--prompt", "Once", "--tokens", "5"]).out, wanted);
    let inside = succeeds(&["inspect", &file]).out;
    assert!(inside.contains("every byte is what was written") && inside.contains("context 128"), "{inside}");
    refuses(
        &["run", &file, "--prompt", text, "--tokens", "200"],
        &["there is room for", "244 are wanted", "--context"],
    );
    refuses(&["generate", &run, "--prompt", "a", "--store", &at(&dir, "x")], &["keeps no chunks", "leave --store out"]);

    let train = ["compile", "tiny", "--attention", "nsa", "--transformer", "--train", "-o", &step];
    assert!(succeeds(&train).out.contains("a training step of tiny"));
    assert_eq!(succeeds(&["run", &step, "--steps", "2", "--len", "128"]).out.matches("loss").count(), 2);
    refuses(
        &["compile", "tiny", "--attention", "mobba", "-o", &step],
        &["no attention \"mobba\"", "did you mean moba"],
    );
    for whole in [&["--device", "simulator", "--diagnose"][..], &["--flash"]] {
        refuses(&[&["eval", "passkey", &run][..], whole].concat(), &["chunks"]);
    }
    let halves = succeeds(&["eval", "passkey", &run, "--len", "256", "--cases", "1", "--weights", "bf16"]).out;
    assert!(halves.contains("256"), "{halves}");
    let speed =
        succeeds(&["bench", "decode", "--preset", "tiny", "--attention", "moba", "--len", "64", "--runs", "1"]).out;
    assert!(speed.contains("decode of tiny"), "{speed}");
}

#[test]
fn bf16_weights_halve_the_file() {
    let dir = TempDir::new().unwrap();
    let (model, file) = (fixture("ramba_tiny"), at(&dir, "half"));
    let bytes = |args: &[&str]| json(&succeeds(args).out)[0]["weight_bytes"].as_u64().unwrap();
    let whole = bytes(&["compile", &model, "-o", &file, "--json"]);
    let half = bytes(&["compile", &model, "-o", &file, "--json", "--weights", "bf16"]);
    assert!(half * 10 < whole * 6, "{half} of {whole}");
    let wanted = succeeds(&["generate", &model, "--prompt", "abc", "--tokens", "8", "--weights", "bf16"]).out;
    assert_eq!(succeeds(&["run", &file, "--prompt", "abc", "--tokens", "8"]).out, wanted);
}

#[test]
fn a_training_step_trains() {
    let dir = TempDir::new().unwrap();
    let (bare, full, saved) = (at(&dir, "bare"), at(&dir, "full"), at(&dir, "w.safetensors"));
    succeeds(&["compile", "tiny", "--train", "-o", &bare, "--lr", "0.01", "--steps", "50"]);
    succeeds(&["compile", "tiny", "--train", "-o", &full, "--lr", "0.01", "--steps", "50", "--init", "3"]);
    let steps = |args: &[&str]| {
        let all = json(&succeeds(args).out);
        all.iter().map(|l| (l["loss"].as_f64().unwrap(), l["grad_norm"].as_f64().unwrap())).collect::<Vec<_>>()
    };
    let run = |file: &str, seed: &str| steps(&["run", file, "--steps", "4", "--len", "128", "--seed", seed, "--json"]);
    let first = run(&bare, "3");
    assert!(first.iter().all(|(l, g)| *l > 0.0 && *g > 0.0), "{first:?}");
    // Weights from the file or drawn at the run: the same.
    assert_eq!(first, run(&full, "3"));
    assert_ne!(first, run(&bare, "4"));
    succeeds(&["run", &full, "--steps", "1", "--len", "128", "--save", &saved]);
    assert!(succeeds(&["inspect", &saved]).out.contains("all values are finite"));
    refuses(&["run", &bare, "--device", "simulator"], &["compiled for the cpu alone", "--target sm_80"]);
    refuses(&["run", &bare, "--len", "100"], &["100"]);
}

#[test]
fn graphs_in_text_form() {
    let dir = TempDir::new().unwrap();
    let (ir, file, out) = (at(&dir, "layer.ir"), at(&dir, "layer"), at(&dir, "out.safetensors"));
    fs::write(&ir, LAYER).unwrap();
    succeeds(&["compile", &ir, "-o", &file, "--init", "1"]);
    let made = json(&succeeds(&["run", &file, "--batch", "5", "--save", &out, "--json"]).out);
    assert_eq!(made[1]["type"].as_str(), Some("f32[5, 8]"));
    // Inputs by name: the same outputs again, from those given.
    let x = rambac_runtime::checkpoint::TensorRef::f32("x", &[2, 24], &[0.0; 48]);
    let given = dir.path().join("x.safetensors");
    rambac_runtime::checkpoint::write_safetensors(&given, &[x], &[]).unwrap();
    let zero = json(&succeeds(&["run", &file, "--dims", "N=2", "--inputs", given.to_str().unwrap(), "--json"]).out);
    assert_eq!(zero[0]["mean"].as_f64(), Some(0.0));
    refuses(&["run", &file, "--inputs", given.to_str().unwrap(), "--dims", "N=3"], &["x", "f32[3, 24]", "f32[2, 24]"]);
    refuses(&["run", &file, "--dims", "M=3"], &["M=3", "symbols are N"]);
    succeeds(&["compile", &ir, "-o", &file, "--train"]);
    let text = succeeds(&["run", &file, "--steps", "2", "--batch", "4"]).out;
    assert!(text.contains("step    2  loss"), "{text}");
    refuses(&["compile", &ir, "--infer", "-o", &file], &["inference needs a model"]);
    refuses(&["compile", &ir, "-o", dir.path().to_str().unwrap()], &["a file in a folder that exists"]);
    refuses(&["compile", &ir, "-o", &at(&dir, "no/where")], &["a file in a folder that exists"]);
    refuses(&["compile", "tiny", "--train", "--lr", "0", "-o", &file], &["--lr 0"]);
}

/// An op that no kernel takes is named before any compiler is looked for.
#[test]
fn what_a_gpu_cannot_run() {
    let dir = TempDir::new().unwrap();
    let (ir, file) = (at(&dir, "wide.ir"), at(&dir, "wide"));
    let text = "graph wide(N) {
  %x = input \"x\" : f32[N, 262144]
  %w = input \"w\" : f32[262144]
  %y = rms_norm %x, %w {eps = 1e-5}
  return \"y\" = %y
}
";
    fs::write(&ir, text).unwrap();
    refuses(
        &["compile", &ir, "-o", &file, "--target", "cpu,sm_80"],
        &["(rms_norm, ", "can't run on sm_80", "wider than", "--target cpu", "rambac explain"],
    );
    assert!(!Path::new(&file).exists());
    succeeds(&["compile", &ir, "-o", &file]);
    let text = succeeds(&["explain", &ir, "--dims", "N=2", "--target", "sm_80"]).out;
    assert!(text.contains("Can't run on sm_80") && text.contains("1 rms_norm: rows of"), "{text}");
    fs::write(&ir, LAYER).unwrap();
    let lines = json(&succeeds(&["explain", &ir, "--train", "--target", "sm_90a", "--json"]).out);
    let forms: Vec<&Value> = lines.iter().filter(|l| l["section"] == "form").collect();
    assert_eq!(Some(forms.len() as u64), lines[0]["steps"].as_u64());
    assert!(forms.iter().all(|f| f["why"].as_str().is_some_and(|w| !w.is_empty())));
    assert!(lines.iter().any(|l| l["section"] == "kernel" && l["registers"].is_null()));
}

#[test]
fn the_cache_says_where_it_is() {
    let dir = TempDir::new().unwrap();
    let run = |task: &str, folder: &str| {
        let o = command(&["cache", task]).env("RAMBAC_CACHE", folder).output().unwrap();
        (o.status.code(), String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr))
    };
    let folder = at(&dir, "cache");
    for (task, word) in [
        ("list", "0 kernels"),
        ("verify", "all are what was written"),
        ("clear", "0 kernels and 0 measured choices removed"),
    ] {
        let (code, text) = run(task, &folder);
        assert!(code == Some(0) && text.contains(word) && text.contains(&folder), "{task}: {text}");
    }
    let (code, text) = run("list", "");
    assert!(code == Some(1) && text.contains("RAMBAC_CACHE"), "{text}");
    // A record that says nothing sensible.
    let bad = dir.path().join("cache/kernels/sm_80");
    fs::create_dir_all(&bad).unwrap();
    fs::write(bad.join(format!("k-{}.json", "0".repeat(32))), "{").unwrap();
    let (code, text) = run("verify", &folder);
    assert!(code == Some(1) && text.contains("damaged") && text.contains("k-0000"), "{text}");
    let (code, text) = run("clear", &folder);
    assert!(code == Some(0) && text.contains("1 kernel and 0 measured choices removed"), "{text}");
}
