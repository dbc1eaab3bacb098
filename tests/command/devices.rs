//! A GPU that is not there: every verb that would run on one says so, once, and leaves nothing behind.

use crate::support::{fixture, rambac, succeeds};
use std::path::Path;
use tempfile::TempDir;

#[test]
fn without_the_gpu_that_was_asked_for() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (out, file, model) = (at("run"), at("tiny.rambac"), fixture("ramba_tiny"));
    succeeds(&["compile", "tiny", "--train", "-o", &file]);
    // No machine has as many.
    let why = match rambac_cuda::survey() {
        Ok(_) => "there is no device cuda:4095",
        Err(_) => "there is no NVIDIA driver",
    };
    let verbs: &[&[&str]] = &[
        &["train", "tiny", "--len", "128", "--steps", "1", "--out", &out],
        &["demo", "--out", &out],
        &["generate", &model, "--prompt", "a", "--tokens", "1"],
        &["eval", "passkey", &model, "--len", "256", "--cases", "1"],
        &["run", &file, "--steps", "1"],
        &["check", &fixture("")],
        &["tune", "tiny"],
        &["bench", "train", "--preset", "tiny", "--len", "128"],
        &["bench", "forward", "--preset", "tiny", "--len", "128"],
        &["bench", "attend", "--preset", "tiny", "--len", "128"],
        &["bench", "decode", "--preset", "tiny", "--len", "128"],
    ];
    for verb in verbs {
        let args = [verb, &["--device", "cuda:4095"][..]].concat();
        let r = rambac(&args);
        assert_eq!(r.code, Some(1), "{args:?}: {} {}", r.out, r.err);
        assert!(r.err.contains(why) && r.err.matches('×').count() == 1, "{args:?}: {}", r.err);
        assert!(!Path::new(&out).exists(), "{args:?} left a folder");
    }
}
