//! `cargo xtask test`: everything that must hold before a change is merged, in the order of what fails fastest.
//!
//! Stages run one after another and stop at the first that fails.  The last line, `N passed, N failed, N skipped`,
//! adds the tests of every test binary and one for each other stage.  Deliberately absent: dependencies, so that this
//! builds in a second, and any knowledge of single tests.

mod browser;
mod cuda;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// A step of the run: a program with its arguments, and what is set in its environment.
struct Stage {
    name: &'static str,
    about: &'static str,
    program: Program,
    args: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
}

#[derive(Clone, Copy)]
enum Program {
    Cargo,
    /// The command itself as `cargo test` builds it: another build of it would take minutes.
    Rambac,
}

/// What `cargo test` is told, also where only its build is wanted.
const TEST: &[&str] = &["test", WORKSPACE, "--no-fail-fast"];

/// Every crate; the window too, unless it is left out.
const WORKSPACE: &str = "--workspace";

/// The window, whose libraries take minutes to build and want a newer compiler than the rest.
const VIEWER: &str = "rambac-viewer";
/// That compiler's minor version.
const VIEWER_RUST: u32 = 95;

/// All stages, in order.
const STAGES: &[Stage] = &[
    Stage { name: "fmt", about: "formatting", program: Program::Cargo, args: &["fmt", "--all", "--check"], env: &[] },
    Stage {
        name: "clippy",
        about: "lints of all targets",
        program: Program::Cargo,
        args: &["clippy", WORKSPACE, "--all-targets", "--", "-D", "warnings"],
        env: &[],
    },
    Stage {
        name: "test",
        about: "all tests",
        program: Program::Cargo,
        args: TEST,
        // The same graphs are grown in every run; a snapshot that differs is a failure, not a new file beside the old.
        env: &[("PROPTEST_RNG_SEED", "1"), ("INSTA_UPDATE", "no"), ("INSTA_FORCE_PASS", "0")],
    },
    Stage {
        name: "doc",
        about: "documentation",
        program: Program::Cargo,
        args: &["doc", WORKSPACE, "--no-deps"],
        env: &[("RUSTDOCFLAGS", "-D warnings")],
    },
    Stage {
        name: "kernels",
        about: "docs/kernels.md is of these kernels",
        program: Program::Rambac,
        args: &["kernels", "--check", "docs/kernels.md"],
        env: &[],
    },
    Stage {
        name: "check-reference",
        about: "fixtures by the ops' definitions",
        program: Program::Rambac,
        args: &["check", "tests/fixtures", "--device", "reference"],
        env: &[],
    },
    Stage {
        name: "check-cpu",
        about: "fixtures on the CPU",
        program: Program::Rambac,
        args: &["check", "tests/fixtures", "--device", "cpu"],
        env: &[],
    },
];

/// Results of tests.
#[derive(Clone, Copy, Default)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// The counts of a line `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn libtest(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let count = |what: &str| {
        let words: Vec<&str> = rest.split(|c: char| c == ';' || c.is_whitespace()).filter(|w| !w.is_empty()).collect();
        words.windows(2).find(|w| w[1] == what).and_then(|w| w[0].parse().ok())
    };
    Some(Counts { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

/// A stage's arguments, with the window's crate or without.
fn arguments(args: &[&'static str], window: bool) -> Vec<&'static str> {
    let without = |a: &&'static str| match *a {
        WORKSPACE if !window => vec![WORKSPACE, "--exclude", VIEWER],
        a => vec![a],
    };
    args.iter().flat_map(without).collect()
}

/// Why the window is not built, if so.
fn no_window(left_out: bool) -> Option<String> {
    if left_out {
        return Some("left out by --no-viewer".into());
    }
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let out = Command::new(rustc).arg("--version").output().ok()?;
    let minor = minor(&String::from_utf8_lossy(&out.stdout))?;
    (minor < VIEWER_RUST).then(|| format!("its libraries want Rust 1.{VIEWER_RUST}, this is 1.{minor}"))
}

/// Of `rustc 1.95.0 (…)`.
fn minor(version: &str) -> Option<u32> {
    version.split_whitespace().nth(1)?.split('.').nth(1)?.parse().ok()
}

/// Runs a stage and passes on what it prints; whether it succeeded, and its counts.
fn run(stage: &Stage, window: bool) -> std::io::Result<(bool, Counts)> {
    let cargo = std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
    let program = match stage.program {
        Program::Cargo => cargo,
        Program::Rambac => {
            // Does nothing after the stage `test`.
            if !Command::new(cargo).args(arguments(TEST, window)).args(["--quiet", "--no-run"]).status()?.success() {
                return Ok((false, Counts { failed: 1, ..Counts::default() }));
            }
            std::env::current_exe()?.with_file_name(format!("rambac{}", std::env::consts::EXE_SUFFIX))
        }
    };
    let args = arguments(stage.args, window);
    let mut child = Command::new(program).args(args).envs(stage.env.iter().copied()).stdout(Stdio::piped()).spawn()?;
    let mut counts = Counts::default();
    let mut seen = false;
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            if let Some(c) = libtest(&line) {
                seen = true;
                counts.passed += c.passed;
                counts.failed += c.failed;
                counts.skipped += c.skipped;
            }
        }
    }
    let ok = child.wait()?.success();
    // A stage without tests, or one that never came to run them, counts itself.
    if !seen || (!ok && counts.failed == 0) {
        *(if ok { &mut counts.passed } else { &mut counts.failed }) += 1;
    }
    Ok((ok, counts))
}

fn seconds(d: Duration) -> String {
    format!("{:>7.1} s", d.as_secs_f64())
}

fn test(only: Option<&str>, viewer: bool) -> ExitCode {
    let no_window = no_window(!viewer);
    let chosen: Vec<&Stage> = STAGES.iter().filter(|s| only.is_none_or(|o| s.name == o)).collect();
    if chosen.is_empty() {
        eprintln!("there is no stage \"{}\"; give one of {}", only.unwrap_or_default(), names());
        return ExitCode::from(2);
    }
    let began = Instant::now();
    if chosen.iter().any(|s| s.name == "test") {
        cuda::install().iter().for_each(|e| eprintln!("tests of CUDA kernels may be skipped: {e}"));
        browser::install().iter().for_each(|e| eprintln!("tests of pages may be skipped: {e}"));
    }
    let mut total = Counts::default();
    let mut summary = String::new();
    let mut failed = None;
    for stage in chosen {
        println!("\n== {}: {}", stage.name, stage.about);
        let t = Instant::now();
        let (ok, c) = run(stage, no_window.is_none()).unwrap_or_else(|e| {
            eprintln!("cannot run it: {e}");
            (false, Counts { failed: 1, ..Counts::default() })
        });
        total.passed += c.passed;
        total.failed += c.failed;
        total.skipped += c.skipped;
        summary += &format!(
            "{} {:<16} {}   {} passed, {} failed, {} skipped\n",
            if ok { "ok  " } else { "FAIL" },
            stage.name,
            seconds(t.elapsed()),
            c.passed,
            c.failed,
            c.skipped
        );
        if !ok {
            failed = Some(stage.name);
            break;
        }
    }
    if let Some(why) = no_window {
        summary += &format!("skip viewer           the window: {why}\n");
        total.skipped += 1;
    }
    println!("\n{summary}     {:<16} {}", "in all", seconds(began.elapsed()));
    if let Some(name) = failed {
        println!("stopped at {name}; again: cargo xtask test --only {name}");
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    if failed.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Compiles every GPU kernel of the presets and writes what they take.
fn kernels() -> ExitCode {
    let cargo = std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
    let args = ["run", "--release", "--quiet", "--", "kernels", "--out", "docs/kernels.md"];
    let made = std::fs::create_dir_all("docs").and_then(|()| Command::new(cargo).args(args).status());
    match made {
        Ok(s) if s.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("cannot write docs/kernels.md: {e}");
            ExitCode::FAILURE
        }
    }
}

fn names() -> String {
    STAGES.iter().map(|s| s.name).collect::<Vec<_>>().join(", ")
}

fn usage() -> String {
    let tasks =
        "test [--no-viewer] [--only STAGE] | cuda (installs NVRTC for tests) | kernels (writes docs/kernels.md)";
    format!("usage: cargo xtask {tasks}\nstages: {}", names())
}

fn main() -> ExitCode {
    // Paths of stages are relative to the workspace, wherever this was called from.
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    if let Err(e) = std::env::set_current_dir(root) {
        eprintln!("{root}: {e}");
        return ExitCode::FAILURE;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["test"] => test(None, true),
        ["test", "--no-viewer"] => test(None, false),
        ["test", "--only", stage] => test(Some(stage), true),
        ["test", "--no-viewer", "--only", stage] | ["test", "--only", stage, "--no-viewer"] => test(Some(stage), false),
        ["cuda"] => {
            let failed = cuda::install();
            failed.iter().for_each(|e| eprintln!("{e}"));
            if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        ["kernels"] => kernels(),
        ["help" | "--help" | "-h"] => {
            println!("{}", usage());
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{}", usage());
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_libtest() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s";
        let c = libtest(line).unwrap();
        assert_eq!((c.passed, c.failed, c.skipped), (12, 3, 1));
        assert!(libtest("test a ... ok").is_none());
    }

    #[test]
    fn the_window_is_left_out() {
        assert_eq!(arguments(TEST, true), TEST);
        assert_eq!(arguments(TEST, false), ["test", "--workspace", "--exclude", VIEWER, "--no-fail-fast"]);
        assert_eq!((minor("rustc 1.95.0 (59807616e 2026-04-14)"), minor("none")), (Some(95), None));
    }
}
