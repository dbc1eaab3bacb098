//! Training runs that stop and go on: bit for bit after a resume, whole after a kill, saved after Ctrl-C.

use crate::support::{command, copy, rambac, succeeds};
use rambac_ir::testing::Rng;
use rambac_runtime::checkpoint::Checkpoint;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// Six steps at once, and three, then three more from the checkpoint: the same bytes.
fn resumes(extra: &[&str]) {
    let dir = TempDir::new().unwrap();
    let (whole, half, rest) = (dir.path().join("whole"), dir.path().join("half"), dir.path().join("rest"));
    let mut args = vec!["train", "tiny", "--len", "128", "--batch", "2", "--steps", "6", "--warmup", "2", "--fan-in"];
    args.extend(["--save-every", "3", "--seed", "5", "--json", "--out", text(&whole)]);
    args.extend(extra);
    succeeds(&args);
    // A run that holds the third step and nothing after it.
    let first = Checkpoint::open(&whole).unwrap().path;
    let third = fs::read_dir(&whole)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.is_dir() && !p.is_symlink() && *p != first && Checkpoint::open(p).is_ok_and(|c| c.step == Some(3)))
        .expect("a checkpoint of step 3");
    copy(&third, &half.join(third.file_name().unwrap()));
    succeeds(&["train", "--resume", text(&half), "--out", text(&rest), "--json"]);
    let (a, b) = (Checkpoint::open(&whole).unwrap(), Checkpoint::open(&rest).unwrap());
    assert_eq!((a.step, b.step), (Some(6), Some(6)));
    for file in ["model.safetensors", "state.safetensors", "config.json"] {
        let read = |c: &Checkpoint| fs::read(c.path.join(file)).unwrap();
        assert!(read(&a) == read(&b), "{extra:?}: {file} differs after a resume");
    }
    // The steps that were done again report the same, but for their speed.
    let lines = |d: &Path| -> Vec<(u64, f64, f64)> {
        let all = fs::read_to_string(d.join("metrics.jsonl")).unwrap();
        let number = |v: &serde_json::Value, k: &str| v[k].as_f64().unwrap();
        all.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .map(|v: serde_json::Value| (v["step"].as_u64().unwrap(), number(&v, "loss"), number(&v, "grad_norm")))
            .collect()
    };
    assert_eq!(lines(&whole)[3..], lines(&rest), "{extra:?}");
}

#[test]
fn resume_is_bit_for_bit() {
    resumes(&[]);
}

#[test]
fn resume_with_accumulation() {
    resumes(&["--accumulate", "2"]);
}

#[test]
fn resume_with_state_passing() {
    resumes(&["--state-passing", "0.5"]);
}

#[test]
fn resume_with_recompute() {
    resumes(&["--recompute"]);
}

#[test]
fn resume_with_everything() {
    resumes(&["--accumulate", "2", "--state-passing", "0.5", "--recompute", "--task", "copy"]);
}

/// A run that would go on for ever, saving after every step.
fn endless(out: &Path, resume: bool) -> Child {
    let mut args = vec!["train"];
    if resume {
        args.extend(["--resume", text(out)]);
    } else {
        args.extend([
            "tiny",
            "--task",
            "copy",
            "--len",
            "64",
            "--batch",
            "1",
            "--steps",
            "1000000",
            "--out",
            text(out),
        ]);
    }
    args.extend(["--save-every", "1", "--json"]);
    command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the newest checkpoint is past `step`; a run that never saves fails after minutes.
fn wait_past(out: &Path, step: u64, child: &mut Child) {
    let began = Instant::now();
    while Checkpoint::open(out).ok().and_then(|c| c.step).is_none_or(|s| s <= step) {
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        assert!(began.elapsed() < Duration::from_secs(180), "no checkpoint after step {step}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn killed_runs_go_on() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let mut rng = Rng(6);
    let mut last = 0;
    for kill in 0..8 {
        let mut child = endless(&out, kill > 0);
        wait_past(&out, last, &mut child);
        std::thread::sleep(Duration::from_micros(rng.below(60_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        let c = Checkpoint::open(&out).unwrap_or_else(|e| panic!("after kill {kill}: {e}"));
        let step = c.step.unwrap();
        assert!(step > last, "kill {kill} lost steps: {last}, then {step}");
        // Everything is there and readable.
        for f in [&c.model, &c.state] {
            f.names().for_each(|n| drop(f.get_f32(n).unwrap()));
        }
        last = step;
    }
    succeeds(&["inspect", text(&out)]);
    succeeds(&["eval", "passkey", text(&out), "--len", "256", "--cases", "1"]);
}

/// Readers who leave and disks that are full: a training goes on and saves, other verbs say what is wrong; nothing panics.
#[cfg(target_os = "linux")]
#[test]
fn nobody_reads_standard_output() {
    use std::io::Read;
    let dir = TempDir::new().unwrap();
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for (name, json) in [("json", true), ("bar", false), ("full", true)] {
        let out = dir.path().join(name);
        let args =
            ["train", "tiny", "--task", "copy", "--len", "64", "--batch", "1", "--steps", "40", "--save-every", "0"];
        let mut args = [&args[..], &["--out", text(&out)]].concat();
        args.extend(json.then_some("--json"));
        let stdout = if name == "full" { full().into() } else { Stdio::piped() };
        let mut child = command(&args).stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
        if let Some(mut pipe) = child.stdout.take() {
            // It has begun; a run without --json writes nothing before its end.
            pipe.read_exact(&mut vec![0; if json { 10 } else { 0 }]).unwrap();
        }
        let done = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success() && !err.contains("panicked"), "{name}: {err}");
        assert!(err.contains("goes on without it"), "{name}: {err}");
        assert_eq!(Checkpoint::open(&out).unwrap().step, Some(40));
    }
    for verb in [&["explain", "tiny"][..], &["doctor"], &["train", "--help"]] {
        let done = command(verb).stdout(full()).stderr(Stdio::piped()).output().unwrap();
        let err = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!err.contains("panicked"), "{verb:?}: {err}");
        assert!(verb.contains(&"--help") || done.status.code() == Some(1) && err.contains("standard output"), "{err}");
    }
    // Nobody hears anything at all.
    let out = dir.path().join("deaf");
    let args = ["train", "tiny", "--task", "copy", "--len", "64", "--batch", "1", "--steps", "3", "--out", text(&out)];
    let done = command(&args).stdout(full()).stderr(full()).status().unwrap();
    assert!(done.success() && Checkpoint::open(&out).unwrap().step == Some(3));
}

/// A trace that Ctrl-C ends is whole.
#[cfg(unix)]
#[test]
fn a_trace_ends_with_its_run() {
    let dir = TempDir::new().unwrap();
    let (out, trace) = (dir.path().join("run"), dir.path().join("trace.json"));
    let args =
        ["train", "tiny", "--task", "copy", "--len", "64", "--batch", "1", "--steps", "1000000", "--out", text(&out)];
    let more = ["--profile", text(&trace), "--profile-steps", "1000000"];
    let mut child = command(&[&args[..], &more].concat()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (metrics, began) = (out.join("metrics.jsonl"), Instant::now());
    while fs::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 3 {
        assert!(child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(180), "no steps");
        std::thread::sleep(Duration::from_millis(2));
    }
    // SAFETY: a signal to a child that was not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let trace: serde_json::Value = serde_json::from_slice(&fs::read(&trace).unwrap()).unwrap();
    assert!(trace.as_array().unwrap().len() > 100);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let args =
        ["train", "tiny", "--task", "copy", "--len", "64", "--batch", "1", "--steps", "1000000", "--save-every", "0"];
    let mut child = command(&[&args[..], &["--json", "--out", text(&out)]].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = out.join("metrics.jsonl");
    let began = Instant::now();
    while fs::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 3 {
        assert!(child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(180), "no steps");
        std::thread::sleep(Duration::from_millis(5));
    }
    // SAFETY: a signal to a process of ours that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let saved = Checkpoint::open(&out).unwrap().step.unwrap();
    let steps = fs::read_to_string(&metrics).unwrap().lines().count() as u64;
    assert_eq!(saved, steps, "the checkpoint is not of the last step");
    // And it goes on from there.
    let mut child = endless(&out, true);
    wait_past(&out, saved, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A second run into the same folder does not overwrite the first.
#[test]
fn runs_do_not_overwrite_each_other() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("run");
    let args = ["train", "tiny", "--task", "copy", "--len", "64", "--batch", "1", "--steps", "1", "--out", text(&out)];
    succeeds(&args);
    let before = fs::read(out.join("latest/model.safetensors")).unwrap();
    let r = rambac(&args);
    assert_eq!(r.code, Some(1), "{}", r.err);
    assert!(r.err.contains("already holds a run") && r.err.contains("--resume"), "{}", r.err);
    assert_eq!(fs::read(out.join("latest/model.safetensors")).unwrap(), before);
}

/// The plan within a limit is what the process then takes, but for what a process is.
#[cfg(target_os = "linux")]
#[test]
fn memory_limits_hold() {
    const BESIDE: u64 = 32 << 20;
    let bench = ["bench", "train", "--preset", "small", "--len", "4096", "--runs", "1"];
    for limit in [130u64, 180] {
        let size = format!("{limit}M");
        let r = succeeds(&[&bench[..], &["--json", "--memory-limit", &size]].concat());
        let line: serde_json::Value = serde_json::from_str(r.out.lines().next().unwrap()).unwrap();
        let bytes = |key: &str| line[key].as_u64().unwrap();
        let (planned, resident) = (bytes("peak_bytes"), bytes("peak_rss_bytes"));
        assert!(planned <= limit << 20, "{planned} bytes planned within {limit} MiB");
        assert!((planned..=planned + BESIDE).contains(&resident), "{planned} bytes planned, {resident} resident");
    }
    let r = rambac(&[&bench[..], &["--memory-limit", "30M"]].concat());
    assert_eq!(r.code, Some(1), "{}", r.err);
    assert!(r.err.contains("does not fit into 30.0 MiB") && r.err.contains("--memory-limit"), "{}", r.err);
}
