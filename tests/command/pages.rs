//! The pages that `attend` and `report` make, and traces: what they hold, and what is refused.  `tests/pages` opens them.

use crate::support::{refuses, succeeds};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A run of a small model, and a text with a needle.
pub fn trained(dir: &Path) -> (String, String) {
    let (run, text) = (dir.join("run"), dir.join("text.txt"));
    let args = ["train", "tiny", "--len", "128", "--batch", "1", "--steps", "3", "--json", "--out"];
    succeeds(&[&args[..], &[run.to_str().unwrap()]].concat());
    let filler = "The <quick> brown fox & friends jump over \"lazy\" dogs.\n".repeat(12);
    fs::write(&text, format!("{filler}|The passkey is: 4071562|{filler}|What is the passkey? The passkey is: "))
        .unwrap();
    (run.display().to_string(), text.display().to_string())
}

/// No page asks for anything outside itself.
pub fn is_alone(page: &str) {
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        let known = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!known.contains(outside), "the page has {outside:?}");
    }
}

#[test]
fn attend_shows_what_tokens_choose() {
    let dir = TempDir::new().unwrap();
    let (run, text) = trained(dir.path());
    let out = dir.path().join("attend.html");
    let html = out.to_str().unwrap();
    let r = succeeds(&["attend", &run, "--text", &text, "--needle", "4071562", "--html", html]);
    assert!(r.out.contains("needle's rank") && r.out.contains("chunks ever chosen"), "{}", r.out);
    is_alone(&fs::read_to_string(&out).unwrap());

    refuses(
        &["attend", &run, "--text", &text, "--needle", "no such words", "--html", html],
        &["--needle", "is not in"],
    );
    refuses(&["attend", &run, "--text", "no/such/text", "--html", html], &["no/such/text"]);
    refuses(&["attend", &run, "--text", &text, "--most", "100", "--html", html], &["--most 1"]);
    refuses(&["attend", "tiny", "--text", &text, "--html", html], &["no weights"]);
    let short = dir.path().join("short.txt");
    fs::write(&short, "short").unwrap();
    refuses(&["attend", &run, "--text", short.to_str().unwrap(), "--html", html], &["5 tokens", "more than 16"]);
}

#[test]
fn report_is_one_page() {
    let dir = TempDir::new().unwrap();
    let (run, _) = trained(dir.path());
    succeeds(&["eval", "passkey", &run, "--len", "128", "--cases", "2", "--json"]);
    let out = dir.path().join("report.html");
    succeeds(&["report", &run, "--out", out.to_str().unwrap()]);
    let page = fs::read_to_string(&out).unwrap();
    is_alone(&page);
    let parts = [
        "Training run run",
        "gradient norm",
        "keys right",
        "Buffers of a step",
        "chunk_size",
        "AdamW",
        "rambac train tiny",
    ];
    parts.iter().for_each(|p| assert!(page.contains(p), "no {p:?} in the page"));
    assert!(!page.contains("{{"));
    succeeds(&["report", &format!("{run}/latest")]);
    assert!(Path::new(&run).join("report.html").exists());
    refuses(&["report", dir.path().to_str().unwrap()], &["there is no metrics.jsonl here"]);
}

/// Traces open as JSON, with every step's work.
#[test]
fn traces() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let steps = |path: &str| {
        let all: Vec<serde_json::Value> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let slices = all.iter().filter(|e| e["ph"] == "X" && e["args"]["flops"].is_number());
        let scans = slices.clone().filter(|e| e["name"] == "selective_scan").count();
        let runs = all.iter().filter(|e| e["cat"] == "run").count();
        (slices.count(), scans, runs)
    };
    let (train, bench, run) = (at("train.json"), at("bench.json"), at("run.json"));
    let args = ["train", "tiny", "--len", "128", "--batch", "1", "--steps", "4", "--json", "--profile-steps", "2"];
    succeeds(&[&args[..], &["--profile", &train, "--out", &at("run")]].concat());
    let (n, scans, runs) = steps(&train);
    assert!(n > 100 && scans >= 4 && runs == 2, "{n} {scans} {runs}");
    succeeds(&["bench", "forward", "--preset", "tiny", "--len", "128", "--runs", "2", "--profile", &bench]);
    assert_eq!(steps(&bench).2, 1);
    let table = succeeds(&["bench", "forward", "--preset", "tiny", "--len", "128", "--runs", "1", "--profile"]);
    assert!(table.out.contains("selective_scan"), "{}", table.out);
    let compiled = at("tiny.rambac");
    succeeds(&["compile", "tiny", "--train", "-o", &compiled]);
    succeeds(&["run", &compiled, "--len", "128", "--steps", "2", "--profile", &run]);
    assert_eq!(steps(&run).2, 2);
    refuses(&["bench", "scan", "--preset", "tiny", "--profile", &bench], &["train and forward"]);
    refuses(&["train", "tiny", "--steps", "1", "--out", &at("x"), "--profile", "no/such/dir/t.json"], &["--profile"]);
}
