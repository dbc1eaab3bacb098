//! Running the command, and what every refusal must look like.

use std::path::Path;
use std::process::{Command, Output, Stdio};

pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    /// Standard error as one line: messages are wrapped for the terminal.
    pub err: String,
}

pub fn command(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_rambac"));
    // Two threads whatever the machine; results do not depend on it.
    c.args(args).args(["--threads", "2"]).stdin(Stdio::null()).env("NO_COLOR", "1").env_remove("RUST_LOG");
    c
}

/// Runs the command to its end.  It must never panic nor call anything a bug.
pub fn rambac(args: &[&str]) -> Ran {
    let Output { status, stdout, stderr } = command(args).output().unwrap();
    let err = unwrapped(&String::from_utf8_lossy(&stderr));
    assert!(!err.contains("panicked") && !err.contains("BUG"), "{args:?}: {err}");
    Ran { code: status.code(), out: String::from_utf8_lossy(&stdout).into_owned(), err }
}

fn unwrapped(s: &str) -> String {
    let border = |c: char| c.is_whitespace() || matches!(c, '│' | '╰' | '├' | '─' | '▶');
    s.split(border).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Runs the command, which must succeed.
pub fn succeeds(args: &[&str]) -> Ran {
    let r = rambac(args);
    assert_eq!(r.code, Some(0), "{args:?}: {}", r.err);
    r
}

/// Runs the command, which must refuse with status 1 and a message that names all of `parts`; the message.
pub fn refuses(args: &[&str], parts: &[&str]) -> String {
    let r = rambac(args);
    assert_eq!(r.code, Some(1), "{args:?}: {} {}", r.out, r.err);
    parts.iter().for_each(|p| assert!(r.err.contains(p), "{args:?}: no {p:?} in: {}", r.err));
    r.err
}

pub fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A copy of a folder's files.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for e in std::fs::read_dir(from).unwrap() {
        let e = e.unwrap();
        if e.file_type().unwrap().is_file() {
            // Read and written, so that the copy is writable whatever the original is.
            std::fs::write(to.join(e.file_name()), std::fs::read(e.path()).unwrap()).unwrap();
        }
    }
}
