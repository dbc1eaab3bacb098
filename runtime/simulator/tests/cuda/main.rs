//! CUDA programs, compiled by NVRTC, run on the simulator and compared with what Rust computes; then each with one
//! defect, which must be found.
//!
//! Programs are the `.cu` files beside this.  A comment `// MUT name: code` in them is a defect: the line of code above it
//! (above other such comments) is replaced by `code`.  Without NVRTC nothing here can run: every test is then counted as
//! ignored and the reason printed.

#[macro_use]
mod cases;
mod forms;
mod mutants;
mod support;

use rambac_codegen::nvrtc::{self, Nvrtc};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// A compiler of each major version that is installed.
fn compilers() -> Vec<Nvrtc> {
    let mut all: Vec<Nvrtc> = vec![];
    for path in nvrtc::installed() {
        match Nvrtc::open(&path) {
            Ok(n) if all.iter().all(|m| m.version.0 != n.version.0) => all.push(n),
            Ok(_) => {}
            Err(e) => eprintln!("{e}"),
        }
    }
    if all.is_empty() {
        all.extend(Nvrtc::open_any().ok());
    }
    all.sort_by_key(|n| n.version);
    all
}

/// All programs.
fn all() -> impl Iterator<Item = &'static support::Case> {
    cases::ALL.iter().chain(forms::ALL)
}

fn main() -> ExitCode {
    // As libtest: a word chooses tests by part of their name; flags that it knows are no error here.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let chosen = |name: &str| {
        let mut words = args.iter().filter(|a| !a.starts_with('-')).peekable();
        words.peek().is_none() || words.any(|w| name.contains(w.as_str()))
    };
    let names: Vec<&str> = all().map(|c| c.name).chain(["seeded_defects", "both_compilers"]).collect();
    let names: Vec<&str> = names.into_iter().filter(|n| chosen(n)).collect();
    if args.iter().any(|a| a == "--list") {
        names.iter().for_each(|n| println!("{n}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", names.len());
    let compilers = compilers();
    for c in &compilers {
        println!("NVRTC {}.{}: {}", c.version.0, c.version.1, c.path.display());
    }
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for name in &names {
        if compilers.is_empty() {
            println!("test {name} ... ignored, skipped: NVRTC is not here: cargo xtask cuda, or {}", nvrtc::HELP);
            skipped += 1;
            continue;
        }
        if *name == "both_compilers" && compilers.len() < 2 {
            println!(
                "test {name} ... ignored, skipped: only NVRTC {:?} is here: cargo xtask cuda",
                compilers[0].version
            );
            skipped += 1;
            continue;
        }
        let run = || match *name {
            "seeded_defects" => mutants::run(&compilers[0]),
            "both_compilers" => support::versions(&compilers),
            _ => match all().find(|c| c.name == *name) {
                Some(case) => support::run(case, &compilers),
                None => Err("BUG: no such test".into()),
            },
        };
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("it panicked".into()));
        match result {
            Ok(text) => {
                println!("test {name} ... ok{text}");
                passed += 1;
            }
            Err(e) => {
                println!("test {name} ... FAILED\n{e}\n");
                failed += 1;
            }
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; 0 filtered out");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
