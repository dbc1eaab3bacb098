//! Runs tests that need what a machine may lack, and reports as libtest does: what is skipped is said and counted.

use std::panic::catch_unwind;
use std::process::ExitCode;

/// A test's name and what it does; an error is the reason why it is skipped.
pub type Case = (&'static str, fn() -> Result<(), String>);

/// Runs those whose names contain one of the words that the process was given; all if there are none.
pub fn run(all: &[Case]) -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if std::env::args().any(|a| a == "--list") {
        all.iter().for_each(|c| println!("{}: test", c.0));
        return ExitCode::SUCCESS;
    }
    let chosen = |name: &str| words.is_empty() || words.iter().any(|w| name.contains(w.as_str()));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, f) in all.iter().filter(|c| chosen(c.0)) {
        match catch_unwind(f) {
            Ok(Ok(())) => {
                println!("test {name} ... ok");
                passed += 1;
            }
            Ok(Err(why)) => {
                println!("test {name} ... ignored, skipped: {why}");
                skipped += 1;
            }
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; 0 filtered out");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
