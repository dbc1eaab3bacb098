//! The verbs, one file each.

mod check;

use crate::cli::{Cli, Verb};
use crate::error::Result;
use std::process::ExitCode;

/// Runs the verb that was given.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let pool = crate::model::pool(cli.threads)?;
    match cli.verb {
        Verb::Check(a) => check::run(&a, pool),
    }
}
