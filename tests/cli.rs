//! The command from outside: what it prints, its exit status, and that bad input is an error and no panic.

use rambac_runtime::checkpoint::{TensorRef, write_safetensors};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn rambac(args: &[&str]) -> Ran {
    let o = Command::new(env!("CARGO_BIN_EXE_rambac")).args(args).output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    let r = Ran { code: o.status.code(), out: text(&o.stdout), err: text(&o.stderr) };
    assert!(!r.err.contains("panicked"), "{args:?}: {}", r.err);
    r
}

/// What a run that must succeed prints.
fn ok(args: &[&str]) -> String {
    let r = rambac(args);
    assert_eq!(r.code, Some(0), "{args:?}: {}", r.err);
    r.out
}

fn json_lines(args: &[&str]) -> Vec<Value> {
    ok(args).lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{args:?}: {l}: {e}"))).collect()
}

/// An error with `parts` in its message, and nothing on standard output.
fn fails(args: &[&str], parts: &[&str]) {
    let r = rambac(args);
    assert_eq!((r.code, r.out.as_str()), (Some(1), ""), "{args:?}: {}", r.err);
    // Messages are wrapped to the terminal.
    let words = r.err.split(|c: char| c.is_whitespace() || c == '│').filter(|w| !w.is_empty()).collect::<Vec<_>>();
    let message = words.join(" ");
    parts.iter().for_each(|p| assert!(message.contains(p), "{args:?}: no {p:?} in {message}"));
}

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn at(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

#[test]
fn usage_errors_have_status_2() {
    for args in [
        &[][..],
        &["fly"],
        &["bench", "--len", "0"],
        &["bench", "jump"],
        &["explain"],
        &["generate", "x"],
        &["compile", "tiny"],
    ] {
        assert_eq!(rambac(args).code, Some(2), "{args:?}");
    }
    let verbs = ["bench", "explain", "inspect", "doctor", "generate", "check", "train", "eval", "demo", "simulate"];
    for verb in verbs.into_iter().chain(["compile", "run", "cache", "plot", "view", "attend", "report"]) {
        assert!(ok(&[verb, "--help"]).contains("Usage"), "{verb}");
    }
}

#[test]
fn failures_have_status_1_and_say_what_to_do() {
    fails(&["explain", "smal"], &["did you mean \"small\""]);
    fails(&["explain", "no/such.ir"], &["no/such.ir", "an .ir file"]);
    fails(&["explain", "tiny", "--dims", "C=3"], &["C=3", "N, L"]);
    fails(&["explain", "tiny", "--len", "17"], &["17 is not divisible by 16"]);
    fails(&["explain", "tiny", "--dims", "N=4611686018427387904"], &["overflows"]);
    fails(&["explain", "tiny", "--train", "--dims", "N=1099511627776,L=65536"], &["overflows"]);
    fails(&["bench", "train", "--preset", "tiny", "--len", "17"], &["the nearest are --len 16 and --len 32"]);
    fails(&["bench", "attend", "--preset", "mamba2-130m"], &["selects no chunks"]);
    fails(&["bench", "train", "--preset", "tiny", "--len", "16", "--weights", "bf16"], &["training updates f32"]);
    fails(&["bench", "train", "--preset", "3b", "--len", "1048576", "--batch", "64"], &["needs", "this machine has"]);
    fails(&["inspect", "nowhere"], &["nowhere"]);
    fails(&["generate", "tiny", "--prompt", "a"], &["no weights"]);
    let model = fixture("ramba_tiny");
    fails(&["generate", &model, "--prompt", ""], &["prompt is empty"]);
    fails(&["generate", &model, "--prompt", "a", "--top-p", "2"], &["--top-p 2"]);
    fails(&["generate", &model, "--prompt-file", "nowhere"], &["nowhere"]);
}

#[test]
fn explain_tells_passes_fusion_work_and_memory() {
    let text = ok(&["explain", "tiny", "--train", "--len", "256"]);
    for part in ["Passes", "fuse_map", "1 selection and 1 backward: layers.3", "layers.4 attention", "Largest buffers"]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    text.lines().for_each(|l| assert!(l.chars().count() <= 100, "{l}"));
    let lines = json_lines(&["explain", "tiny", "--train", "--len", "256", "--json"]);
    let of = |section: &'static str| lines.iter().filter(move |l| l["section"] == section);
    let total = lines[0]["flops"].as_f64().unwrap();
    for section in ["op", "layer"] {
        let sum: f64 = of(section).map(|l| l["flops"].as_f64().unwrap()).sum();
        assert!((sum - total).abs() <= 1e-9 * total, "{section}: {sum} of {total}");
    }
    let memory = of("memory").next().unwrap();
    assert!(memory["floor_bytes"].as_u64() <= memory["arena_bytes"].as_u64());
    assert_eq!(lines[0]["peak_bytes"], memory["peak_bytes"]);
    assert_eq!(of("unfused").count() + of("slow").count(), 0);
    // Recomputing trades work for memory.
    let again = json_lines(&["explain", "tiny", "--train", "--len", "256", "--recompute", "--json"]);
    assert!(again[0]["flops"].as_f64() > lines[0]["flops"].as_f64());
    assert!(again[0]["peak_bytes"].as_u64() < lines[0]["peak_bytes"].as_u64());
}

#[test]
fn explain_says_why_something_is_not_fused() {
    let dir = TempDir::new().unwrap();
    let path = at(&dir, "hsa.ir");
    let text = r#"graph hsa(N, L, C) {
  %q  = input "q" : f32[N, L, 4, 16]
  %lm = input "lm" : f32[N, C, 4, 16]
  %st = input "st" : i32[N]
  %s  = score %q, %lm, %st {chunk = 16, scale = 0.25}
  %i, %n = select %s {k = 4, order = recent}
  %w  = weigh %s, %i, %n {rule = stick_breaking}
  return %w, %s
}
"#;
    std::fs::write(&path, text).unwrap();
    fails(&["explain", &path], &["the symbol C has no value", "--dims C=64"]);
    fails(&["explain", &path, "--dims", "C=2", "--train"], &["needs an output \"loss\""]);
    let lines = json_lines(&["explain", &path, "--len", "64", "--dims", "C=2", "--json"]);
    let unfused = lines.iter().find(|l| l["section"] == "unfused").unwrap();
    assert_eq!(
        (&unfused["reason"], &unfused["bytes"]),
        (&"the scores are an output of the graph".into(), &2048.into())
    );
    let printed = ok(&["explain", &path, "--dims", "C=2", "--ir"]);
    assert_eq!(rambac_ir::text::parse(&printed).unwrap().outputs.len(), 2);
    assert!(ok(&["explain", &path, "--dims", "C=2", "--program"]).contains("score"));
    std::fs::write(&path, text.replace("k = 4", "k = four")).unwrap();
    fails(&["explain", &path, "--dims", "C=2"], &["hsa.ir"]);
}

#[test]
fn inspect_finds_sizes_and_broken_values() {
    let model = fixture("ramba_tiny");
    let lines = json_lines(&["inspect", &model, "--json"]);
    let find = |kind: &str| lines.iter().find(|l| l["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"));
    assert_eq!(find("total")["elements"], find("config")["parameters"]);
    assert_eq!((&find("fit")["ok"], &find("total")["not_finite"]), (&true.into(), &0.into()));

    let dir = TempDir::new().unwrap();
    let path = at(&dir, "x.safetensors");
    let data = [1.0, f32::NAN, 3.0, f32::INFINITY];
    write_safetensors(Path::new(&path), &[TensorRef::f32("w", &[2, 2], &data)], &[]).unwrap();
    assert!(ok(&["inspect", &path]).contains("BROKEN w: 2 of 4 values"));
    let lines = json_lines(&["inspect", &path, "--stats", "--json"]);
    let row = lines.iter().find(|l| l["kind"] == "tensor").unwrap();
    assert_eq!(
        [&row["min"], &row["max"], &row["mean"], &row["std"]].map(|v| v.as_f64()),
        [1.0, 3.0, 2.0, 1.0].map(Some)
    );
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    fails(&["inspect", &path], &["x.safetensors"]);
    fails(&["inspect", &dir.path().display().to_string()], &[]);
}

#[test]
fn generate_depends_on_the_seed_alone() {
    let model = fixture("ramba_tiny");
    let text = |more: &[&str]| ok(&[&["generate", &model, "--prompt", "Once upon", "--tokens", "24"], more].concat());
    let draw = |seed: &str, segment: &str| {
        text(&["--temperature", "1", "--top-k", "40", "--seed", seed, "--segment", segment])
    };
    assert_eq!(text(&[]), text(&["--seed", "5"]));
    assert_eq!(draw("1", "1024"), draw("1", "3"));
    assert_ne!(draw("1", "1024"), draw("2", "1024"));
    assert_eq!(ok(&["generate", &model, "--prompt", "x", "--tokens", "0"]), "\n");
    let half = ["--weights", "bf16", "--temperature", "1"];
    assert_eq!(text(&half), text(&[&half[..], &["--threads", "1", "--segment", "3"]].concat()));
}

#[test]
fn bench_and_doctor_measure() {
    let keys = ["tokens_per_s", "seconds", "flops", "bytes", "peak_bytes", "peak_rss_bytes", "gemm_fraction"];
    for what in ["train", "forward", "select", "attend", "scan"] {
        let lines =
            json_lines(&["bench", what, "--preset", "tiny", "--len", "128", "--runs", "2", "--json", "--profile"]);
        let results: Vec<_> = lines.iter().filter(|l| !l["bench"].is_null()).collect();
        assert_eq!(results.len(), if ["train", "forward"].contains(&what) { 1 } else { 2 }, "{what}");
        for r in &results {
            keys.iter().for_each(|k| assert!(r[k].as_f64().is_some_and(|v| v > 0.0), "{what}: {k} in {r}"));
            let shares = lines.iter().filter(|l| l["profile"] == r["bench"]).filter_map(|l| l["share"].as_f64());
            assert!((shares.sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
    for what in ["prefill", "decode"] {
        let of = |weights: &str| {
            let args =
                ["bench", what, "--preset", "tiny", "--len", "96", "--runs", "2", "--weights", weights, "--json"];
            let line = json_lines(&args).remove(0);
            let keys = ["tokens_per_s", "seconds", "flops", "bytes", "peak_bytes", "peak_rss_bytes", "read_fraction"];
            keys.iter().for_each(|k| assert!(line[*k].as_f64().is_some_and(|v| v > 0.0), "{what}: {k} in {line}"));
            assert_eq!((&line["bench"], &line["weights"]), (&what.into(), &weights.into()));
            line
        };
        let (single, half) = (of("f32"), of("bf16"));
        assert_eq!(single["flops"], half["flops"]);
        // Most of what decoding reads is matrices.
        let ratio = half["bytes"].as_f64().unwrap() / single["bytes"].as_f64().unwrap();
        assert!(if what == "decode" { (0.5..0.6).contains(&ratio) } else { ratio < 1.0 }, "{what}: {ratio}");
    }
    // Lines are broken where the terminal ends.
    let told = ok(&["doctor"]).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(told.contains("programs run on the CPU") || told.contains("cuda:0 is"), "{told}");
    assert!(json_lines(&["doctor", "--json"]).iter().all(|l| l["state"] != "broken"));
}

/// y[i] = 2·x[i] for i < n.
const TWICE: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 y, .param .u64 x, .param .u32 n) {
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .f32 %f<3>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [y];
    ld.param.u64 %rd2, [x];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra $end;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f1, [%rd5];
    add.f32 %f2, %f1, %f1;
    st.global.f32 [%rd4], %f2;
$end:
    ret;
}
";

#[test]
fn simulate_runs_a_kernel_and_says_what_is_wrong() {
    let dir = TempDir::new().unwrap();
    let (ptx, saved) = (at(&dir, "twice.ptx"), at(&dir, "y"));
    std::fs::write(&ptx, TWICE).unwrap();
    let save = format!("y={saved}");
    let right =
        ["simulate", &ptx, "--grid", "4", "--arg", "y=f32[100]", "--arg", "x=f32[100]:iota", "--arg", "n=i32:100"];
    let out = ok(&[&right[..], &["--save", &save, "--report"]].concat());
    for part in ["0 findings", "0 2 4 6", "equal results in all schedules", "B written"] {
        assert!(out.contains(part), "no {part:?} in {out}");
    }
    let want: Vec<u8> = (0..100).flat_map(|i| (2.0 * i as f32).to_le_bytes()).collect();
    assert_eq!(std::fs::read(&saved).unwrap(), want);
    // A bound too far: a finding, and status 1.
    let r = rambac(&[
        "simulate",
        &ptx,
        "--grid",
        "4",
        "--arg",
        "y=f32[100]",
        "--arg",
        "x=f32[101]:1",
        "--arg",
        "n=i32:101",
    ]);
    assert_eq!(r.code, Some(1), "{}", r.err);
    assert!(r.out.contains("buffer \"y\" (400 bytes), 0 bytes past its end"), "{}", r.out);
    let line = 1 + TWICE.lines().position(|l| l.contains("st.global")).unwrap();
    assert!(
        r.out.contains(&format!("PTX line {line},")) && r.out.contains("block (3, 0, 0), thread (4, 0, 0)"),
        "{}",
        r.out
    );
    let all = json_lines(&[&right[..], &["--json"]].concat());
    assert_eq!((all.len(), &all[0]["findings"]), (2, &Value::from(0)));
    fails(&["simulate", &ptx], &["twice takes 3 arguments, 0 came: twice(u64, u64, u32)"]);
    fails(&["simulate", &ptx, "--kernel", "thrice"], &["there is no kernel \"thrice\"", "it has twice"]);
    fails(&["simulate", &ptx, "--arg", "y=q7[3]"], &["\"q7\" is no type"]);
    fails(&["simulate", &at(&dir, "none.ptx")], &["can't be read"]);
    let narrow = ["simulate", &ptx, "--arg", "y=f32[1]", "--arg", "x=f32[1]:1", "--arg", "n=i64:1"];
    fails(&narrow, &["parameter 2 of twice is 4 bytes wide"]);
}
