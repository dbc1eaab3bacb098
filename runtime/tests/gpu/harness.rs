//! Runs tests that need NVRTC, in parallel, and reports as libtest does.  What a device can't run is counted as ignored.
//!
//! Where several versions of NVRTC are installed, tests take turns; `PROPTEST_RNG_SEED` says who begins.

use crate::rig::{DEVICE, NOT_HERE, Rig};
use rambac_codegen::nvrtc::{HELP, Nvrtc, NvrtcError};
use rayon::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A test's name and what it does; the text is printed beside its name.
pub type Case = (&'static str, fn(&Rig) -> Result<String, String>);

pub fn run(families: &[&[Case]]) -> ExitCode {
    // As libtest: a word chooses tests by part of their name; flags that it knows are no error here.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (mut words, mut skip, mut rest) = (vec![], vec![], args.iter());
    while let Some(a) = rest.next() {
        match a.as_str() {
            "--skip" => skip.extend(rest.next()),
            "--test-threads" | "--format" | "--color" | "--logfile" | "-Z" => drop(rest.next()),
            flag if flag.starts_with('-') => {}
            _ => words.push(a),
        }
    }
    let within = |name: &str, of: &[&String]| of.iter().any(|w| name.contains(w.as_str()));
    let chosen = |name: &str| (words.is_empty() || within(name, &words)) && !within(name, &skip);
    let cases: Vec<Case> = families.iter().flat_map(|f| f.iter().copied()).filter(|c| chosen(c.0)).collect();
    if args.iter().any(|a| a == "--list") {
        cases.iter().for_each(|c| println!("{}: test", c.0));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", cases.len());
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let rigs = match Nvrtc::open_all().into_iter().map(Rig::new).collect::<Result<Vec<Rig>, _>>() {
        Ok(rigs) => rigs,
        // It was asked for by name.
        Err(e) => {
            println!("{DEVICE}: {e}");
            return ExitCode::FAILURE;
        }
    };
    if rigs.is_empty() {
        for (name, _) in &cases {
            println!("test {name} ... ignored, skipped: {}: cargo xtask cuda, or {HELP}", NvrtcError::Missing);
            skipped += 1;
        }
    } else {
        rigs.iter().for_each(|r| println!("{}: {}", r.nvrtc.name(), r.nvrtc.path.display()));
        let first = std::env::var("PROPTEST_RNG_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0usize);
        let counts = Mutex::new([0; 3]);
        cases.par_iter().enumerate().for_each(|(i, (name, f))| {
            let rig = &rigs[first.wrapping_add(i) % rigs.len()];
            let began = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(|| f(rig))).unwrap_or_else(|_| Err("it panicked".into()));
            let about = format!("{}, {:.1} s", rig.nvrtc.name(), began.elapsed().as_secs_f64());
            // Told at once: the next test may hang.
            let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(text) => {
                    println!("test {name} ... ok ({about}){text}");
                    counts[0] += 1;
                }
                Err(e) if e.starts_with(NOT_HERE) => {
                    println!("test {name} ... ignored, skipped: {e}");
                    counts[2] += 1;
                }
                Err(e) => {
                    println!("test {name} ... FAILED ({about})\n{e}\n");
                    counts[1] += 1;
                }
            }
        });
        [passed, failed, skipped] = counts.into_inner().unwrap_or_else(PoisonError::into_inner);
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; 0 filtered out");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
