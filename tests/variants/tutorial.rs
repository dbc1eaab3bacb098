//! docs/variants.md, run as it stands: files are written, commands run, and what is shown must be what they print.
//!
//! A block ```` ```ir NAME.ir ```` writes a file, ```` ```console ```` runs its lines that begin with `$`.  Lines below a command
//! must appear in its output in that order; `…` stands for anything, and digits may be others.

use std::path::Path;
use std::process::Command;

/// A line without what changes from run to run.
fn plain(line: &str) -> String {
    let line: String = line.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect();
    let mut out = line.split_whitespace().collect::<Vec<_>>().join(" ");
    while out.contains("##") {
        out = out.replace("##", "#");
    }
    out
}

/// Whether `have` is `want`, in which `…` stands for anything.
fn like(want: &str, have: &str) -> bool {
    let mut rest = have;
    for (i, part) in want.split('…').enumerate() {
        match rest.find(part) {
            Some(at) if i > 0 || at == 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    rest.is_empty() || want.ends_with('…')
}

/// Whether it could run: a GPU's kernels need a compiler that need not be here.
fn command(dir: &Path, line: &str, expected: &[&str]) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[0], "rambac", "{line}");
    let out = Command::new(env!("CARGO_BIN_EXE_rambac"))
        .args(&words[1..])
        .current_dir(dir)
        .env("NO_COLOR", "1")
        .env("COLUMNS", "100")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if text.contains("NVRTC, the CUDA compiler library, is not here") {
        return false;
    }
    let fails = expected.iter().any(|l| l.contains('×') || l.contains('✗'));
    assert_eq!(out.status.success(), !fails, "{line}\n{text}");
    let mut lines = text.lines().map(plain);
    for want in expected.iter().map(|l| plain(l)).filter(|l| !l.is_empty() && l != "…") {
        assert!(
            lines.any(|have| like(&want, &have)),
            "{line}\nprints no line (after those before) like\n{want}\nin\n{text}"
        );
    }
    true
}

#[test]
fn the_tutorial_runs() {
    let dir = tempfile::tempdir().unwrap();
    let text = include_str!("../../docs/variants.md");
    let (mut blocks, mut commands) = (text.split("\n```"), 0);
    blocks.next();
    // Every other piece is the inside of a block.
    for block in blocks.step_by(2) {
        let (head, body) = block.split_once('\n').unwrap();
        match head.split_whitespace().collect::<Vec<_>>()[..] {
            ["ir", name] => std::fs::write(dir.path().join(name), format!("{body}\n")).unwrap(),
            ["console"] => {
                let lines: Vec<&str> = body.lines().collect();
                let starts: Vec<usize> = (0..lines.len()).filter(|&i| lines[i].starts_with("$ ")).collect();
                for (i, &at) in starts.iter().enumerate() {
                    let end = starts.get(i + 1).copied().unwrap_or(lines.len());
                    if !command(dir.path(), &lines[at][2..], &lines[at + 1..end]) {
                        break;
                    }
                    commands += 1;
                }
            }
            _ => panic!("a block of kind {head:?} is not run: make it ir NAME.ir or console"),
        }
    }
    assert!(commands >= 6, "{commands} commands");
}
